"""Bodies of cond, scan and while_loop: what is known where they are called counts in them, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from support.soundness import make_inputs
from support.versions import writes_in_bodies
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from monarch_compile.attention.op import ATTENTION_OP
from monarch_compile.passes.capture.enclosed import all_graphs, name_of
from monarch_compile.passes.graph import value_of
from monarch_compile.passes.pipeline import Rewrite

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
attend = F.scaled_dot_product_attention
N = 7


def key_mask(m: Tensor) -> Tensor:
    """(batch, 1, N, N), made of m (batch, N): a matrix that is seen to hang on the key alone only where it is made."""
    return m[:, None, None, :].expand(-1, -1, N, -1).clone()


def causal() -> Tensor:
    return torch.arange(N)[:, None] >= torch.arange(N)


def either(q: Tensor, then: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = torch.cond(q.sum() > 0, then, other, (q,))
    return result


def steps(q: Tensor, step: Callable[[Tensor, Tensor], Tensor], xs: Tensor) -> Tensor:
    carry: Tensor = scan(lambda c, x: (step(c, x), c * 1), q, xs)[0]
    return carry


def twice(q: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    given = (torch.tensor(0), q * 1)
    result: Tensor = while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, step(x)), given)[1]
    return result


# ---- lowered ---------------------------------------------------------------------------------------------------------


def _both_branches(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return either(q, lambda q: attend(q, k, v), lambda q: torch.softmax(k @ q.mT * 0.3, -1) @ v)


def _mask_of_a_branch(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    visible = key_mask(m)
    return either(q, lambda q: attend(q, k, v, visible), lambda q: attend(k, q, v, visible))


def _mask_of_a_scan(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    visible = key_mask(m)
    return steps(q, lambda c, x: attend(c, k, v, visible) + x, torch.stack([q, k]))


def _mask_of_a_loop(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    visible = key_mask(m)
    return twice(q, lambda x: attend(x, k, v, visible))


def _mask_from_two_bodies_out(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    visible = key_mask(m)

    def step(c: Tensor, x: Tensor) -> Tensor:
        return either(x, lambda x: attend(c, x, v, visible), lambda x: c * 2)

    return steps(q, step, torch.stack([q, k]))


def _bias_of_a_scan(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    bias = torch.zeros(N, N).masked_fill(~(torch.arange(N) < 5), float("-inf"))
    return steps(q, lambda c, x: torch.softmax(c @ k.mT * 0.3 + bias, -1) @ v + x, torch.stack([q, k]))


def _nothing_hidden(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    visible = torch.ones(N, N, dtype=torch.bool)
    return steps(q, lambda c, x: attend(c, k, v, visible) + x, torch.stack([q, k]))


def _mask_filled_before(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    visible = torch.ones(2, 1, N, N, dtype=torch.bool)
    visible.masked_fill_(~m[:, None, None, :], False)
    return either(q, lambda q: attend(q, k, v, visible), lambda q: q * 2)


def _scale_from_outside(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scale = torch.tensor(4.0).rsqrt()
    return either(q, lambda q: torch.softmax(q @ k.mT * scale, -1) @ v, lambda q: q * 2)


def _key_mask_scanned(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    masks = torch.stack([m, m.roll(1, -1)])[:, :, None, None, :]
    return steps(q, lambda c, x: attend(c, k, v, x), masks)


def _key_mask_carried(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """All is visible in the first step, and not in the second."""
    given = (torch.tensor(0), q * 1, torch.ones(2, 1, 1, N, dtype=torch.bool))

    def step(i: Tensor, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return i + 1, attend(x, k, v, visible), visible & m[:, None, None, :]

    result: Tensor = while_loop(lambda i, x, visible: i < 2, step, given)[1]
    return result


def _checkpoint_in_a_branch(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return either(q, lambda q: checkpoint(attend, q, k, v, use_reentrant=False), lambda q: q * 2)


def _writes_to_its_own(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    def step(c: Tensor, x: Tensor) -> Tensor:
        scores = c @ k.mT
        scores.masked_fill_(~m[:, None, None, :], float("-inf"))
        return torch.softmax(scores, -1) @ v + x

    return steps(q, step, torch.stack([q, k]))


LOWERED: dict[Program, tuple[int, str]] = {
    _both_branches: (2, "none"),
    _mask_of_a_branch: (2, "key_padding"),
    _mask_of_a_scan: (1, "key_padding"),
    _mask_of_a_loop: (1, "key_padding"),
    _mask_from_two_bodies_out: (1, "key_padding"),
    _bias_of_a_scan: (1, "key_padding"),
    _nothing_hidden: (1, "none"),
    _mask_filled_before: (1, "key_padding"),
    _scale_from_outside: (1, "none"),
    _key_mask_scanned: (1, "key_padding"),
    _key_mask_carried: (1, "key_padding"),
    _checkpoint_in_a_branch: (1, "none"),
    _writes_to_its_own: (1, "key_padding"),
}


def ran(fn: Program, *, positive: bool = True) -> Rewrite:
    """The passes' result; what was rewritten gives eager's numbers."""
    q, k, v, m = make_inputs()
    given = (q.abs() if positive else -q.abs(), k, v, m)
    expected = fn(*(t.clone() for t in given))
    output, (result,) = run_passes(fn, *(t.clone() for t in given))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    return result


def ops(gm: GraphModule) -> list[int]:
    """How many sites are lowered in the graph, and in each of its bodies."""
    return [len(inner.graph.find_nodes(op="call_function", target=ATTENTION_OP)) for inner in all_graphs(gm)]


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("fn", LOWERED, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore")
def test_attention_in_a_body_is_lowered(fn: Program, positive: bool) -> None:
    result = ran(fn, positive=positive)
    number, mask = LOWERED[fn]
    assert [(d.code, d.mask) for d in result.decisions] == [("lowered", mask)] * number
    before, after = ops(result.before), ops(result.after)
    assert sum(before) == after[0] == 0
    assert sum(after) == number


# ---- exact -----------------------------------------------------------------------------------------------------------


def _mask_scanned(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    masks = torch.stack([key_mask(m), key_mask(m.roll(1, -1))])
    return steps(q, lambda c, x: attend(c, k, v, x), masks)


def _mask_carried(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """A key mask in the first step; in the second, one more key is hidden from one query."""
    given = (torch.tensor(0), q * 1, key_mask(m))
    corner = (torch.arange(N)[:, None] == 3) & (torch.arange(N) == 2)

    def step(i: Tensor, x: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return i + 1, attend(x, k, v, visible), visible & ~corner

    result: Tensor = while_loop(lambda i, x, visible: i < 2, step, given)[1]
    return result


def _causal_inside(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return either(q, lambda q: attend(q, k, v, is_causal=True), lambda q: attend(q, k, v, causal()))


def _causal_outside(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    mask = causal()
    return steps(q, lambda c, x: attend(c, k, v, mask) + x, torch.stack([q, k]))


def _mask_written_between(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    visible = torch.ones(N, N, dtype=torch.bool)
    flat = visible.view(N * N)
    flat[1:3].fill_(False)
    return either(q, lambda q: attend(q, k, v, visible), lambda q: q * 2)


def _mask_written_by_a_branch(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """A branch that is taken hides keys from the attention behind it."""
    visible = torch.ones(N, N, dtype=torch.bool)
    x = either(q, lambda q: visible.triu_().float().mean() * q, lambda q: q * 2)
    return attend(x, k, v, visible)


def _mask_written_in_a_branch_of_a_step(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """A step's mask is another one after the step: it is written to."""
    visible = torch.ones(N, N, dtype=torch.bool)

    def step(x: Tensor) -> Tensor:
        y = attend(x, k, v, visible)
        visible.triu_()
        return y

    return twice(q, step)


def _tanh_inside(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return either(q, lambda q: torch.softmax(20 * torch.tanh(q @ k.mT / 20), -1) @ v, lambda q: q * 2)


def _written_input(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q = q * 1
    return either(q, lambda q: attend(q.mul_(2), k, v), lambda q: q * 2) + q


EXACT: dict[Program, list[str]] = {
    _mask_scanned: ["mask_general"],
    _mask_carried: ["mask_general"],
    _causal_inside: ["mask_causal", "mask_causal"],
    _causal_outside: ["mask_causal"],
    _mask_written_between: ["mutation"],
    _mask_written_by_a_branch: ["mutation"],
    _mask_written_in_a_branch_of_a_step: ["in_body"],
    _tanh_inside: ["softcap"],
    _written_input: ["in_body"],
}


WRITES = {_mask_written_by_a_branch, _mask_written_in_a_branch_of_a_step, _written_input}


def exact_programs() -> Iterator[Any]:
    for fn in EXACT:
        yield pytest.param(fn, id=fn.__name__.strip("_"), marks=[writes_in_bodies] if fn in WRITES else [])


@pytest.mark.parametrize("fn", exact_programs())
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_attention_in_a_body_stays_exact_for_a_reason(fn: Program) -> None:
    result = ran(fn)
    assert [d.code for d in result.decisions] == EXACT[fn]
    assert sum(ops(result.after)) == 0


@writes_in_bodies
@torch.no_grad()
def test_a_body_that_writes_to_its_inputs_says_so() -> None:
    (decision,) = ran(_written_input).decisions
    assert decision.reason == "it stands in the body of a branch of cond, which writes to what it is given"


@writes_in_bodies
def test_a_call_that_only_writes_is_kept() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        kept = k * 1
        either(q, lambda q: kept.mul_(2).sum(), lambda q: q.sum())
        return attend(q, kept, v)

    with torch.no_grad():
        assert [d.code for d in ran(fn).decisions] == ["mutation"]


@pytest.mark.parametrize("fn", [_both_branches, _mask_of_a_scan, _mask_of_a_loop], ids=lambda f: f.__name__.strip("_"))
def test_a_body_that_is_differentiated_stays_exact(fn: Program) -> None:
    q, k, v, m = make_inputs()
    _, (result,) = run_passes(fn, q.requires_grad_(), k, v, m)
    assert {d.code for d in result.decisions} == {"in_body"}
    assert all("in training" in d.reason for d in result.decisions)
    with torch.no_grad():
        _, (result,) = run_passes(fn, q, k, v, m)
    assert {d.code for d in result.decisions} == {"lowered"}


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "places", "paths"),
    [
        (
            _mask_of_a_branch,
            ["in the true branch of cond", "in the false branch of cond"],
            ["true_graph_0", "false_graph_0"],
        ),
        (_mask_of_a_scan, ["in a step of scan"], ["scan_combine_graph_0"]),
        (_mask_of_a_loop, ["in a step of while_loop"], ["while_loop_body_graph_0"]),
        (
            _mask_from_two_bodies_out,
            ["in the true branch of cond in a step of scan"],
            ["scan_combine_graph_0/true_graph_0"],
        ),
        (_causal_outside, ["in a step of scan"], ["scan_combine_graph_0"]),
        (_tanh_inside, ["in the true branch of cond"], ["true_graph_0"]),
    ],
    ids=lambda x: x.__name__.strip("_") if callable(x) else None,
)
def test_a_site_is_named_with_its_body(fn: Program, places: list[str], paths: list[str]) -> None:
    decisions = ran(fn).decisions
    for decision, place, path in zip(decisions, places, paths, strict=True):
        assert decision.name.endswith(place)
        assert decision.name.startswith("test_enclosed.py:")
        assert decision.node.rpartition("/")[0] == path


def test_inputs_of_one_name_are_not_taken_for_one_another() -> None:
    """The mask outside and the one that is scanned are both called arg1_1, each in its graph."""

    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        first = q * 1
        rows = m[:, None, None, :]
        return steps(first, lambda c, x: attend(c, k, v, rows | ~x[:, None, None, :]), torch.stack([m, m.roll(1, -1)]))

    result = ran(fn)
    assert [(d.code, d.mask) for d in result.decisions] == [("lowered", "key_padding")]
    outside, inside = all_graphs(result.before)
    (scanned,) = (n for n in inside.graph.nodes if n.op == "placeholder" and n.meta["val"].shape == (2, N))
    assert scanned.name == "arg1_1" == next(n.name for n in outside.graph.nodes if value_of(n).shape == (2, N))


def test_no_two_nodes_have_one_name() -> None:
    graphs = list(all_graphs(ran(_mask_from_two_bodies_out).after))
    names = [name_of(node) for gm in graphs for node in gm.graph.nodes]
    assert len(graphs) == 4
    assert len(set(names)) == len(names)
    assert len({node.name for gm in graphs for node in gm.graph.nodes}) < len(names)
