"""The kernels of the gradients of filters and skip terms in Triton's interpreter, over buffers that start as NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.codegen.convolution.emitter import EMITTER
from monarch_compile.codegen.convolution.filter_gradient import CORRELATIONS, run
from monarch_compile.codegen.launcher import Launcher
from monarch_compile.convolution.correlation import filter_gradient
from monarch_compile.convolution.ir import FilterGradient, LongConvolution
from tests.convolution.kernel.problems import (
    BOUND_AT_ALL_LAGS,
    GRADIENT_BOUND,
    GRADIENT_CASES,
    Case,
    by_kernels,
    cancelling_problem,
    filter_gradient_problem,
    gradient_errors,
    in_float64,
)

pytestmark = [pytest.mark.usefixtures("interpreted"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

SHORT = Case(4, 2, 300, 300, 600, 300)


def found_and_wanted(case: Case, **changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both gradients by the kernels, and in float64."""
    tensors, options = filter_gradient_problem(case, **changes)
    return (*by_kernels(tensors, options), *in_float64(tensors, options))


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_correlates(case: Case) -> None:
    found, at_zero, wanted, wanted_at_zero = found_and_wanted(case)
    assert found.shape == (case.channels, case.filter_len)
    assert gradient_errors(found, wanted).max() < GRADIENT_BOUND
    torch.testing.assert_close(at_zero.double(), wanted_at_zero, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_to_the_dtype_of_a_filter_of_16_bits(dtype: torch.dtype) -> None:
    """As float32 FFTs rounded to it are."""
    tensors, options = filter_gradient_problem(SHORT, filter_dtype=dtype)
    found, _ = by_kernels(tensors, options)
    rounded, _ = filter_gradient(*tensors, **options)  # type: ignore[arg-type]
    wanted, _ = in_float64(tensors, options)
    assert found.dtype is dtype
    slack = 1.2 if dtype is torch.float16 else 2.7  # the interpreter cuts bfloat16 instead of rounding it
    assert (gradient_errors(found, wanted) <= slack * gradient_errors(rounded, wanted)).all()


def test_inputs_in_float16() -> None:
    found, _, wanted, _ = found_and_wanted(SHORT, dtype=torch.float16)
    assert gradient_errors(found, wanted).max() < GRADIENT_BOUND


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_reaches_its_channel_alone(bad: float, place: int) -> None:
    tensors, options = filter_gradient_problem(SHORT)
    clean, clean_at_zero = by_kernels(tensors, options)
    tensors[place][2, 1, 7] = bad  # type: ignore[index]
    found, at_zero = by_kernels(tensors, options)
    assert torch.isnan(found[1]).all()
    assert not torch.isfinite(at_zero[1])
    torch.testing.assert_close(found[0], clean[0], rtol=0, atol=0)
    torch.testing.assert_close(at_zero[0], clean_at_zero[0], rtol=0, atol=0)


def test_zeros_add_nothing() -> None:
    tensors, options = filter_gradient_problem(SHORT)
    tensors[0][1:] = 0  # type: ignore[index]
    found, at_zero = by_kernels(tensors, options)
    wanted, _ = in_float64(tensors, options)
    assert gradient_errors(found, wanted).max() < GRADIENT_BOUND
    tensors[1].zero_()  # type: ignore[union-attr]
    found, at_zero = by_kernels(tensors, options)
    assert not found.any()
    assert not at_zero.any()


@pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
def test_any_size_of_numbers(size: float) -> None:
    tensors, options = filter_gradient_problem(SHORT)
    tensors[0] = tensors[0] * size  # type: ignore[operator]
    tensors[1] = tensors[1] / size  # type: ignore[operator]
    found, _ = by_kernels(tensors, options)
    wanted, _ = in_float64(tensors, options)
    assert gradient_errors(found, wanted).max() < GRADIENT_BOUND


@pytest.mark.parametrize("points", [256, 1024])
def test_correlations_that_cancel(points: int) -> None:
    """Of constants, chirps and impulses: errors are small beside the correlation at all lags, those below 0, too."""
    tensors, options = cancelling_problem(points)
    found, _ = by_kernels(tensors, options)
    wanted, _ = in_float64(tensors, options)
    everywhere, _ = in_float64(tensors, {**options, "filter_len": 2 * points})
    difference = (found.double() - wanted).norm(dim=-1)
    assert (difference < BOUND_AT_ALL_LAGS * everywhere.norm(dim=-1)).all()


def test_the_sum_over_a_batch_has_one_order() -> None:
    tensors, options = filter_gradient_problem(Case(35, 2, 256, 256, 512, 256))
    one, other = (by_kernels(tensors, options) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("points", sorted(CORRELATIONS))
@pytest.mark.parametrize("ahead", [False, True])
def test_schedules(points: int, ahead: bool) -> None:
    """Reading ahead changes no result."""
    case = Case(3, 1, points, points, 2 * points, points, terms="az")
    (grad, *rest), options = filter_gradient_problem(case)
    of = LongConvolution(3, 1, points, points, 2 * points, points, 0, *[torch.bfloat16] * 3, pre_gate=True)
    ir = EMITTER.canonical(FilterGradient(replace(of, filter_dtype=torch.float32, post_gate=True)))
    schedule = replace(EMITTER.choose_schedule(ir, None), ahead=ahead)
    EMITTER.check_schedule(schedule, ir)
    later, earlier, _ = run(Launcher(ir, schedule), grad, *rest, options)  # type: ignore[arg-type]
    wanted, _ = in_float64([grad, *rest], options)
    assert earlier is None
    assert gradient_errors(later, wanted).max() < GRADIENT_BOUND
