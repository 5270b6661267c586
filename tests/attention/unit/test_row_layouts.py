"""How kernels read rows: which tensors are copied before, and how wide the tiles of their features are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.launch import site, sizes_of, with_adjacent_features
from monarch_compile.codegen.attention.specialization import specialize
from monarch_compile.codegen.tiling import feature_tiles

BATCH, HEADS, SEQ_LEN = 2, 3, 130


def layout_of(x: Tensor) -> str:
    return f"{x.shape[-1]} at {x.stride()}+{x.storage_offset()}"


def rows(dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(BATCH, HEADS, SEQ_LEN, dim, dtype=dtype)


def packed(dim: int) -> Tensor:
    """(batch, seq, heads, dim) seen as (batch, heads, seq, dim), as a projection gives it."""
    return torch.zeros(BATCH, SEQ_LEN, HEADS, dim, dtype=torch.bfloat16).transpose(1, 2)


@pytest.mark.parametrize("x", [rows(64), packed(64), packed(25), rows(64)[:, :, 1:], rows(66)[..., :64]], ids=layout_of)
def test_rows_of_adjacent_features_are_read_where_they_are(x: Tensor) -> None:
    assert with_adjacent_features(x)[0] is x


APART = {
    "turned": torch.randn(2, 3, 16, 50).transpose(-1, -2),
    "every other": torch.randn(2, 3, 50, 32)[..., ::2],
    "expanded": torch.randn(2, 3, 50, 1).expand(-1, -1, -1, 16),
}


@pytest.mark.parametrize("x", APART.values(), ids=APART)
def test_rows_of_features_apart_are_copied(x: Tensor) -> None:
    (found,) = with_adjacent_features(x)
    assert torch.equal(found, x)
    assert found.stride(-1) == 1


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype", "tiles"),
    [
        (25, 80, torch.float16, (64, 128)),
        (80, 16, torch.bfloat16, (128, 64)),
        (25, 32, torch.float16, (32, 32)),
        (64, 128, torch.float16, (64, 128)),
        (25, 80, torch.float32, (32, 128)),
    ],
)
def test_features_beside_wide_ones_have_wide_tiles(
    head_dim: int, value_dim: int, dtype: torch.dtype, tiles: tuple[int, int]
) -> None:
    assert feature_tiles(head_dim, value_dim, dtype) == tiles


def test_kernels_of_narrow_values_have_wide_tiles() -> None:
    q, v = rows(80), rows(25)
    ir, _ = site(q, q, v, None, Form(32, window=1), 0.1, None)
    schedule = EMITTER.choose_schedule(ir, (9, 0))
    specialization = specialize(ir, schedule, {"q": q, "k": q, "v": v}, sizes_of(ir, schedule.most_blocks, q, q, None))
    constants = [dict(kernel.constants) for kernel in EMITTER.program_of(ir, schedule, specialization).kernels]
    assert {tiles["VALUE_TILE"] for tiles in constants} == {64}
