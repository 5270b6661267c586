"""The kernels of long convolutions in three factors, in Triton's interpreter, over buffers that start as NaN.

4,096 points stand for all: 16 by (16 by 16), the least that tiles of tl.dot allow.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.codegen.convolution import launch as launching
from monarch_compile.codegen.convolution import three_factors
from monarch_compile.codegen.convolution.launch import bucketed, run
from monarch_compile.codegen.convolution.schedule import Schedule, check_schedule, choose_schedule, precise
from monarch_compile.codegen.convolution.search import variants
from monarch_compile.codegen.launcher import Launcher
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.reference import reference
from monarch_compile.errors import CodegenError
from tests.convolution.kernel.problems import BOUNDS, Case, errors, expected, tensors

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
POINTS = 4096
SCHEDULE = Schedule(Tiling(16, 16, 1, 1, 2), outer=Tiling(16, 64, 4, 1, 2))
SMALL = Case(2, 1, POINTS, POINTS, 2 * POINTS, POINTS)
CASES = (
    Case(3, 1, POINTS, POINTS, 2 * POINTS, POINTS, terms="d"),
    Case(2, 1, 3001, 3001, 6002, 3001, terms="daz", layout="turned", scale=0.5),
    Case(1, 2, 2900, 4000, 6100, 4000, lag=77, terms="az", layout="cut"),
    Case(1, 1, 4000, 300, 4300, 4000, terms="z"),
    Case(1, 1, 3000, 3000, 3000, 3000, terms="da"),
    Case(1, 1, 2500, 4100, 4100, 600, lag=3000),
)


def ir_of(case: Case, out_dtype: torch.dtype, dtype: torch.dtype = torch.bfloat16) -> LongConvolution:
    dtypes = (dtype, torch.float32, out_dtype)
    sizes = (case.batch, case.channels, case.seq_len, case.filter_len, case.transform_len, case.out_len, case.lag)
    terms = {"skip": "d" in case.terms, "pre_gate": "a" in case.terms, "post_gate": "z" in case.terms}
    return bucketed(LongConvolution(*sizes, *dtypes, **terms))


def convolved(
    case: Case, given: list[Any], options: dict[str, Any], out_dtype: torch.dtype, schedule: Schedule = SCHEDULE
) -> Tensor:
    return run(Launcher(ir_of(case, out_dtype, given[0].dtype), schedule), *given, options)  # type: ignore[arg-type]


def once(case: Case, given: list[Any], options: dict[str, Any]) -> Tensor:
    """With products of float64 numbers alone."""
    return convolved(case, given, options, torch.float32, precise(POINTS))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolves(case: Case) -> None:
    given, options = tensors(case)
    wanted = expected(given, options)
    assert errors(once(case, given, options), wanted).max() < BOUNDS[torch.float32]
    assert errors(convolved(case, given, options, torch.bfloat16), wanted).max() < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("allowed", [1e30, three_factors.NOISE])
def test_two_gates_of_one_result(allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result is that of a launch of its own, whether or not it is computed again."""
    monkeypatch.setattr(three_factors, "NOISE", allowed)
    monkeypatch.setattr(launching, "build", lambda ir, *_: Launcher(ir, SCHEDULE))
    given, options = tensors(Case(2, 1, 3000, 3000, 6000, 3000, terms="daz"))
    second = given[3].flip(0)
    found = launching.launch_twice(*given, second, **options, out_dtype=torch.bfloat16)
    for result, gate in zip(found, (given[4], second), strict=True):
        alone = launching.launch(*given[:4], gate, **options, out_dtype=torch.bfloat16)
        torch.testing.assert_close(result, alone, rtol=0, atol=0)


@pytest.mark.parametrize("filter_too", [False, True])
def test_what_is_not_finite_stays_in_its_sequence(filter_too: bool) -> None:
    case = replace(SMALL, batch=3, channels=2)
    given, options = tensors(case)
    clean = convolved(case, given, options, torch.bfloat16)
    given[0][1, 0, 7] = float("-inf")
    given[0][2, 0, POINTS - 1] = float("nan")
    clean[1:, 0] = float("nan")
    if filter_too:
        given[1][1, 2] = float("inf")
        clean[:, 1] = float("nan")
    found = convolved(case, given, options, torch.bfloat16)
    torch.testing.assert_close(found, clean, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_any_size_of_numbers(size: float) -> None:
    given, options = tensors(SMALL)
    given[0] = given[0].float() * size
    given[1] = given[1] / size
    wanted = expected(given, options)
    assert errors(convolved(SMALL, given, options, torch.bfloat16), wanted).max() < BOUNDS[torch.bfloat16]
    assert errors(once(SMALL, given, options), wanted).max() < BOUNDS[torch.float32]


def small_results() -> tuple[Tensor, list[Tensor]]:
    """Sequences (5, 1, POINTS), and filters (1, POINTS), of which results are small beside what transforms hold."""
    ramp = torch.arange(POINTS, dtype=torch.float64)
    chirp = torch.cos(torch.pi * ramp**2 / POINTS / 64)
    impulse = (ramp == POINTS - 1).double()
    u = torch.stack([torch.ones_like(ramp), chirp.flip(0), impulse, chirp + 1000 * impulse, ramp])[:, None].bfloat16()
    first = impulse.flip(0)
    filters = [torch.ones_like(ramp), chirp, 1 / (1 + ramp), first - first.roll(1)]
    return u, [filter.float()[None] for filter in filters]


def test_small_results_are_computed_again() -> None:
    """Rounding to float16 alone would show in them."""
    u, filters = small_results()
    options = {"transform_len": 2 * POINTS, "out_len": POINTS, "lag": 0, "scale": 1.0}
    case = Case(5, 1, POINTS, POINTS, 2 * POINTS, POINTS)
    for filter in filters:
        wanted = reference(u.double(), filter.double(), **options)
        found = convolved(case, [u, filter, None, None, None], options, torch.bfloat16)
        assert errors(found, wanted).max() < BOUNDS[torch.bfloat16]


def test_only_what_is_marked_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no allowance everything is marked; with a large one nothing is."""
    given, options = tensors(SMALL)
    found = []
    for noise in (1e30, 0.0):
        monkeypatch.setattr(three_factors, "NOISE", noise)
        found.append(convolved(SMALL, given, options, torch.bfloat16).double())
    rounded = once(SMALL, given, options).to(torch.bfloat16).double()
    assert errors(found[0], rounded).max() < errors(found[1], rounded).min()


def test_zeros() -> None:
    given, options = tensors(SMALL)
    given[0][1:] = 0
    found = convolved(SMALL, given, options, torch.bfloat16)
    assert not found[1:].any()
    assert found[0].any()
    given[1].zero_()
    assert not convolved(SMALL, given, options, torch.bfloat16).any()


@pytest.mark.parametrize("power", range(14, 21))
def test_shipped_schedules_are_legal(power: int) -> None:
    case = Case(1, 1, 1 << power, 1 << power, 2 << power, 1 << power)
    for out_dtype in BOUNDS:
        ir = ir_of(case, out_dtype)
        schedule = choose_schedule(ir)
        assert schedule.outer is not None
        check_schedule(schedule, ir)
        check_schedule(precise(1 << power), ir)


@pytest.mark.parametrize(
    ("schedule", "wording"),
    [
        (Schedule(Tiling(16, 32, 1, 1), outer=Tiling(16, 64, 4, 1)), "factors"),
        (Schedule(Tiling(16, 16, 1, 1), outer=Tiling(16, 512, 4, 1)), "whole rows"),
        (Schedule(Tiling(16, 16, 1, 1), kept="all", outer=Tiling(16, 64, 4, 1)), "nothing is kept"),
        (Schedule(Tiling(16, 16, 1, 1, 3), outer=Tiling(16, 64, 4, 1)), "powers of two"),
    ],
)
def test_schedules_that_are_not_legal(schedule: Schedule, wording: str) -> None:
    with pytest.raises(CodegenError, match=wording):
        check_schedule(schedule, ir_of(SMALL, torch.bfloat16))


def test_what_does_not_fit_on_chip_needs_an_outer_factor() -> None:
    longer = ir_of(Case(1, 1, 1 << 14, 1 << 14, 2 << 14, 1 << 14), torch.bfloat16)
    with pytest.raises(CodegenError, match="need an outer factor"):
        check_schedule(Schedule(Tiling(128, 128, 8, 1)), longer)


def test_every_schedule_of_the_search_is_legal() -> None:
    ir = ir_of(Case(2, 2, 1 << 15, 1 << 15, 2 << 15, 1 << 15), torch.bfloat16)
    start = choose_schedule(ir)
    for stage in ("main", "outer"):
        found = set(variants(start, stage, ir))
        assert len(found) > 10
        for schedule in found:
            check_schedule(schedule, ir)
