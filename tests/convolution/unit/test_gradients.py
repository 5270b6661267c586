"""Gradients of first and second order of the operators, against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.convolution.op import filter_gradient, long_convolution, long_convolution_twice

CASES = {
    "causal": {"seq_len": 5, "filter_len": 5, "transform_len": 10, "out_len": 5, "lag": 0},
    "longer filter": {"seq_len": 4, "filter_len": 7, "transform_len": 11, "out_len": 4, "lag": 0},
    "wraps": {"seq_len": 5, "filter_len": 5, "transform_len": 5, "out_len": 5, "lag": 0},
    "lag": {"seq_len": 4, "filter_len": 6, "transform_len": 7, "out_len": 4, "lag": 3},
    "other output": {"seq_len": 4, "filter_len": 3, "transform_len": 8, "out_len": 6, "lag": 1},
    "cut": {"seq_len": 7, "filter_len": 4, "transform_len": 6, "out_len": 5, "lag": 2},
}


def tensors(case: dict[str, int]) -> tuple[Tensor | None, ...]:
    """u, filter, skip, pre_gate and post_gate in float64; there is a skip term where there may be."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    skip = normal(2) if case["seq_len"] == case["out_len"] else None
    gates = normal(3, 2, case["seq_len"]), normal(3, 2, case["out_len"])
    return (normal(3, 2, case["seq_len"]), normal(2, case["filter_len"]), skip, *gates)


@pytest.mark.parametrize("name", CASES)
def test_of_the_convolution(name: str) -> None:
    case = CASES[name]
    given = tensors(case)
    options = (case["transform_len"], case["out_len"], case["lag"], 0.5, torch.float64)

    def call(*inputs: Tensor) -> Tensor:
        left = iter(inputs)
        return long_convolution(*(None if x is None else next(left) for x in given), *options)

    differentiable = [x for x in given if x is not None]
    assert torch.autograd.gradcheck(call, differentiable)
    assert torch.autograd.gradgradcheck(call, differentiable)


@pytest.mark.parametrize("name", CASES)
def test_of_the_gradient_of_a_filter(name: str) -> None:
    """Its products with any filter and skip term are those of the gradient with the convolution of these."""
    case = CASES[name]
    u, filter, skip, pre_gate, post_gate = tensors(case)
    grad = torch.randn(3, 2, case["out_len"], dtype=torch.float64)
    options: tuple[Any, ...] = (case["transform_len"], case["filter_len"], case["lag"], 0.5, torch.float64)
    of_filter, of_skip = filter_gradient(grad, u, pre_gate, post_gate, *options)
    forward = (case["transform_len"], case["out_len"], case["lag"], 0.5, torch.float64)
    product = (grad * long_convolution(u, filter, skip, pre_gate, post_gate, *forward)).sum()
    own = (of_filter * filter).sum() + (0 if skip is None else (of_skip * skip).sum())
    torch.testing.assert_close(own, product)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"cut"}))
def test_two_convolutions_at_once(name: str) -> None:
    """They are those of the operator, and so are their gradients of first and second order."""
    case = CASES[name]
    u, filter, skip, pre_gate, post_gate = tensors(case)
    second = torch.randn(3, 2, case["out_len"], dtype=torch.float64, requires_grad=True)
    options = (case["transform_len"], case["out_len"], case["lag"], 0.5, torch.float64)
    both = long_convolution_twice(u, filter, skip, pre_gate, post_gate, second, *options)
    for found, gate in zip(both, (post_gate, second), strict=True):
        torch.testing.assert_close(found, long_convolution(u, filter, skip, pre_gate, gate, *options))
    given = (u, filter, skip, pre_gate, post_gate, second)

    def call(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        left = iter(inputs)
        return long_convolution_twice(*(None if x is None else next(left) for x in given), *options)

    differentiable = [x for x in given if x is not None]
    assert torch.autograd.gradcheck(call, differentiable)
    assert torch.autograd.gradgradcheck(call, differentiable)
