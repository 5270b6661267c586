"""Exact sites come out right, and those that Inductor's own fusion takes rightly are still fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config

from tests.support.inductor import without_codegen
from tests.support.misread import DIVIDED, FUSED, MISREAD, given


@pytest.fixture(autouse=True)
def _patterns_alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Inductor's patterns are applied, and what comes of that is run as it is."""
    without_codegen(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    with config.patch(force_disable_caches=True):
        yield


def compiled(fn: Callable[..., Tensor], backend: str = "monarch", **options: object) -> Callable[..., Tensor]:
    return torch.compile(fn, backend=backend, dynamic=False, fullgraph=True, options=options)


def assert_close(output: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(output, expected, atol=1e-2 if expected.dtype == torch.float16 else 1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", MISREAD)
def test_what_inductor_would_misread_is_right(name: str) -> None:
    output = compiled(MISREAD[name], policy="never")(*given())
    assert counters["inductor"]["fuse_attention"] == 0
    torch.testing.assert_close(output, MISREAD[name](*given()))


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_what_inductor_fuses_rightly_it_still_does(name: str) -> None:
    output = compiled(FUSED[name], policy="never")(*given())
    assert counters["inductor"]["fuse_attention"] == 1
    assert_close(output, FUSED[name](*given()))


@torch.no_grad()
@pytest.mark.parametrize("name", DIVIDED)
def test_any_divisor_is_right(name: str) -> None:
    output = compiled(DIVIDED[name], policy="never")(*given())
    assert_close(output, DIVIDED[name](*given()))


@pytest.mark.parametrize("name", ["softmax_over_heads", "ones_hidden", "run_time_scale"])
def test_gradients_of_what_would_be_misread_are_right(name: str) -> None:
    tensors = given()
    gradients = []
    for fn in (MISREAD[name], compiled(MISREAD[name], policy="never")):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        fn(*leaves, tensors[3]).square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)
