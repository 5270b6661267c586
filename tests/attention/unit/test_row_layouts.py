"""How rows lie in memory decides how kernels load them: what is copied before, and what is not loaded ahead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from monarch_compile.attention.form import Form
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.launch import site, sizes_of, with_adjacent_features
from monarch_compile.codegen.attention.specialization import Specialization, specialize

BATCH, HEADS, SEQ_LEN = 2, 3, 130


def layout_of(x: Tensor) -> str:
    return f"{x.shape[-1]} at {x.stride()}+{x.storage_offset()}"


def specialization_of_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Specialization, set[int]]:
    """What a launch on these tensors may expect, and the numbers of stages of its kernels."""
    ir, _ = site(q, k, v, None, Form(32, window=1), 0.1, None)
    schedule = EMITTER.choose_schedule(ir, (9, 0))
    tensors = {"q": q, "k": k, "v": v}
    found = specialize(ir, schedule, tensors, sizes_of(ir, schedule.most_blocks, q, k, None))
    return found, {kernel.tiling.num_stages for kernel in EMITTER.program_of(ir, schedule, found).kernels}


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
    "x", [rows(64), packed(64), rows(26), rows(66)[..., 2:66], rows(25, torch.float32)], ids=layout_of
)
def test_rows_at_multiples_of_four_bytes_are_loaded_ahead(x: Tensor) -> None:
    assert not specialization_of_rows(x, x, x)[0].narrow_rows


@pytest.mark.parametrize("x", [rows(25), packed(25), rows(65)[..., :64], rows(66)[..., 1:65]], ids=layout_of)
@pytest.mark.parametrize("place", range(3))
def test_narrow_rows_of_one_tensor_are_enough(x: Tensor, place: int) -> None:
    tensors = [rows(x.shape[-1])] * 3
    tensors[place] = x
    found, stages = specialization_of_rows(*tensors)
    assert found.narrow_rows
    assert stages == {1}


def test_strides_of_dims_of_one_do_not_count() -> None:
    x = torch.zeros(1, 1, 1, SEQ_LEN * 64 + 1, dtype=torch.bfloat16)[..., :-1].view(1, 1, SEQ_LEN, 64)
    assert not specialization_of_rows(x, x, x)[0].narrow_rows


@pytest.mark.parametrize(("dim", "narrow"), [(64, False), (25, True)])
def test_lengths_that_are_symbols(dim: int, narrow: bool) -> None:
    """Nothing is guarded on: an even number of features times any number is even."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.STATIC]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    x = torch.zeros(BATCH, SEQ_LEN, HEADS, dim, dtype=torch.bfloat16)
    with mode:
        q = mode.from_tensor(x, symbolic_context=context).transpose(1, 2)
        found, _ = specialization_of_rows(q, q, q)
    assert found.narrow_rows == narrow
    assert not mode.shape_env.guards
