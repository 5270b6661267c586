"""The operators' autograd over the real backward kernels, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.attention import gradients
from monarch_compile.attention.form import Form
from monarch_compile.attention.op import attention_backward, attention_with_lse
from monarch_compile.attention.reference import reference

pytest.importorskip("monarch_compile.codegen.attention.gradients")
ARGUMENTS = (0.5, *Form(16, window=1).arguments(), None)
FORM = {"scale": 0.5, "block_size": 16, "window": 1}


@pytest.fixture(autouse=True)
def _on_the_cpu(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "place_has_kernels", lambda x: True)


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, 41, 16, generator=generator).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("mask", ["none", "padding", "bias"])
def test_gradients_are_those_of_the_reference(mask: str) -> None:
    given, more = tensors(), None
    if mask == "padding":
        more = torch.arange(41)[None] < 30
    if mask == "bias":
        more = torch.randn(1, 41, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = [*given, more] if mask == "bias" else given
    output, lse = attention_with_lse(*given, more, *ARGUMENTS)
    assert not lse.requires_grad
    found = torch.autograd.grad(output.sin().sum(), leaves)
    expected = torch.autograd.grad(reference(*given, more, **FORM).sin().sum(), leaves)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_operator_of_gradients_has_four_results() -> None:
    given = [x.detach() for x in tensors()]
    output, lse = attention_with_lse(*given, None, *ARGUMENTS)
    found: tuple[Any, ...] = attention_backward(torch.ones_like(output), *given, None, output, lse, *ARGUMENTS)
    assert [tuple(x.shape) for x in found] == [*(tuple(x.shape) for x in given), (0,)]


def test_second_derivatives_are_those_of_the_reference() -> None:
    given = tensors()
    output, _ = attention_with_lse(*given, None, *ARGUMENTS)
    first = torch.autograd.grad(output.sin().sum(), given, create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    first = torch.autograd.grad(reference(*given, **FORM).sin().sum(), given, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)
