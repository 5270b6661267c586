"""The compiled kernels of gradients on a CUDA device against those of the float64 reference: sizes, forms, races."""

from __future__ import annotations

import random

import pytest
import torch

from tests.attention.kernel.gradients import check_backward, run_backward
from tests.attention.kernel.problems import DTYPES, Case, in_every_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

tiled = Case.tiled
CASES = (
    Case(1001, 39, 64, 64, num_heads=3),
    Case(4096, 64, 64, 64, batch=1, num_heads=2, window=1),  # whole blocks, all of them in one program
    Case(16384, 64, 64, 64, batch=1, window=1),  # more than one program holds
    Case(16384, 128, 64, 64, batch=1),
    Case(16384, 128, 64, 64, batch=1, window=1),
    Case(2000, 250, 64, 64, batch=1, window=1),  # blocks of several tiles
    Case(300, 2, 64, 64, num_heads=2, window=1, prefix=16),
    Case(4097, 7, 64, 64, window=2, pad="pre"),
    Case(777, 45, 25, 80, num_heads=2, window=1, prefix=4, mask="blocks"),
    Case(2048, 64, 72, 72, batch=1, num_heads=2, layout="packed", window=1),
    Case(2048, 64, 128, 128, num_heads=2, window=1),
    Case(777, 45, 128, 128, num_heads=2, prefix=4, mask="some"),
    Case(777, 100, 256, 256, num_heads=2, window=1),
    Case(997, 150, 80, 25, pad="pre", mask="bias", num_heads=2, window=1),
    Case(2048, 64, 64, 64, num_heads=6, group=3, window=1, mask="bias", prefix=3),
    Case(1000, 20, 16, 16, window=1, num_heads=2, prefix=1, layout="transposed"),
    tiled((37, 37), (4, 8), 64, 64, num_heads=2, window=1, window_shape="plus", prefix=5, mask="bias"),
    tiled((128, 128), (8, 8), 64, 64, batch=1, num_heads=2, window=1),
    tiled((9, 30, 31), (4, 4, 4), 64, 64, batch=1, window=1, window_shape="plus", prefix=5, mask="some"),
    tiled((61, 67), (8, 16), 25, 80, window=0, layout="transposed"),
    tiled((37, 37), (8, 8), 64, 64, num_heads=2, window=1, prefix=13, prefix_at_end=True, mask="bias"),
    tiled((9, 30, 31), (4, 4, 4), 64, 64, batch=1, window=(0, 1, 1), mask="some"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case, dtype: torch.dtype) -> None:
    check_backward(case, dtype, "cuda")


@pytest.mark.parametrize(("place", "case"), enumerate(in_every_layout(36)), ids=str)
def test_layouts_of_every_size(place: int, case: Case) -> None:
    check_backward(case, DTYPES[place % 3], "cuda")


def _drawn(number: int) -> list[Case]:
    draw = random.Random(0)
    return [
        Case(
            draw.randrange(400, 2500),
            draw.choice((16, 33, 64, 100, 128, 200)),
            draw.choice((16, 40, 64, 96)),
            draw.choice((16, 40, 64, 96)),
            pad=draw.choice(("post", "pre")),
            mask=draw.choice(("none", "some", "blocks", "bias")),
            num_heads=4,
            group=draw.choice((1, 2, 4)),
            window=draw.choice((None, 0, 1, 3)),
            prefix=draw.choice((0, 0, 1, 7)),
        )
        for _ in range(number)
    ]


@pytest.mark.parametrize("case", _drawn(30), ids=str)
def test_any_case(case: Case) -> None:
    check_backward(case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("window", [None, 1])
@pytest.mark.parametrize("block_size", [64, 128])
def test_long_sequence_without_races(block_size: int, window: int | None) -> None:
    """Bit for bit the same each time: there are no atomics, so a difference is a race."""
    case = Case(16384, block_size, 64, 64, num_heads=12, batch=1, window=window)
    first = run_backward(case, torch.bfloat16, "cuda")
    for _ in range(10):
        again = run_backward(case, torch.bfloat16, "cuda")
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
