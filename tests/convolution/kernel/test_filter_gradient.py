"""The kernels of the gradients of filters and skip terms in Triton's interpreter, over buffers that start as NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.codegen.convolution.filter_gradient import launch
from monarch_compile.convolution.correlation import filter_gradient, from_lags
from tests.convolution.kernel.problems import Case, filter_gradient_problem

pytestmark = [pytest.mark.usefixtures("interpreted"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

CASES = (
    Case(3, 2, 1000, 1000, 2000, 1000),
    Case(19, 2, 256, 256, 512, 256, terms="z", scale=0.5),
    Case(5, 3, 300, 300, 600, 300, terms="az", layout="turned"),
    Case(2, 1, 1000, 1000, 1000, 1000, terms="a", layout="cut"),
    Case(2, 2, 900, 1000, 1950, 1000, lag=77, terms="az"),
    Case(2, 1, 700, 1500, 1500, 600, lag=1400),
    Case(3, 2, 3, 3, 6, 3, terms="az"),
    Case(2, 1, 1, 1, 2, 1),
    Case(2, 3, 5, 9, 7, 7, lag=3),
    Case(9, 2, 127, 64, 254, 127, terms="z"),
    Case(2, 2, 100, 400, 600, 100),
    Case(2, 1, 2000, 2000, 4000, 2000),
    Case(1, 2, 4096, 4096, 8192, 4096),
)
BOUND = 4e-6
"""Relative error of a channel's gradient: that of float32 FFTs is about a fifth of it."""


def found_and_wanted(case: Case, **changes: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both gradients by the kernels, and in float64."""
    tensors, options = filter_gradient_problem(case, **changes)
    return (*by_kernels(tensors, options), *in_float64(tensors, options))


def by_kernels(tensors: list[Tensor | None], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    sizes = {name: options[name] for name in ("transform_len", "filter_len", "lag")}
    later, earlier, at_zero = launch(*tensors, **options)  # type: ignore[arg-type]
    return from_lags(later, earlier, **sizes), at_zero


def in_float64(tensors: list[Tensor | None], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = [None if x is None else x.double() for x in tensors]
    return filter_gradient(*wide, **{**options, "filter_dtype": torch.float64})  # type: ignore[arg-type]


def errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative, of each channel."""
    return (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-300)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_correlates(case: Case) -> None:
    found, at_zero, wanted, wanted_at_zero = found_and_wanted(case)
    assert found.shape == (case.channels, case.filter_len)
    assert errors(found, wanted).max() < BOUND
    torch.testing.assert_close(at_zero.double(), wanted_at_zero, rtol=1e-5, atol=1e-4)
