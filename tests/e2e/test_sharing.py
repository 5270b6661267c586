"""Equal sites share one body: what Inductor compiles does not grow with the layers, and the answers stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx, config, metrics
from torch.fx import GraphModule

import monarch_compile
from monarch_compile.attention.op import ATTENTION_OP, ATTENTION_WITH_LSE_OP
from monarch_compile.passes import sharing
from monarch_compile.passes.sharing import BODY, share_bodies
from tests.support.block import Block, key_padding

OPTIONS = {"policy": "always", "strict": True, "block_size": 8}
OPS = (ATTENTION_OP, ATTENTION_WITH_LSE_OP)
SHARED = torch.ops.higher_order.invoke_subgraph


class Stack(nn.Module):
    """Layers of attention alone."""

    def __init__(self, layers: int, **options: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(**options) for _ in range(layers))

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, visible)
        return x

    def by_reference(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer.by_reference(x, visible, block_size=8)
        return x


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that would go to Inductor, which AOTAutograd alone runs."""
    given: list[GraphModule] = []

    def run(gm: GraphModule, inputs: Any, config_patches: object = None) -> Any:
        given.append(gm)
        return aot_eager(gm, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx", run)
    return given


def compiled(fn: Callable[..., Any], *, dynamic: bool = False, **options: object) -> Callable[..., Any]:
    return torch.compile(fn, backend="monarch", fullgraph=True, dynamic=dynamic, options=OPTIONS | options)


def count(gm: GraphModule) -> tuple[int, int]:
    """(ops that are to be compiled, calls of bodies)."""
    nodes = [node for module in gm.modules() if isinstance(module, GraphModule) for node in module.graph.nodes]
    return sum(node.target in OPS for node in nodes), sum(node.target is SHARED for node in nodes)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "key_padding"])
@pytest.mark.parametrize(
    ("layers", "dynamic"),
    [(2, False), (2, True), (5, False), pytest.param(5, True, marks=pytest.mark.nightly)],
    ids=["2-static", "2-dynamic", "5-static", "5-dynamic"],
)
def test_layers_share_one_body(graphs: list[GraphModule], layers: int, dynamic: bool, masked: bool) -> None:
    model = Stack(layers).eval()
    call = compiled(model, dynamic=dynamic)
    with torch.no_grad():
        for seq_len in (41, 64) if dynamic else (41,):
            given = torch.randn(3, seq_len, 24), key_padding(3, seq_len) if masked else None
            torch.testing.assert_close(call(*given), model.by_reference(*given), rtol=1e-5, atol=1e-5)
    assert [count(gm) for gm in graphs] == [(1, layers)]
    assert counters["monarch"]["lowered"] == layers


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["static", "dynamic"])
def test_inductor_compiles_no_more_attention_for_more_layers(dynamic: bool) -> None:
    """Each further layer costs the kernels around its attention alone: as many as with exact attention."""
    numbers: dict[tuple[str, int], int] = {}
    x = torch.randn(2, 41, 24)
    for policy in ("never", "always"):
        for layers in (2, 3):
            model = Stack(layers).eval()
            torch._dynamo.reset()
            metrics.reset()
            options = {"policy": policy, "block_size": 8}
            call = torch.compile(model, backend="monarch", fullgraph=True, dynamic=dynamic, options=options)
            with torch.no_grad(), config.patch(force_disable_caches=True):
                output = call(x)
                if policy == "always":
                    torch.testing.assert_close(output, model.by_reference(x), rtol=1e-5, atol=1e-5)
            numbers[policy, layers] = metrics.generated_kernel_count
    assert numbers["always", 2] > numbers["never", 2]
    added, exact = (numbers[policy, 3] - numbers[policy, 2] for policy in ("always", "never"))
    assert added == exact


def test_what_differs_has_a_body_of_its_own(graphs: list[GraphModule]) -> None:
    q, visible = torch.randn(2, 2, 40, 8), key_padding(2, 40)[:, None, None, :]
    strided = torch.randn(2, 40, 2, 8).transpose(1, 2)

    def fn(q: Tensor, strided: Tensor, visible: Tensor) -> list[Tensor]:
        by_scale = [F.scaled_dot_product_attention(q, q, q, scale=scale) for scale in (0.5, 0.25, 0.5)]
        masked = [F.scaled_dot_product_attention(q, q, q, visible, scale=0.5) for _ in range(2)]
        others = [F.scaled_dot_product_attention(x, x, x, scale=0.5) for x in (strided, q[:, :, :32], q[:1])]
        return [*by_scale, *masked, *others]

    with torch.no_grad():
        outputs = compiled(fn)(q, strided, visible)
    assert count(graphs[0]) == (6, 4)  # bodies: unmasked at scale 0.5, masked; four sites stand alone
    keys = {node.args[1] for node in graphs[0].graph.find_nodes(op="call_function", target=SHARED)}
    assert len(keys) == 2
    torch.testing.assert_close(outputs[0], outputs[2])
    for output, scale, x in ((outputs[0], 0.5, q), (outputs[1], 0.25, q), (outputs[5], 0.5, strided)):
        expected = monarch_compile.monarch_attention(x, x, x, block_size=8, scale=scale)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_training_shares_nothing(graphs: list[GraphModule]) -> None:
    model, x = Stack(2), torch.randn(2, 41, 24)
    compiled(model)(x).square().sum().backward()
    assert [count(gm) for gm in graphs] == [(2, 0)]
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.by_reference(x).square().sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_cpp_wrapper_shares_nothing(graphs: list[GraphModule]) -> None:
    """Inductor's C++ wrapper has no calls of bodies (torch 2.13)."""
    with torch.no_grad():
        compiled(Stack(2).eval(), cpp_wrapper=True)(torch.randn(2, 41, 24))
        with config.patch(cpp_wrapper=True):
            compiled(Stack(3).eval())(torch.randn(2, 41, 24))
    assert [count(gm) for gm in graphs] == [(2, 0), (3, 0)]


def test_one_site_stands_alone(graphs: list[GraphModule]) -> None:
    with torch.no_grad():
        compiled(Stack(1).eval())(torch.randn(2, 41, 24))
    assert [count(gm) for gm in graphs] == [(1, 0)]


def test_without_the_higher_order_op_nothing_is_shared(
    graphs: list[GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "_invoke_subgraph", lambda: None)
    with torch.no_grad():
        compiled(Stack(2).eval())(torch.randn(2, 41, 24))
    assert [count(gm) for gm in graphs] == [(2, 0)]


def test_an_exported_program_keeps_an_op_for_each_site() -> None:
    program = torch.export.export(Stack(2).eval(), (torch.randn(2, 41, 24),))
    assert count(monarch_compile.lower_exported(program, OPTIONS).graph_module) == (2, 0)


def test_the_shared_graph_is_dumped(graphs: list[GraphModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONARCH_DEBUG_DIR", str(tmp_path))
    with torch.no_grad():
        compiled(Stack(2).eval())(torch.randn(2, 41, 24))
    (dumped,) = (tmp_path / "graph_000").glob("*_share_bodies.py")
    assert BODY.format("attention", 0) in dumped.read_text()
    assert share_bodies(graphs[0]) == 0  # what is shared is shared


CHAINED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "queries": lambda q, k, v: by_hand(by_hand(q, k, v), k, v),
    "values": lambda q, k, v: by_hand(q, k, by_hand(q, k, v)),
    "residual": lambda q, k, v: by_hand(by_hand(q, k, v) + q, k, v),
    "chunk": lambda q, k, v: by_hand(by_hand(q, k, v).chunk(2, -1)[0], k.chunk(2, -1)[1], v),
}


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 2).softmax(-1) @ v


@pytest.mark.parametrize("name", CHAINED)
def test_a_site_that_reads_another_has_a_body_for_its_strides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first site gives other strides than were traced, and so does what is computed from it."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 2, 3, 8, 4).unbind()
    with torch.no_grad():
        output = torch.compile(CHAINED[name], backend="monarch", options={"policy": "always", "block_size": 1})(q, k, v)
    torch.testing.assert_close(output, CHAINED[name](q, k, v), rtol=1e-5, atol=1e-5)
