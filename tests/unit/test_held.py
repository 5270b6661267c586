"""Tensors that a graph holds by itself, as an optimizer's step does: retraced as they are, and never written to."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import Graph, GraphModule

from monarch_compile.attention.functional import monarch_attention
from monarch_compile.backend import rewritten
from monarch_compile.calls import launcher_of
from monarch_compile.config import MonarchConfig
from monarch_compile.passes.pipeline import rewrite
from tests.support.block import Block

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.1, foreach=False),
}


def trained(make: Callable[[Any], torch.optim.Optimizer], model: nn.Module, backend: Any, steps: int) -> list[Tensor]:
    """The parameters after some steps, each of them one call of a compiled function."""
    model = copy.deepcopy(model).double()
    optimizer = make(model.parameters())

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend)
    for seed in range(steps):
        compiled(torch.randn(2, 9, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_in_one_function(name: str) -> None:
    graphs: list[GraphModule] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        held = {node.target for node in gm.graph.find_nodes(op="get_attr")}
        before = {key: value.clone() for key, value in [*gm.named_parameters(), *gm.named_buffers()]}
        after = rewrite(gm, inputs, MonarchConfig(policy="never")).after
        for key, value in [*gm.named_parameters(), *gm.named_buffers()]:
            assert torch.equal(value, before[key])
        assert {node.target for node in after.graph.find_nodes(op="get_attr")} == held
        graphs.append(after)
        return after.forward

    model = Block()
    found, expected = trained(OPTIMIZERS[name], model, backend, 2), trained(OPTIMIZERS[name], model, "eager", 2)
    assert any(gm.graph.find_nodes(op="get_attr") for gm in graphs)
    for parameter, other in zip(found, expected, strict=True):
        torch.testing.assert_close(parameter, other)


def test_a_training_step_is_no_failure(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.backends.debugging import aot_eager
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    counters.clear()
    with caplog.at_level(logging.WARNING, "monarch_compile"):
        trained(OPTIMIZERS["sgd"], Block(), "monarch", 1)
    assert [r for r in caplog.records if r.name.startswith("monarch_compile")] == []
    assert counters["monarch"]["fallback"] == 0


def test_a_failure_inside_a_function_transform_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """Gradients of the operator, which are made by a transform, and which Dynamo finds inside `backward`."""
    x = torch.randn(1, 2, 9, 4, requires_grad=True)

    def step(x: Tensor) -> None:
        monarch_attention(x, x, x, block_size=3).sum().backward()

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewritten(gm, inputs, MonarchConfig(policy="never"), launcher_of())
        return gm.forward

    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "monarch_compile"):
        torch.compile(step, backend=backend)(x)
    failed = [r for r in caplog.records if r.name.startswith("monarch_compile")]
    assert failed
    for record in failed:
        assert "function transform" in record.getMessage()
        assert not record.exc_info


def test_one_tensor_by_two_names() -> None:
    weight, given = nn.Parameter(torch.randn(4, 4)), torch.randn(3, 4)
    root, graph = nn.Module(), Graph()
    root.first, root.second = weight, weight
    x = graph.placeholder("x")
    for name in ("first", "second"):
        x = graph.call_function(torch.matmul, (x, graph.get_attr(name)))
    graph.output((x,))
    after = rewrite(GraphModule(root, graph), [given], MonarchConfig()).after
    assert len(after.graph.find_nodes(op="get_attr")) == 1
    torch.testing.assert_close(after(given)[0], given @ weight @ weight)
