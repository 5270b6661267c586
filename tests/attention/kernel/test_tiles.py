"""Kernels whose blocks are tiles of a grid, in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention import specialization
from monarch_compile.codegen.attention.launch import launch, run
from monarch_compile.codegen.attention.schedule import Schedule, choose_schedule
from monarch_compile.codegen.attention.specialization import UNKNOWN, Specialization, specialization_of
from monarch_compile.codegen.launcher import Launcher, build
from monarch_compile.codegen.tiling import ALL, Tiling
from tests.attention.kernel.problems import Case, check, tensors
from tests.support.poison import between_margins

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    # A row that sees no key has the log of a zero total, which a later `where` discards.
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]

IMAGE, VIDEO = ((5, 7), (2, 3)), ((3, 4, 5), (2, 2, 3))
"""A grid and a tile that does not divide it along any axis."""

tiled = Case.tiled
FORMS = (
    tiled(*IMAGE, 16, 16),
    tiled(*IMAGE, 16, 16, num_iters=2, mask="blocks"),
    tiled(*IMAGE, 25, 20, init="mean", prefix=1, mask="some"),
    tiled(*IMAGE, 16, 16, num_iters=2, init="mean", prefix=5),
    tiled(*IMAGE, 16, 16, num_iters=3, mask="bias"),
    tiled(*VIDEO, 16, 16, mask="blocks"),
    tiled(*VIDEO, 16, 25, num_iters=2, mask="some", batch=1),
    tiled((1, 9), (2, 4), 16, 16),  # one row, and half of each tile beyond it
    tiled((9, 1), (2, 4), 16, 16, window=1),
    tiled((6, 8), (2, 4), 16, 16),  # whole tiles
)
WINDOWS = (
    # One iteration from the identity start: the exact groups are part of stage 1.
    tiled(*IMAGE, 16, 16, window=0),
    tiled(*IMAGE, 16, 16, window=0, prefix=1, mask="blocks"),
    tiled(*IMAGE, 16, 16, window=1, mask="some"),
    tiled(*IMAGE, 16, 16, window=1, window_shape="plus", prefix=5, mask="blocks"),
    tiled(*IMAGE, 25, 20, window=2, prefix=1, mask="bias"),
    tiled(*IMAGE, 16, 16, window=2, window_shape="plus", mask="bias"),
    tiled(*IMAGE, 16, 16, window=3),  # every tile: exact
    tiled(*IMAGE, 16, 16, prefix=5, mask="blocks"),
    tiled(*VIDEO, 16, 16, window=0, prefix=5, mask="some"),
    tiled(*VIDEO, 16, 16, window=1, mask="blocks", batch=1),
    tiled(*VIDEO, 16, 20, window=1, window_shape="plus", prefix=1, mask="bias", batch=1),
    tiled((6, 8), (2, 4), 16, 16, window=1, window_shape="plus"),
    # Otherwise they have a kernel of their own.
    tiled(*IMAGE, 16, 16, init="mean", window=1, prefix=1, mask="blocks"),
    tiled(*IMAGE, 16, 16, num_iters=2, window=0),
    tiled(*IMAGE, 16, 25, num_iters=2, window=1, window_shape="plus", prefix=5, mask="some"),
    tiled(*IMAGE, 16, 16, num_iters=2, init="mean", window=2, mask="bias"),
    tiled(*VIDEO, 16, 16, num_iters=2, window=1, prefix=1, batch=1),
)
AT_END = (  # text after an image; the first five have exact groups in stage 1
    tiled(*IMAGE, 16, 16, window=1, window_shape="plus", prefix=5, prefix_at_end=True, mask="blocks"),
    tiled(*IMAGE, 25, 20, window=2, prefix=1, prefix_at_end=True, mask="bias"),
    tiled(*VIDEO, 16, 16, prefix=5, prefix_at_end=True, mask="some"),
    tiled((12, 13), (6, 8), 16, 16, window=0, prefix=3, prefix_at_end=True, batch=1),  # the prefix's rows in stage 1
    tiled(*IMAGE, 16, 16, prefix=21, prefix_at_end=True, batch=1),
    tiled(*IMAGE, 25, 20, init="mean", prefix=1, prefix_at_end=True, mask="some"),
    tiled(*IMAGE, 16, 25, num_iters=2, window=1, prefix=5, prefix_at_end=True, mask="bias"),
    tiled(*IMAGE, 16, 16, num_heads=4, group=2, window=1, prefix=2, prefix_at_end=True, layout="packed"),
)
ALONG_AXES = (  # windows of a number for each axis
    tiled(*IMAGE, 16, 16, window=(0, 1), mask="some"),
    tiled(*IMAGE, 25, 20, window=(2, 0), window_shape="plus", prefix=1, mask="blocks"),
    tiled(*IMAGE, 16, 16, window=(2, 1), window_shape="plus", mask="bias"),
    tiled(*VIDEO, 16, 16, window=(0, 1, 1), mask="blocks", batch=1),
    tiled(*VIDEO, 16, 20, window=(1, 0, 2), window_shape="plus", prefix=5, prefix_at_end=True, mask="bias", batch=1),
    tiled((6, 8), (2, 4), 16, 16, window=(1, 0)),  # whole tiles
    # The exact groups in a kernel of their own.
    tiled(*IMAGE, 16, 16, num_iters=2, window=(0, 2), window_shape="plus", mask="some"),
    tiled(*VIDEO, 16, 16, init="mean", window=(1, 0, 1), prefix=1, batch=1),
    tiled((11, 13), (2, 1), 16, 16, num_iters=2, window=(1, 3), batch=1),  # more tiles than a program's
)
SHARED = (  # fewer key heads than query heads
    tiled(*IMAGE, 16, 16, num_heads=4, group=2, window=1, prefix=2, mask="blocks"),
    tiled(*VIDEO, 16, 20, num_heads=2, group=2, num_iters=2, window=0, layout="transposed", batch=1),
)
STREAMED = (  # tiles of more tokens than a program's, and more tiles than that
    tiled((11, 13), (5, 8), 16, 16, window=1, window_shape="plus", prefix=1, mask="some", batch=1),
    tiled((9, 11), (1, 2), 16, 16, window=2, mask="blocks", batch=1),
    tiled((5, 6, 4), (2, 5, 4), 16, 16, num_iters=2, init="mean", window=1, batch=1),
)
LAYOUTS = tuple(
    tiled(*IMAGE, 32, 32, window=1, mask="some", layout=kind) for kind in ("packed", "transposed", "unaligned")
)


@pytest.mark.parametrize("case", [*FORMS, *WINDOWS, *ALONG_AXES, *AT_END, *SHARED, *STREAMED], ids=str)
def test_cases(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", [WINDOWS[1], WINDOWS[3], FORMS[3], AT_END[3]], ids=str)
def test_16_bits(case: Case) -> None:
    check(case, torch.float16, "cpu")


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case) -> None:
    """Strides are followed, and the answer is bit for bit that of contiguous tensors."""
    found = check(case, torch.float16, "cpu")
    assert torch.equal(found, check(replace(case, layout="contiguous"), torch.float16, "cpu"))


@pytest.mark.parametrize(
    "case", [FORMS[0], FORMS[7], WINDOWS[3], WINDOWS[10], WINDOWS[16], *AT_END[:4], *ALONG_AXES[2:5]], ids=str
)
def test_nothing_beyond_the_grid_is_read(case: Case) -> None:
    """What lies around the inputs is NaN, and changes no bit."""
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    surrounded = (None if x is None else between_margins(x) for x in (q, k, v, mask))
    assert torch.equal(launch(*surrounded, **case.options), launch(q, k, v, mask, **case.options))


@pytest.mark.parametrize("case", [WINDOWS[3], WINDOWS[9]], ids=str)
def test_the_same_window_along_each_axis_is_one_number(case: Case) -> None:
    """Bit for bit, by the same kernels."""
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    found = launch(q, k, v, mask, **case.options)
    misses = build.cache_info().misses
    assert torch.equal(launch(q, k, v, mask, **case.options | {"window": (1,) * len(case.grid or ())}), found)
    assert build.cache_info().misses == misses


@pytest.mark.parametrize("case", AT_END, ids=str)
def test_a_prefix_at_the_end_is_one_at_the_start(case: Case) -> None:
    """The same tokens put first give the same rows, in the other order."""
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    first = replace(case, prefix_at_end=False)
    moved = [None if x is None else x.roll(case.prefix, 2 if x.ndim == 4 else 1) for x in (q, k, v, mask)]
    found = launch(q, k, v, mask, **case.options).roll(case.prefix, 2)
    torch.testing.assert_close(found, launch(*moved, **first.options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 0, 1])
@pytest.mark.parametrize("num_iters", [1, 2])
def test_a_grid_of_one_axis_is_the_sequence(window: int | None, num_iters: int) -> None:
    case = tiled((23,), (5,), 16, 16, window=window, num_iters=num_iters, prefix=2, mask="some")
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    pieces = replace(case, grid=None, tile=None)
    torch.testing.assert_close(launch(q, k, v, mask, **case.options), launch(q, k, v, mask, **pieces.options))


@pytest.mark.parametrize("window", [4, (2, 3)], ids=str)
def test_a_window_over_every_tile_is_exact(window: Any) -> None:
    case = tiled(*IMAGE, 16, 16, window=window, prefix=2, mask="blocks")
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None], scale=0.25)
    exact[-1] = 0  # it sees no key
    torch.testing.assert_close(launch(q, k, v, mask, **case.options), exact, rtol=1e-5, atol=1e-6)


def ir_of(case: Case) -> MonarchAttention:
    form = Form(**{name: case.options[name] for name in FORM_OPTIONS})
    mask = {"none": MaskKind.NONE, "bias": MaskKind.KEY_BIAS}.get(case.mask, MaskKind.KEY_PADDING)
    heads, dims = (case.num_heads, case.num_heads // case.group), (case.head_dim, case.value_dim)
    lengths, scale = (case.seq_len, case.seq_len), case.head_dim**-0.5
    return MonarchAttention(case.batch, *heads, *lengths, *dims, torch.float32, form, scale, mask, grid=case.grid)


def scheduled(case: Case, schedule: Schedule) -> Tensor:
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    return run(Launcher(ir_of(case), schedule), q, k, v, mask, case.grid)


SCHEDULED = (
    tiled((13, 23), (5, 8), 16, 16, batch=1),
    tiled((13, 23), (5, 8), 16, 16, num_iters=2, mask="some", batch=1),
    tiled((13, 23), (5, 8), 16, 16, window=1, window_shape="plus", prefix=5, mask="some", batch=1),
    tiled((3, 7, 13), (2, 4, 5), 16, 16, window=0, batch=1),
)
CHANGES: dict[str, dict[str, Any]] = {
    "resident": {"summarize": Tiling(16, 64, 1, 2, ALL)},
    "an offset in turn": {"attend": Tiling(16, 32, 1, 2, ALL), "whole": True},
    "two offsets in turn": {"attend": Tiling(32, 32, 1, 2, 2), "whole": True},
    "tiled": {"summarize": Tiling(16, 16, 1, 1), "attend": Tiling(16, 16, 1, 1), "whole": False},
    "whole": {"summarize": Tiling(64, 64, 1, 1), "attend": Tiling(32, 32, 1, 1), "whole": True},
}


def halves() -> Iterator[Any]:
    """Every case with every change; half of the pairs, but none of all cases and changes, run nightly."""
    for (i, case), (j, name) in itertools.product(enumerate(SCHEDULED), enumerate(CHANGES)):
        yield pytest.param(case, name, id=f"{case}-{name}", marks=[pytest.mark.nightly] if (i + j) % 2 else [])


@pytest.mark.parametrize(("case", "name"), halves())
def test_schedules_change_no_result(case: Case, name: str) -> None:
    shipped = choose_schedule(ir_of(case))
    schedule = replace(shipped, **CHANGES[name])
    if schedule.attend.step < (ir_of(case).num_blocks or 0) and schedule.whole:
        schedule = replace(schedule, whole=False, attend=replace(schedule.attend, turns=1))
    if schedule.near is not None:
        schedule = replace(schedule, near=replace(schedule.near, rows=schedule.summarize.rows, num_warps=1))
    torch.testing.assert_close(scheduled(case, schedule), scheduled(case, shipped), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [SCHEDULED[2], WINDOWS[6]], ids=str)
def test_exact_groups_in_a_kernel_of_their_own(case: Case) -> None:
    fused = choose_schedule(ir_of(case))
    separate = replace(fused, near=Tiling(16, 32, 1, 1), fused=False)
    torch.testing.assert_close(scheduled(case, separate), scheduled(case, fused), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "ragged"),
    [
        (tiled((8, 32), (2, 8), 16, 16, window=1, batch=1), False),
        (tiled((8, 32), (2, 8), 16, 16, num_iters=2, prefix=5, mask="some", batch=1), False),
        (tiled((4, 4, 16), (2, 2, 4), 16, 16, window=1, window_shape="plus", batch=1), False),
        (tiled((7, 32), (2, 8), 16, 16, window=1, batch=1), True),  # 16 tiles, some beyond the last row
        (tiled((8, 31), (2, 8), 16, 16, window=0, batch=1), True),
    ],
    ids=str,
)
def test_specialization_changes_nothing(case: Case, ragged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: where tiles cover the grid without a rest no place is masked."""
    met: list[Specialization] = []

    def noted(*arguments: Any) -> Specialization:
        met.append(specialization_of(*arguments))
        return met[-1]

    monkeypatch.setattr(specialization, "specialization_of", noted)
    build.cache_clear()
    found = check(case, torch.float32, "cpu")
    assert [one.partial_block for one in met] == [ragged]
    monkeypatch.setattr(specialization, "specialization_of", lambda *_: UNKNOWN)
    assert torch.equal(found, check(case, torch.float32, "cpu"))


def test_one_text_serves_grids_of_any_size() -> None:
    build.cache_clear()
    for grid in ((9, 9), (8, 10), (7, 11)):
        check(tiled(grid, (2, 3), 16, 16, window=1), torch.float32, "cpu")
    assert build.cache_info().misses == 1
