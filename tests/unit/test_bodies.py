"""Higher-order ops: checkpoints opened, the others kept, attention outside them lowered and inside them reported."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from support.soundness import make_inputs
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._inductor import compile_fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from monarch_compile.attention.op import ATTENTION_OP
from monarch_compile.backend import _checkpoints, monarch
from monarch_compile.config import MonarchConfig
from monarch_compile.passes.pipeline import rewrite

Program = Callable[[Tensor, Tensor, Tensor], Any]
attend = F.scaled_dot_product_attention
EVERYTHING = create_block_mask(lambda b, h, q, k: q >= 0, None, None, 7, 7, device="cpu")


class Odd(torch.autograd.Function):
    """Twice the input, with a gradient that nothing but its own backward gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7


def _checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(attend, q, k, v, use_reentrant=False), k, v)


def _spelled_in_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(lambda q, k: torch.softmax(q @ k.mT, -1) @ v, q, k, use_reentrant=False), k, v)


def _own_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Odd.apply(q) + attend(k, k, v)


def _own_backward_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(Odd.apply(q), k, v)


def _either(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.cond(q.sum() > 0, attend, lambda q, k, v: q * 2, (q, k, v)), k, v)


def _scanned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scan(lambda c, x: (attend(c, k, v) + x, c * 1), q, torch.stack([q, k]))[0], k, v)


def _looped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count = torch.tensor(0)
    return attend(while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, attend(x, x, x)), (count, q * 1))[1], k, v)


def _flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(flex_attention(q, k, v, block_mask=EVERYTHING), k, v)


def _mask_from_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = (torch.arange(7) < 5)[None, None, None, :].expand(2, 1, 7, 7)
    for _ in range(2):
        q = checkpoint(lambda q: attend(q, k, v, attn_mask=visible), q, use_reentrant=False)
    return q


def _causal_mask_from_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    causal = torch.arange(7)[:, None] >= torch.arange(7)
    return checkpoint(lambda q: attend(q, k, v, attn_mask=causal), q, use_reentrant=False)


def _mask_written_between(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    visible = torch.ones(7, 7, dtype=torch.bool)
    q = checkpoint(lambda q: attend(q, k, v, attn_mask=visible), q, use_reentrant=False)
    visible.view(49)[1:].fill_(False)
    return checkpoint(lambda q: attend(q, k, v, attn_mask=visible), q, use_reentrant=False)


def _nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def inner(q: Tensor) -> Tensor:
        return checkpoint(attend, q, k, v, use_reentrant=False) + q

    return checkpoint(lambda q: attend(inner(q), k, v), q, use_reentrant=False)


def _two_results(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x, y = checkpoint(lambda q: (attend(q, k, v), q * 2), q, use_reentrant=False)
    return attend(x + y, k, v)


def _probabilities_leave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def body(q: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(q @ k.mT, -1)
        return p @ v, p

    y, p = checkpoint(body, q, use_reentrant=False)
    return y + p.sum()


def _save_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    wanted = op is torch.ops.aten.mm.default
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


def _selective(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    chosen = functools.partial(create_selective_checkpoint_contexts, _save_products)
    return attend(checkpoint(attend, q, k, v, use_reentrant=False, context_fn=chosen), k, v)


def _nothing_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(torch.sin, q, use_reentrant=False), k, v)


CODES: dict[Program, list[str]] = {
    _checkpointed: ["lowered", "lowered"],
    _spelled_in_checkpoint: ["lowered", "lowered"],
    _nested: ["lowered", "lowered"],
    _two_results: ["lowered", "lowered"],
    _mask_from_outside: ["lowered", "lowered"],
    _causal_mask_from_outside: ["mask_causal"],
    _mask_written_between: ["lowered", "mutation"],
    _probabilities_leave: ["probs_reused"],
    _selective: ["in_body", "lowered"],
    _own_backward: ["lowered"],
    _own_backward_of_queries: ["lowered"],
    _either: ["lowered", "lowered"],
    _scanned: ["lowered", "lowered"],
    _looped: ["lowered", "lowered"],
    _flexible: ["flex_attention", "lowered"],
    _nothing_inside: ["lowered"],
}


@pytest.mark.parametrize("fn", CODES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore")
def test_sites_outside_are_lowered_and_sites_inside_reported(fn: Program) -> None:
    tensors = make_inputs()[:3]
    output, (result,) = run_passes(fn, *tensors)
    assert [d.code for d in result.decisions] == CODES[fn]
    assert all(d.name and d.reason for d in result.decisions)
    torch.testing.assert_close(output, fn(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [_checkpointed, _spelled_in_checkpoint, _nested, _mask_from_outside, _own_backward, _own_backward_of_queries],
    ids=lambda f: f.__name__.strip("_"),
)
def test_gradients_through_kept_ops(fn: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    torch._dynamo.reset()
    counters.clear()

    def gradients(fn: Program) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in make_inputs(dtype=torch.float64)[:3]]
        return torch.autograd.grad(fn(*leaves).square().sum(), leaves)

    options = {"policy": "always", "block_size": 1}
    compiled = torch.compile(fn, backend=monarch, fullgraph=True, options=options)
    torch.testing.assert_close(gradients(compiled), gradients(fn))
    assert counters["monarch"]["lowered"] == CODES[fn].count("lowered")
    assert not counters["monarch"]["fallback"]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (_either, "a branch of cond"),
        (_scanned, "a step of scan"),
        (_looped, "a step of while_loop"),
        (_selective, "a checkpoint with a context_fn"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_body_that_is_kept_is_named(fn: Program, words: str) -> None:
    q, k, v = make_inputs()[:3]
    _, (result,) = run_passes(fn, q.requires_grad_(), k, v)
    assert result.decisions[0].code == "in_body"
    assert words in result.decisions[0].reason


class Layers(nn.Module):
    """Three layers of attention; each is one checkpoint where asked for."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.projections = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))

    def layer(self, x: Tensor, projection: nn.Module) -> Tensor:
        q, k, v = projection(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        return x + attend(q, k, v).transpose(1, 2).flatten(2).sin()

    def forward(self, x: Tensor) -> Tensor:
        for projection in self.projections:
            if self.checkpointed:
                x = checkpoint(self.layer, x, projection, use_reentrant=False)
            else:
                x = self.layer(x, projection)
        return x


def _saved(model: nn.Module, backend: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[tuple[int, ...]]:
    """Shapes of what a compiled forward pass computes and leaves for the backward pass, small tensors aside."""
    saved: list[tuple[int, ...]] = []

    def forward(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        (kept,) = next(iter(gm.graph.find_nodes(op="output"))).args
        shapes = (tuple(n.meta["val"].shape) for n in kept[1:] if n.op != "placeholder")
        saved.extend(shape for shape in shapes if len(shape) > 1 and math.prod(shape) >= 512)
        return make_boxed_func(gm.forward)

    partitioned = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda gm, inputs: make_boxed_func(gm.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: partitioned(gm, inputs))
    torch._dynamo.reset()
    backend = partitioned if backend is aot_autograd else backend
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False, **options)
    compiled(torch.randn(2, 64, 8)).sum().backward()
    return saved


def test_a_lowered_checkpoint_still_saves_nothing_but_what_enters_it(monkeypatch: pytest.MonkeyPatch) -> None:
    counters.clear()
    options = {"options": {"policy": "always", "block_size": 8}}
    between = [(2, 64, 8)] * 2  # what enters the first layer is the input
    assert _saved(Layers(checkpointed=True), aot_autograd, monkeypatch) == between
    assert _saved(Layers(checkpointed=True), monarch, monkeypatch, **options) == between
    assert counters["monarch"] == {"lowered": 3, "exact": 0}
    assert len(_saved(Layers(checkpointed=False), monarch, monkeypatch, **options)) > 10


def test_checkpoints_are_part_of_the_key_of_compile_caches() -> None:
    """AOTAutograd's cache sees the nodes, not the marks on them."""
    keys = []
    for checkpointed in (True, True, False):
        _, (result,) = run_passes(Layers(checkpointed), torch.randn(2, 16, 8))
        keys.append(_checkpoints(result.after))
    assert keys[0] == keys[1] != ""
    assert keys[2] == ""


def test_what_feeds_a_lowered_site_belongs_to_its_checkpoint() -> None:
    _, (result,) = run_passes(_spelled_in_checkpoint, *make_inputs()[:3])
    (first, second) = (n for n in result.after.graph.nodes if n.target is ATTENTION_OP)
    assert first.meta["recompute"] == CheckpointPolicy.PREFER_RECOMPUTE
    assert all("recompute" in n.meta for n in first.all_input_nodes if n.op == "call_function")
    assert "recompute" not in second.meta


def test_the_captured_graph_of_dynamo_is_left_alone() -> None:
    """A graph in which nothing is lowered is compiled as Dynamo made it."""
    seen = []

    def metadata(gm: torch.fx.GraphModule) -> list[list[str]]:
        bodies = [getattr(gm, n.target) for n in gm.graph.find_nodes(op="get_attr")]
        return [[*n.meta] for body in bodies for n in body.graph.nodes]

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        before = metadata(gm)
        rewrite(gm, example_inputs, MonarchConfig(policy="always"))
        seen.append((before, metadata(gm)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(_checkpointed, backend=backend, fullgraph=True)(*make_inputs()[:3])
    ((before, after),) = seen
    assert before
    assert before == after
