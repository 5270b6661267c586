"""The kernels of long convolutions on a CUDA device, against the float64 reference, over poisoned buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.codegen.convolution.launch import launch
from monarch_compile.codegen.launcher import untraced
from monarch_compile.convolution.reference import reference
from tests.convolution.kernel.problems import (
    BOUND_ON_TENSOR_CORES,
    CASES,
    GRADIENT_BOUND,
    GRADIENT_CASES,
    Case,
    by_kernels,
    cancelling_problem,
    check,
    errors,
    expected,
    filter_gradient_problem,
    gradient_errors,
    in_float64,
    tensors,
)

pytestmark = pytest.mark.gpu

ROUNDED = 1.2
"""Our error over that of float32 FFTs whose result is rounded to bfloat16."""
ROUNDING = 2.0**-9 / 3**0.5
"""Of numbers that are no exact bfloat16 numbers: what ours may have where rounding happens to be exact."""
LENGTHS = (1, 2, 127, 256, 500, 1000, 1024, 2000, 2048, 3000, 4096, 6000, 8192)
LONG = (8193, 1 << 14, 20001, 1 << 15, 50000, 1 << 17, 200000, 1 << 19, 1 << 20)
"""Lengths whose transforms have an outer factor."""


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_convolves(case: Case, out_dtype: torch.dtype) -> None:
    untraced(lambda: check(case, "cuda", out_dtype))()  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("length", LENGTHS + LONG)
def test_is_as_accurate_as_a_result_in_bfloat16_allows(length: int) -> None:
    given, options = tensors(Case(3, 2, length, length, 2 * length, length, terms="daz"), "cuda")
    wanted = expected(given, options)
    found = untraced(lambda: launch(*given, **options, out_dtype=torch.bfloat16))()
    rounded = reference(*given, **options)
    assert (errors(found, wanted) <= ROUNDED * errors(rounded, wanted).clamp(min=ROUNDING)).all()


@pytest.mark.parametrize("length", [127, 1000, 8192])
def test_is_as_accurate_as_a_result_in_float16_allows(length: int) -> None:
    given, options = tensors(Case(3, 2, length, length, 2 * length, length, scale=0.125), "cuda", torch.float16)
    given[0] = given[0].sign() * given[0].abs().clamp(min=2.0**-6)  # results of no less than float16 holds
    wanted = expected(given, options)
    found = untraced(lambda: launch(*given, **options, out_dtype=torch.float16))()
    rounded = reference(*given, **options)
    assert (errors(found, wanted) <= ROUNDED * errors(rounded, wanted)).all()


@pytest.mark.parametrize("points", [256, 1024, 4096, 8192, 1 << 14, 1 << 15, 1 << 17, 1 << 20])
def test_small_results_of_large_transforms(points: int) -> None:
    """A constant, chirps, an impulse at the end, one large number: as accurate as float32 FFTs, rounded."""
    ramp = torch.arange(points, device="cuda", dtype=torch.float64)
    chirp = torch.cos(torch.pi * ramp**2 / points / 64)
    impulse = (ramp == points - 1).double()
    slow = 1 / (1 + ramp)
    u = torch.stack([torch.ones_like(ramp), chirp, chirp.flip(0), impulse, chirp + 1000 * impulse, ramp])[:, None]
    u = u.bfloat16()
    for filter in (torch.ones_like(ramp), chirp, slow, impulse.flip(0), impulse.flip(0) - impulse.flip(0).roll(1)):
        k = filter.float()[None]
        options = {"transform_len": 2 * points, "out_len": points, "lag": 0, "scale": 1.0}
        wanted = reference(u.double(), k.double(), **options)
        found = untraced(lambda k=k, o=options: launch(u, k, None, None, None, **o, out_dtype=torch.bfloat16))()
        rounded = reference(u, k, **options)
        assert (errors(found, wanted) <= ROUNDED * errors(rounded, wanted).clamp(min=ROUNDING)).all()


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradient_of_a_filter(case: Case) -> None:
    tensors, options = filter_gradient_problem(case, "cuda")
    found, at_zero = untraced_pair(tensors, options)
    again = untraced_pair(tensors, options)
    wanted, wanted_at_zero = in_float64(tensors, options)
    assert (gradient_errors(found, wanted) < GRADIENT_BOUND).all()
    torch.testing.assert_close(at_zero.double(), wanted_at_zero, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, again[0])
    assert torch.equal(at_zero, again[1])


@pytest.mark.parametrize("points", [256, 1024, 4096, 8192])
def test_gradient_of_a_filter_where_correlations_cancel(points: int) -> None:
    tensors, options = cancelling_problem(points, "cuda")
    found, _ = untraced_pair(tensors, options)
    wanted, _ = in_float64(tensors, options)
    everywhere, _ = in_float64(tensors, {**options, "filter_len": 2 * points})
    difference = (found.double() - wanted).norm(dim=-1)
    assert (difference < BOUND_ON_TENSOR_CORES * everywhere.norm(dim=-1)).all()


def untraced_pair(tensors: list[Any], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Both gradients by the kernels, launched as in eager mode."""
    found: list[tuple[Tensor, Tensor]] = []
    untraced(lambda: found.append(by_kernels(tensors, options)) or tensors[0])()  # type: ignore[func-returns-value]
    return found[0]


def spelled(u: Tensor, k: Tensor, skip: Tensor, before: Tensor, after: Tensor) -> Tensor:
    length = u.shape[-1]
    v = u * before
    spectrum = torch.fft.rfft(v.float(), n=2 * length) * torch.fft.rfft(k, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length] + v * skip[:, None]
    return y.to(u.dtype) * after


OPTIONS = {"policy": "always", "strict": True}
SIZES = [(4, 3, 1000), (1, 768, 256), (4, 768, 4096), (2, 3, 20000), (1, 8, 100000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_compiled_with_gradients(size: tuple[int, int, int]) -> None:
    """A filter that does not decay leaves sequences to be computed again; few sequences leave tiles not full."""
    torch._dynamo.reset()
    compare_gradients(torch.compile(spelled, backend="monarch", options=OPTIONS), *size)


def test_compiled_with_gradients_for_changing_sizes() -> None:
    """From the second size on, the compiled function has symbolic ones."""
    torch._dynamo.reset()
    compiled = torch.compile(spelled, backend="monarch", options=OPTIONS)
    for size in SIZES[:3]:
        compare_gradients(compiled, *size)


def compare_gradients(compiled: Any, batch: int, channels: int, length: int) -> None:
    given, _ = tensors(Case(batch, channels, length, length, 2 * length, length, terms="daz"), "cuda")
    results: list[list[Any]] = []
    for function in (spelled, compiled):
        own = [x.detach().clone().requires_grad_() for x in given]
        y = function(*own)
        y.backward(torch.ones_like(y))
        results.append([y.detach(), *(x.grad for x in own)])
    for eager, lowered in zip(*results, strict=True):
        difference = (eager.double() - lowered.double()).norm() / eager.double().norm()
        assert difference < 0.01
