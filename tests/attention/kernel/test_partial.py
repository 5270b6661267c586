"""The stages of attention by themselves, as ranks run them, in Triton's interpreter and on a CUDA device."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tolerances import assert_close

from monarch_compile.attention.form import Form
from monarch_compile.attention.parallel.on_kernels import far_field_of_offsets, merged, summaries_by_offsets
from monarch_compile.attention.reference import reference


class Case(NamedTuple):
    """Blocks of each of `ranks` ranks. heads: of queries, of keys. dims: of a head, of a value."""

    ranks: int
    count: int
    block_size: int
    window: int | None
    heads: tuple[int, int] = (2, 2)
    dims: tuple[int, int] = (16, 16)
    masked: bool = False


CASES = (
    Case(2, 3, 4, None),
    Case(2, 3, 5, 1),
    Case(4, 2, 6, 1, masked=True),
    Case(2, 2, 4, 3, (2, 1), (25, 16), masked=True),
    Case(4, 1, 3, 1, (4, 2), (16, 32)),
    Case(2, 4, 4, 0),
    Case(1, 5, 4, 1),
)


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    """All ranks in turn, a step at a time, against the float64 reference; exchanges are by hand."""
    generator = torch.Generator(device).manual_seed(0)
    length = case.ranks * case.count * case.block_size
    shapes = ((case.heads[0], case.dims[0]), (case.heads[1], case.dims[0]), (case.heads[1], case.dims[1]))
    q, k, v = (torch.randn(2, h, length, d, generator=generator, dtype=dtype, device=device) for h, d in shapes)
    visible = None
    if case.masked:
        visible = torch.rand(2, length, generator=generator, device=device) > 0.4
        visible[0, : case.block_size] = False
        visible[1] = False
    form = Form(case.block_size, window=case.window).simplest()
    kept, sent = [], []
    for rank in range(case.ranks):
        start, end = rank * case.count, (rank + 1) * case.count
        first, last = max(0, start - (form.window or 0)), min(case.ranks * case.count, end + (form.window or 0))
        own = slice(start * case.block_size, end * case.block_size)
        seen = slice(first * case.block_size, last * case.block_size)
        mask = None if visible is None else visible[:, seen]
        near, parts = summaries_by_offsets(
            q[:, :, own], k[:, :, seen], v[:, :, seen], mask, start - first, form, 0.3, case.ranks
        )
        kept.append(near)
        sent.append(parts)
    far = [
        far_field_of_offsets([parts[rank] for parts in sent], form.window, case.dims[1], masked=case.masked)
        for rank in range(case.ranks)
    ]
    found = [merged(kept[rank], [parts[rank] for parts in far], form)[0] for rank in range(case.ranks)]
    output = torch.cat(found, 1).transpose(1, 2)
    wide = [x.double() for x in (q, k, v)]
    expected = reference(*wide, visible, scale=0.3, block_size=case.block_size, window=case.window)
    assert_close(output, expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stages_of_several_ranks_are_the_attention(case: Case) -> None:
    check(case, torch.float32, "cpu")


GPU_CASES = (
    Case(2, 32, 64, 1, (4, 4), (64, 64)),
    Case(2, 16, 128, None, (4, 2), (64, 64)),
    Case(4, 9, 50, 2, (2, 2), (80, 72), masked=True),
    Case(2, 130, 256, 1, (2, 2), (128, 128)),
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_stages_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")
