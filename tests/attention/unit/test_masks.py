"""What a mask is proved to be, op by op."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
import torch.nn.functional as F
from support.capture import run_passes
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from monarch_compile.passes.elements.rules import Evaluator
from monarch_compile.passes.elements.views import _regroup

N = 6
SLOPES = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
INF = float("inf")
LOW = torch.finfo(torch.float32).min


def _kind(make_mask: object) -> tuple[str, str, Tensor, Tensor]:
    """(status, code, lowered output, exact output) of an attention under `make_mask(visible, tokens)`."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, N, 4)
    visible = torch.tensor([[True, True, False, True, False, False], [True] * N])
    tokens = visible.long() * 7

    def fn(q: Tensor, visible: Tensor, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=make_mask(visible, tokens))

    output, (result,) = run_passes(fn, q, visible, tokens)
    (decision,) = result.decisions
    return decision.status, decision.code, output, fn(q, visible, tokens)


KEY_PADDING = {
    "bool": lambda m, t: m[:, None, None, :],
    "expanded": lambda m, t: m[:, None, None, :].expand(2, 3, N, N),
    "from_tokens": lambda m, t: (t != 0)[:, None, None, :],
    "to_bool": lambda m, t: t.to(torch.bool).view(2, 1, 1, N),
    "greater": lambda m, t: t.gt(0).unsqueeze(1).unsqueeze(1),
    "lengths": lambda m, t: (torch.arange(N)[None] < m.sum(1)[:, None])[:, None, None, :],
    "and_or": lambda m, t: (m & (m | (t > 3)))[:, None, None, :],
    "not_not": lambda m, t: ~(~m)[:, None, None, :],
    "ones_and": lambda m, t: torch.ones(1, 1, N, N, dtype=torch.bool) & m[:, None, None, :],
    "gathered": lambda m, t: (
        m[torch.arange(2)[:, None, None, None], torch.arange(N)[None, None, None, :]]
        & (torch.arange(N)[None, None, :, None] >= 0)
    ),
    "float_low": lambda m, t: torch.zeros(2, 1, N, N).masked_fill(~m[:, None, None, :], LOW),
    "float_inf": lambda m, t: torch.where(m, 0.0, float("-inf"))[:, None, None, :].expand(2, 1, N, N),
    "float_product": lambda m, t: (1.0 - m.float())[:, None, None, :] * LOW,
    "inverted_fill": lambda m, t: (1.0 - m.float())[:, None, None, :].masked_fill(
        (1.0 - m.float())[:, None, None, :].to(torch.bool), LOW
    ),
    "inverted_int_fill": lambda m, t: (1.0 - t.float())[:, None, None, :].masked_fill(
        (1.0 - t.float())[:, None, None, :].to(torch.bool), LOW
    ),
}


@pytest.mark.parametrize("name", KEY_PADDING)
def test_key_padding_is_proved_and_lowered(name: str) -> None:
    status, code, output, exact = _kind(KEY_PADDING[name])
    assert (status, code) == ("lowered", "lowered")
    if name != "inverted_int_fill":
        torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)


NOTHING_HIDDEN = {
    "all_true": lambda m, t: torch.ones(1, 1, N, N, dtype=torch.bool),
    "all_zero": lambda m, t: torch.zeros(2, 1, N, N),
    "one_group": lambda m, t: (lambda ids: (ids[:, :, None] == ids[:, None])[:, None])(
        _groups(torch.arange(3, 3 + N).expand(2, N))
    ),
    "equal_steps": lambda m, t: (torch.arange(0, 2 * N + 2, 2).diff() == 2)[None, None, None],
    "non_negative": lambda m, t: (torch.arange(N) >= 0)[None, None, None, :],
}


@pytest.mark.parametrize("name", NOTHING_HIDDEN)
def test_an_empty_mask_is_dropped(name: str) -> None:
    status, code, output, exact = _kind(NOTHING_HIDDEN[name])
    assert (status, code) == ("lowered", "lowered")
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)


BIASES = {
    "weak": lambda m, t: torch.zeros(2, 1, 1, N).masked_fill(~m[:, None, None, :], -5.0),
    "ramp": lambda m, t: torch.arange(N).float().view(1, 1, 1, N) * 0.5,
    "unknown": lambda m, t: t.float()[:, None, None, :] * 0.1,
    "unknown_or_hidden": lambda m, t: torch.where(m, t.float(), -INF)[:, None, None, :],
    "lowest": lambda m, t: torch.where(m, t * 0.3, torch.finfo(torch.float32).min)[:, None, None, :],
    "in_double": lambda m, t: (t.double() * 0.1)[:, None, None, :].float(),
    "expanded": lambda m, t: (t * 0.1)[:, None, None, :].expand(2, 3, N, N),
}


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_of_the_keys_is_lowered(name: str) -> None:
    status, code, output, exact = _kind(BIASES[name])
    assert (status, code) == ("lowered", "lowered")
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)


REFUSED = {
    "tril": (lambda m, t: torch.ones(N, N, dtype=torch.bool).tril(), "mask_causal"),
    "triu_float": (lambda m, t: torch.full((N, N), float("-inf")).triu(1), "mask_causal"),
    "compare": (lambda m, t: torch.arange(N)[None] <= torch.arange(N)[:, None], "mask_causal"),
    "window": (lambda m, t: (torch.arange(N)[:, None] - torch.arange(N)[None]) < 2, "mask_sliding_window"),
    "two_sided": (lambda m, t: (torch.arange(N)[:, None] - torch.arange(N)[None]).abs() < 2, "mask_sliding_window"),
    "packed": (lambda m, t: (t[:, :, None] == t[:, None, :])[:, None], "mask_packed"),
    "per_head": (lambda m, t: torch.stack([m, m, ~m], 1)[:, :, None, :], "mask_general"),
    "half_index": (
        lambda m, t: torch.arange(N).to(torch.bfloat16)[None] <= torch.arange(N).to(torch.bfloat16)[:, None],
        "mask_general",
    ),
    "negative_index": (lambda m, t: torch.arange(N)[torch.arange(N) - 1] <= torch.arange(N)[:, None], "mask_general"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_key_padding_stays_exact(name: str) -> None:
    make_mask, expected = REFUSED[name]
    status, code, output, exact = _kind(make_mask)
    assert (status, code) == ("exact", expected)
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5, equal_nan=True)


def _groups(positions: Tensor) -> Tensor:
    """A number for each packed sequence: one more wherever the positions do not go up by one."""
    steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _apart(t: Tensor, positions: Tensor) -> Tensor:
    """Causal, and packed sequences apart."""
    groups, (q, k) = _groups(positions), _places(t)
    return ((groups[:, :, None] == groups[:, None, :]) & (k <= q))[:, None]


def _places(t: Tensor) -> tuple[Tensor, Tensor]:
    """Places of queries and keys, made in the graph from the tokens' length."""
    place = torch.arange(t.shape[1])
    return place[:, None], place[None]


CLASSES = {
    "causal": {
        "strict": lambda m, t: _places(t)[1] < _places(t)[0],
        "added": lambda m, t: torch.where(_places(t)[1] > _places(t)[0], -INF, 0.0),
        "nothing_is_packed": lambda m, t: _apart(t, torch.arange(N).expand(2, N)),
        "counted_places": lambda m, t: (lambda c: c[None] <= c[:, None])(torch.ones(N, dtype=torch.long).cumsum(0)),
        "and_padding": lambda m, t: (_places(t)[1] <= _places(t)[0]) & m[:, None, None, :],
        "scaled_bool": lambda m, t: (_places(t)[1] > _places(t)[0]).float() * LOW,
    },
    "sliding_window": {
        "causal": lambda m, t: (_places(t)[1] <= _places(t)[0]) & (_places(t)[0] - _places(t)[1] < 3),
        "two_sided": lambda m, t: (_places(t)[0] - _places(t)[1]).abs() <= 2,
        "and_padding": lambda m, t: ((_places(t)[0] - _places(t)[1]).abs() <= 2) & m[:, None, None, :],
        "look_ahead": lambda m, t: _places(t)[1] <= _places(t)[0] + 2,
    },
    "prefix_causal": {
        "number": lambda m, t: (_places(t)[1] <= _places(t)[0]) | (_places(t)[1] < 3),
        "per_sequence": lambda m, t: (
            (_places(t)[1] <= _places(t)[0])[None, None] | (_places(t)[1] < m.sum(1)[:, None])[:, None, None]
        ),
        "and_padding": lambda m, t: ((_places(t)[1] <= _places(t)[0]) | (_places(t)[1] < 3)) & m[:, None, None, :],
    },
    "packed": {
        "ids": lambda m, t: (t[:, :, None] == t[:, None, :])[:, None],
        "counted": lambda m, t: (lambda ids: (ids[:, :, None] == ids[:, None, :])[:, None])(t.cumsum(1)),
        "by_positions": lambda m, t: _apart(t, t),
        "by_positions_two_a_place": lambda m, t: _apart(t, (torch.arange(N) // 2).expand(2, N)),
        "by_second_steps": lambda m, t: (lambda ids: (ids[:, None] == ids[None]) & (_places(t)[1] <= _places(t)[0]))(
            (torch.arange(N).diff(n=2, prepend=torch.tensor([0, 5])) != 0).cumsum(0)
        ),
        "not_equal": lambda m, t: ~(t[:, :, None] != t[:, None, :])[:, None],
        "unequal": lambda m, t: _places(t)[0] // 5 == _places(t)[1] // 5,
        "and_causal": lambda m, t: (
            (t[:, :, None] == t[:, None, :])[:, None] & (_places(t)[1] <= _places(t)[0])[None, None]
        ),
    },
    "split_bias": {
        "causal_alibi": lambda m, t: torch.where(
            _places(t)[1] <= _places(t)[0], SLOPES * (_places(t)[1] - _places(t)[0]), -INF
        ),
        "per_head": lambda m, t: SLOPES * _places(t)[1],
    },
    "bias": {"distance": lambda m, t: (_places(t)[0] - _places(t)[1]).abs() * -0.5},
    "opaque": {
        "relative": lambda m, t: torch.linspace(0, 1, N)[(_places(t)[0] - _places(t)[1]).abs()],
        "symmetric_alibi": lambda m, t: SLOPES * -(_places(t)[0] - _places(t)[1]).abs(),
    },
    "general": {
        "dilated": lambda m, t: (_places(t)[0] - _places(t)[1]) % 2 == 0,
        "either": lambda m, t: m[:, None, :, None] | m[:, None, None, :],
        "head": lambda m, t: (_places(t)[1] <= _places(t)[0])[None] | (torch.arange(3) == 1)[:, None, None],
        "of_products": lambda m, t: (t[:, :, None] * t[:, None, :] > 0)[:, None],
        "other_ids": lambda m, t: (t[:, :, None] == t.roll(1, 1)[:, None, :])[:, None],
        "xor": lambda m, t: (_places(t)[1] <= _places(t)[0]) != (_places(t)[1] < 3),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, masks in CLASSES.items() for name in masks])
def test_classes(kind: str, name: str) -> None:
    status, code, output, exact = _kind(CLASSES[kind][name])
    assert (status, code) == ("exact", f"mask_{kind}")
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", ["causal", "sliding_window", "prefix_causal", "packed"])
def test_classes_with_a_symbolic_length(kind: str) -> None:
    make_mask = next(iter(CLASSES[kind].values()))
    q, visible = torch.randn(2, 3, N, 4), torch.ones(2, N, dtype=torch.bool)

    def fn(q: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=make_mask(visible, visible.long()))

    for tensor in (q, visible):
        torch._dynamo.mark_dynamic(tensor, tensor.ndim - (2 if tensor is q else 1))
    _, (result,) = run_passes(fn, q, visible)
    assert [d.code for d in result.decisions] == [f"mask_{kind}"]
    assert not isinstance(result.decisions[0].q_shape[2], int)


@pytest.mark.parametrize(
    ("before", "after"), [([2, 3, 4], [24]), ([24], [4, 6]), ([6, 4], [2, 3, 4]), ([4, 6], [6, 4]), ([2, 9], [3, 6])]
)
def test_reshapes_count_alike(before: list[int], after: list[int]) -> None:
    """The symbolic index into the source of a reshape is the true one, at every place."""
    symbols = sympy.symbols(f"x:{len(after)}", integer=True, nonnegative=True)
    found = _regroup(before, list(zip(after, symbols, strict=True)))
    count = torch.arange(math.prod(after))
    places = torch.stack(torch.unravel_index(count, after), 1).tolist()
    sources = torch.stack(torch.unravel_index(count, before), 1).tolist()
    for place, source in zip(places, sources, strict=True):
        assert [int(e.subs(dict(zip(symbols, place, strict=True)))) for e in found] == source


SUMS = {
    "differences": lambda x: x.diff(),
    "from_before": lambda x: x.diff(prepend=x[:1] - 1),
    "from_a_number": lambda x: x.diff(prepend=torch.full((1,), 7)),
    "of_products": lambda x: (x * 3 + 2).diff(dim=0, prepend=x[:1]),
    "sums": lambda x: (x * 0 + 4).cumsum(0),
    "sums_of_differences": lambda x: (x * 5).diff().cumsum(-1),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_differences_are_known_at_every_place(name: str) -> None:
    traced = make_fx(lambda: SUMS[name](torch.arange(N)), pre_dispatch=True)()
    (node,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes
    place = sympy.Symbol("q", integer=True, nonnegative=True)
    element = Evaluator().value(node, (place,))
    assert [int(element.subs(place, i)) for i in range(len(traced()))] == traced().tolist()


UNKNOWN_SUMS = {
    "of_places": lambda x: x.cumsum(0),
    "of_a_first": lambda x: (x == 0).cumsum(0),
    "twice": lambda x: x.diff(n=2),
    "two_before": lambda x: x.diff(prepend=x[:2]),
    "one_after": lambda x: x.diff(append=x[:1]),
    "of_bools": lambda x: (x > 2).diff(),
    "in_bytes": lambda x: (x * 0 + 4).cumsum(0, dtype=torch.int8),
}


@pytest.mark.parametrize("name", UNKNOWN_SUMS)
def test_other_sums_and_differences_are_unknown(name: str) -> None:
    traced = make_fx(lambda: UNKNOWN_SUMS[name](torch.arange(N)), pre_dispatch=True)()
    (node,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes
    assert Evaluator().value(node, (sympy.Symbol("q", integer=True, nonnegative=True),)).has(AppliedUndef)
