"""monarch_attention under torch.func and forward-mode differentiation, in eager code and in torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from monarch_compile import monarch_attention

Function = Callable[[Tensor], Tensor]


@pytest.fixture
def inputs() -> tuple[Function, Tensor, Tensor]:
    """Attention as a function of its queries, queries, and a direction for them."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, tangent = (torch.randn(1, 2, 20, 4, dtype=torch.float64, generator=generator) for _ in range(4))
    return lambda q: monarch_attention(q, k, v, block_size=8), q, tangent


def derivative(f: Function, q: Tensor, tangent: Tensor) -> Tensor:
    """Along the tangent, by central differences."""
    step = 1e-6
    return (f(q + step * tangent) - f(q - step * tangent)) / (2 * step)


def test_forward_mode_keeps_the_tangent(inputs: tuple[Function, Tensor, Tensor]) -> None:
    f, q, tangent = inputs
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(f(forward_ad.make_dual(q, tangent))).tangent
    torch.testing.assert_close(found, derivative(f, q, tangent), rtol=0, atol=1e-7)


def test_reverse_mode_in_torch_func_is_that_of_autograd(inputs: tuple[Function, Tensor, Tensor]) -> None:
    f, q, tangent = inputs
    x = q.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(f(x), x, tangent)
    torch.testing.assert_close(torch.func.vjp(f, q)[1](tangent)[0], wanted)


def test_vmap_gives_what_single_calls_give(inputs: tuple[Function, Tensor, Tensor]) -> None:
    f, q, tangent = inputs
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack([q, tangent])), torch.stack([f(q), f(tangent)]))


def test_a_jvp_inside_a_compiled_function_keeps_the_tangent(inputs: tuple[Function, Tensor, Tensor]) -> None:
    f, q, tangent = inputs
    compiled = torch.compile(lambda q: torch.func.jvp(f, (q,), (tangent,))[1], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), derivative(f, q, tangent), rtol=0, atol=1e-7)


def test_a_compiled_call_keeps_the_operator(inputs: tuple[Function, Tensor, Tensor]) -> None:
    f, q, _ = inputs
    targets: list[object] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., object]:
        targets.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    torch.compile(f, backend=backend, fullgraph=True)(q)
    assert any("monarch_compile.attention" in str(target) for target in targets)
