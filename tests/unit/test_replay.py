"""Recording a call like an earlier one gives the graph that tracing it gives: nodes, values, shared memory, origins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import skip_what_dynamo_refuses
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from monarch_compile.passes.capture import replay
from monarch_compile.passes.capture.trace import to_aten
from monarch_compile.passes.memory import storages_of


def captured(fn: Callable[..., Any], *args: Any, dynamic: bool = False) -> GraphModule:
    found: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(to_aten(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return found[0]


def described(gm: GraphModule) -> list[Any]:
    """Everything of a graph's nodes that passes and Inductor look at; memory by its order of appearance."""
    memory: dict[int, int] = {}
    return [
        (
            node.op,
            node.name,
            str(node.target),
            str(node.args),
            str(node.kwargs),
            [(x.shape, x.stride(), x.storage_offset(), x.dtype, x.device) for x in tensors(node.meta.get("val"))],
            [x.untyped_storage().nbytes() for x in tensors(node.meta.get("val"))],
            sorted(memory.setdefault(storage, len(memory)) for storage in storages_of(node)),
            node.meta.get("stack_trace"),
            str(node.meta.get("nn_module_stack")),
            node.meta.get("recompute"),
            str(node.meta.get("source_fn_stack")),
        )
        for node in gm.graph.nodes
    ]


def tensors(value: Any) -> list[Tensor]:
    return [x for x in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(x, Tensor)]


class Encoder(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(4))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def views(x: Tensor) -> tuple[Tensor, ...]:
    """Views of views, several results, and a reshape that copies beside one that does not."""
    parts = []
    for _ in range(2):
        first, second = x.chunk(2, -1)
        parts += [first[:, 1:].mT.reshape(-1), second.contiguous().view(-1), *x.unbind(1)[:2], *torch.max(x, -1)]
        parts.append(x.reshape(2, -1))
        parts.append(x.mT.reshape(2, -1))
    return tuple(part.clone() for part in parts)


def written(x: Tensor) -> Tensor:
    """In-place ops among calls that are alike: what is read is what was written last."""
    y, z = x * 2, x * 2
    for _ in range(2):
        y.add_(1)
        z = z + y.mul_(0.5)
        y.view(-1)[:3].fill_(0.0)
    return y + z


def arguments(x: Tensor) -> list[Tensor]:
    """Calls that differ in the type of a number, the sign of a zero, a tensor that is given twice, a dtype."""
    y = x.abs()
    found = [x * 1, x * 1.0, x * True, x + 0.0, x + -0.0, x * x, x * y, y * x, x.double() * 1, x.mT * 1, x * 2]
    return [*found, torch.matmul(x, x.mT), torch.matmul(y, x.mT), x.to(torch.float64), x.to(torch.float16)]


def switched(x: Tensor) -> Tensor:
    x = x @ x
    with torch.autocast("cpu", torch.bfloat16):
        y = (x @ x) + (x @ x)
        y = y @ y + checkpoint(torch.matmul, x, x, use_reentrant=False)
        y = y + torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: (x @ x) * 2, (x,))
    with torch.no_grad():
        z = x @ x
    return (x @ x) + y + z


def made(x: Tensor) -> Tensor:
    total = torch.zeros(4, 4)
    for _ in range(2):
        total = total + torch.arange(4.0) + torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.zeros(4, 4)
        total = F.dropout(total, 0.5, training=True) + torch.rand(4, 4)
    return total + x


def sized(x: Tensor) -> Tensor:
    """A size that is computed as a tensor, as Longformer and LED do, again and again."""
    total = torch.zeros(())
    for _ in range(3):
        total = total + x.view(torch.div(x.size(0), 2, rounding_mode="trunc"), 2, -1).sum()
        total = total + x.view(torch.tensor(2), -1).sum() * torch.tensor([2.0, 3.0])[0]
    return total


def repeated(x: Tensor) -> Tensor:
    """A size that the elements of a tensor give, by an op that is not tagged so."""
    counts = torch.tensor([1, 0, 2, 1])
    return sum(x.repeat_interleave(counts, 0).sum(0) for _ in range(3)) + x


class Turns:
    """Not the same each time."""

    number = 0


@torch._dynamo.allow_in_graph
def turn(x: Tensor) -> Tensor:
    Turns.number += 1
    return x * Turns.number


def unsteady(x: Tensor) -> list[Tensor]:
    return [turn(x), turn(x), turn(x)]


SQUARE = torch.randn(4, 4)
PROGRAMS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "encoder": (Encoder(), torch.randn(2, 5, 8)),
    "encoder_eval": (Encoder().eval(), torch.randn(2, 5, 8)),
    "encoder_checkpointed": (Encoder(checkpointed=True), torch.randn(2, 5, 8)),
    "views": (views, torch.randn(2, 4, 6)),
    "written": (written, SQUARE),
    "arguments": (arguments, SQUARE),
    "switched": (switched, SQUARE),
    "made": (made, SQUARE),
    "sized": (sized, SQUARE),
    "repeated": (repeated, SQUARE),
}


@pytest.mark.parametrize("grad", [pytest.param(False, marks=pytest.mark.nightly), True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.filterwarnings("ignore")
def test_the_graph_is_the_traced_one(name: str, dynamic: bool, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fn, x = PROGRAMS[name]
    given = x.clone().requires_grad_(grad and name != "written")
    with torch.set_grad_enabled(grad):
        try:
            found = described(captured(fn, given, dynamic=dynamic))
        except Unsupported:
            skip_what_dynamo_refuses(fn, given, dynamic=dynamic)
            raise
        monkeypatch.setattr(replay, "_key", lambda *_: None)
        expected = described(captured(fn, given, dynamic=dynamic))
    assert [node[1] for node in found] == [node[1] for node in expected]
    for node, other in zip(found, expected, strict=True):
        assert node == other


def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The ops of each call that will have been recorded without being traced."""
    calls: list[list[str]] = []
    again = replay._again

    def noted(known: replay.Recorded, *rest: Any) -> Any:
        calls.append([str(node.target) for node in known.steps])
        return again(known, *rest)

    monkeypatch.setattr(replay, "_again", noted)
    return calls


def test_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    with torch.no_grad():
        model = Encoder().eval()
        gm = captured(model, torch.randn(2, 5, 8))
    replayed = sum(map(len, calls))
    nodes = len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
    assert nodes == 16
    assert replayed > 0.6 * sum(node.op == "call_function" for node in gm.graph.nodes)


def test_what_writes_or_is_told_by_data_is_traced_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    with torch.no_grad():
        captured(written, SQUARE)
        ops = {op for call in calls for op in call}
        assert ops
        assert not any(op.removesuffix(".Tensor").removesuffix(".Scalar").endswith("_") for op in ops)
        calls.clear()
        captured(unsteady, SQUARE)
        assert calls == []
        captured(arguments, SQUARE, dynamic=True)
        assert calls == []


def test_what_gives_nothing_is_traced_each_time() -> None:
    def asserted(x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x)
            torch._assert_async((x.abs() < 1e9).all(), "too large")
        return x

    gm = captured(asserted, torch.randn(1, 2, 5, 4))
    asserts = [node for node in gm.graph.nodes if "_assert_async" in str(node.target)]
    assert len(asserts) == 3
