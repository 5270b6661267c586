"""Modes and hooks that a program sets by itself stay where a site of it is lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from support.versions import hooks_that_read_tensors
from torch import Tensor

from monarch_compile.config import MonarchConfig
from monarch_compile.errors import LoweringError
from monarch_compile.passes.pipeline import rewrite

Program = Callable[[Tensor, Tensor], Any]


def attend(q: Tensor, w: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q @ w, q, q)


def inputs() -> tuple[Tensor, Tensor]:
    """(1, 2, 9, 4), without a gradient, and a weight, with one."""
    generator = torch.Generator().manual_seed(0)
    q, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((1, 2, 9, 4), (4, 4)))
    return q, w.requires_grad_()


def all_in_inference_mode(q: Tensor, w: Tensor) -> Any:
    with torch.inference_mode():
        return attend(q, w)


def first_in_inference_mode(q: Tensor, w: Tensor) -> Any:
    with torch.inference_mode():
        y = attend(q, w)
    return y, attend(q, w)


def inference_mode_switched_off(q: Tensor, w: Tensor) -> Any:
    with torch.inference_mode():
        y = attend(q, w)
        with torch.inference_mode(False):
            z = attend(q, w)
    return y, z


def inference_mode_without_gradients_around(q: Tensor, w: Tensor) -> Any:
    with torch.no_grad():
        with torch.inference_mode():
            y = attend(q, w)
        z = attend(q, w)
    return y, z


@pytest.mark.parametrize(
    "program",
    [
        all_in_inference_mode,
        first_in_inference_mode,
        inference_mode_switched_off,
        inference_mode_without_gradients_around,
    ],
    ids=lambda program: program.__name__,
)
def test_results_ask_for_gradients_as_before(program: Program) -> None:
    output, (result,) = run_passes(program, *inputs())
    assert {d.code for d in result.decisions} == {"lowered"}
    expected = program(*inputs())
    own, wanted = ([y] if isinstance(y, Tensor) else y for y in (output, expected))
    assert [y.requires_grad for y in own] == [y.requires_grad for y in wanted]
    torch.testing.assert_close(output, expected)


def hooks_around(q: Tensor, w: Tensor) -> Tensor:
    p = q @ w
    p.register_hook(lambda grad: 3 * grad)
    y = F.scaled_dot_product_attention(p, q, q)
    y.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return y * 2


def a_hook_that_reads_a_tensor(q: Tensor, w: Tensor) -> Tensor:
    p, scale = q @ w, w.detach().sum()
    p.register_hook(lambda grad: scale * grad)
    return F.scaled_dot_product_attention(p, q, q)


@pytest.mark.parametrize(
    "program",
    [
        hooks_around,
        pytest.param(a_hook_that_reads_a_tensor, marks=hooks_that_read_tensors),
    ],
    ids=lambda program: program.__name__,
)
def test_hooks_on_gradients_run(program: Program) -> None:
    q, w = inputs()
    output, (result,) = run_passes(program, q, w)
    assert [d.code for d in result.decisions] == ["lowered"]
    own, wanted = (torch.autograd.grad(y.square().sum(), w)[0] for y in (output, program(q, w)))
    torch.testing.assert_close(own, wanted)


def test_hooks_under_compiled_autograd_keep_the_graph_as_it_is() -> None:
    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        with pytest.raises(LoweringError, match="a gradient hook under compiled autograd"):
            rewrite(gm, example_inputs, MonarchConfig(policy="always"))
        return gm.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(hooks_around, backend=backend)(*inputs())
