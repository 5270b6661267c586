"""Ops that move elements: which element of the input is the output's, as a rule a op."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from monarch_compile.passes.elements.holding import EXACT_CASTS, is_held
from monarch_compile.passes.elements.values import Index, Rule, as_number, broadcast
from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, normal_dim, shape_of

if TYPE_CHECKING:
    from monarch_compile.passes.elements.rules import Evaluator


def _rule_arange(e: Evaluator, n: Node, i: Index) -> Any:
    start = inputs(n)[0] if n.target is not aten.arange.default else 0
    step = arg(n, 2, "step", 1) if n.target is aten.arange.start_step else 1
    if not isinstance(start, int) or not isinstance(step, int) or dtype_of(n) not in EXACT_CASTS:
        return None
    value = sympy.sympify(start + step * i[0])
    return value if is_held(value, dtype_of(n)) else None


def _rule_expand(e: Evaluator, n: Node, i: Index) -> Any:
    return e.operand(n, 0, i)


def _rule_unsqueeze(e: Evaluator, n: Node, i: Index) -> Any:
    dim = normal_dim(inputs(n)[1], len(i))
    return e.value(inputs(n)[0], i[:dim] + i[dim + 1 :])


def _rule_transpose(e: Evaluator, n: Node, i: Index) -> Any:
    order = list(i)
    x, y = (normal_dim(d, len(i)) for d in inputs(n)[1:3])
    order[x], order[y] = order[y], order[x]
    return e.value(inputs(n)[0], tuple(order))


def _rule_permute(e: Evaluator, n: Node, i: Index) -> Any:
    order: list[Any] = [None] * len(i)
    for place, dim in enumerate(inputs(n)[1]):
        order[normal_dim(dim, len(i))] = i[place]
    return e.value(inputs(n)[0], tuple(order))


def _rule_select(e: Evaluator, n: Node, i: Index) -> Any:
    rank = len(shape_of(inputs(n)[0]))
    dim, at = normal_dim(inputs(n)[1], rank), inputs(n)[2]
    if not isinstance(at, int) or at < 0:
        return None
    return e.value(inputs(n)[0], (*i[:dim], sympy.Integer(at), *i[dim:]))


def _rule_slice(e: Evaluator, n: Node, i: Index) -> Any:
    dim = normal_dim(arg(n, 1, "dim", 0), len(i))
    start, step = arg(n, 2, "start") or 0, arg(n, 4, "step", 1)
    if not isinstance(start, int) or start < 0 or not isinstance(step, int):
        return None
    return e.value(inputs(n)[0], (*i[:dim], start + step * i[dim], *i[dim + 1 :]))


def _rule_reshape(e: Evaluator, n: Node, i: Index) -> Any:
    """A reshape, with those before it: dims of size 1 come and go, dims of known sizes are merged and split."""
    source = inputs(n)[0]
    while source.target in (aten.reshape.default, aten.view.default):
        source = inputs(source)[0]
    before = [size for size in shape_of(source) if not (isinstance(size, int) and size == 1)]
    kept = [(size, at) for size, at in zip(shape_of(n), i, strict=True) if not (isinstance(size, int) and size == 1)]
    given = _regroup(before, kept)
    if given is None:
        return None
    places = iter(given)
    return e.value(
        source,
        tuple(sympy.Integer(0) if isinstance(s, int) and s == 1 else next(places) for s in shape_of(source)),
    )


def _regroup(before: list[Any], after: list[tuple[Any, Any]]) -> list[Any] | None:
    """The index into dims `before`, of `after`'s (size, index) pairs: groups of dims with equal products correspond."""
    found: list[Any] = []
    after = list(after)
    while before:
        if not after:
            return None
        own, given = [before[0]], [after[0]]
        while str(math.prod(own)) != str(math.prod(size for size, _ in given)):
            if not all(isinstance(size, int) for size in (*own, *(size for size, _ in given))):
                return None
            short_own = math.prod(own) < math.prod(size for size, _ in given)
            if len(before) == len(own) if short_own else len(after) == len(given):
                return None
            if short_own:
                own.append(before[len(own)])
            else:
                given.append(after[len(given)])
        before, after = before[len(own) :], after[len(given) :]
        found += _digits(own, given)
    return found if not after else None


def _digits(own: list[Any], given: list[tuple[Any, Any]]) -> list[Any]:
    """The place in a group of dims, as digits of the one number that both groups count."""
    if len(own) == len(given) == 1:
        return [given[0][1]]
    flat: Any = sympy.Integer(0)
    for size, at in given:
        flat = flat * size + at
    digits = []
    for place in range(len(own)):
        digit = sympy.floor(flat / math.prod(own[place + 1 :]))
        digits.append(digit if place == 0 else sympy.Mod(digit, own[place]))
    return digits


def _rule_index(e: Evaluator, n: Node, i: Index) -> Any:
    """Gather with an index tensor for every dim. A negative index wraps, so one that may be is not followed."""
    source, indices = inputs(n)[0], inputs(n)[1]
    if len(indices) != len(shape_of(source)) or any(
        not isinstance(x, Node) or dtype_of(x) == torch.bool for x in indices
    ):
        return None
    at = tuple(as_number(e.value(x, broadcast(x, i))) for x in indices)
    return e.value(source, at) if all(a.is_nonnegative for a in at) else e.opaque(n, at)


def _rule_repeat(e: Evaluator, n: Node, i: Index) -> Any:
    """A repeat along dims of size 1 only: an expand."""
    rank = len(shape_of(inputs(n)[0]))
    sizes = (*(1,) * (len(i) - rank), *shape_of(inputs(n)[0]))
    kept = all(isinstance(s, int) and (s == 1 or r == 1) for s, r in zip(sizes, inputs(n)[1], strict=True))
    return e.operand(n, 0, i) if kept else None


def _rule_repeat_each(e: Evaluator, n: Node, i: Index) -> Any:
    """repeat_interleave by a constant."""
    times, dim = inputs(n)[1], arg(n, 2, "dim", 0 if len(shape_of(inputs(n)[0])) == 1 else None)
    if not isinstance(times, int) or times < 1 or dim is None:
        return None
    dim = normal_dim(dim, len(i))
    return e.value(inputs(n)[0], (*i[:dim], sympy.floor(i[dim] / times), *i[dim + 1 :]))


VIEW_RULES: dict[object, Rule] = {
    aten.arange.default: _rule_arange,
    aten.arange.start: _rule_arange,
    aten.arange.start_step: _rule_arange,
    **dict.fromkeys((aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), _rule_expand),
    aten.repeat.default: _rule_repeat,
    aten.repeat_interleave.self_int: _rule_repeat_each,
    aten.unsqueeze.default: _rule_unsqueeze,
    aten.transpose.int: _rule_transpose,
    aten.permute.default: _rule_permute,
    aten.select.int: _rule_select,
    aten.slice.Tensor: _rule_slice,
    aten.reshape.default: _rule_reshape,
    aten.view.default: _rule_reshape,
    aten.squeeze.dim: _rule_reshape,
    aten.index.Tensor: _rule_index,
}
