"""What kind of mask is this? Proved by evaluating the mask's nodes as functions of (b, h, q, k) in sympy.

Evaluation is by demand: `value(node, index)` is the node's element at a symbolic index. An op that is not understood is
an opaque function of its index, which is sound: only what the expression provably does not depend on is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from monarch_compile.passes.attention import DROPPED, constant_of
from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, normal_dim, shape_of
from monarch_compile.passes.region import MaskTerm

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
Index = tuple[Any, ...]
MAX_CONDITIONS = 6


@dataclass(frozen=True)
class MaskFact:
    """What was proved of a mask: kind "none", "key_padding", or a kind that is refused, with why and where."""

    kind: str
    reason: str
    node: Node


def classify(term: MaskTerm) -> MaskFact:
    """Prove what `term` hides. Kinds: none, key_padding, causal, sliding_window, general, bias, opaque."""
    index = {4: (B, H, Q, K), 3: (B, Q, K), 2: (Q, K)}.get(term.score_rank)
    if index is None:
        return MaskFact("general", f"the mask is added to scores of rank {term.score_rank}", term.node)
    expression = _Evaluator().value(term.node, _broadcast(term.node, index))
    if term.role == "add":
        return _classify_added(term, expression)
    keep = _as_bool(expression)
    return _classify_keep(term.node, sympy.Not(keep) if term.role == "drop" else keep)


def _classify_added(term: MaskTerm, expression: Any) -> MaskFact:
    expression = _as_number(expression)
    if expression == 0:
        return MaskFact("none", "the added mask is zero everywhere", term.node)
    unproved = _not_binary(expression, term.gain)
    if unproved is not None:
        if not expression.free_symbols & {Q, H} and not expression.has(sympy.Function):
            return MaskFact("bias", "a bias on the keys is added to the scores", term.node)
        kind = "opaque" if unproved == "opaque" else "bias"
        why = (
            "the mask is an added float tensor that cannot be proved to hold only 0 and large negative values; "
            "pass it as a bool mask"
            if kind == "opaque"
            else "a bias is added to the scores, which a Monarch matrix cannot hold"
        )
        return MaskFact(kind, why, term.node)
    return _classify_keep(term.node, _where_zero(expression))


def _classify_keep(node: Node, keep: Any) -> MaskFact:
    if keep == sympy.true:
        return MaskFact("none", "the mask hides nothing", node)
    free = keep.free_symbols
    if not free & {Q, H}:
        return MaskFact("key_padding", "the mask depends on the key alone", node)
    kinds = {_conjunct_kind(part) for part in sympy.And.make_args(keep)} - {"key_padding"}
    for kind, wording in REFUSED_KINDS.items():
        if kind in kinds:
            return MaskFact(kind, wording, node)
    return MaskFact("general", REFUSED_KINDS["general"], node)


REFUSED_KINDS = {
    "general": "the mask depends on the query, and not only through a causal triangle or a window",
    "sliding_window": "a sliding-window mask: a block-sparse exact kernel such as FlexAttention suits it better",
    "causal": "a causal mask, which is not lowered yet",
}


def _conjunct_kind(part: Any) -> str:
    if not part.free_symbols & {Q, H}:
        return "key_padding"
    if (
        isinstance(part, sympy.core.relational.Relational)
        and not part.has(sympy.Function)
        and H not in part.free_symbols
    ):
        slope = sympy.diff(part.lhs - part.rhs, Q), sympy.diff(part.lhs - part.rhs, K)
        below = isinstance(part, (sympy.Le, sympy.Lt))
        if slope in ((-1, 1), (1, -1)) and isinstance(part, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
            return "causal" if (slope == (-1, 1)) == below else "sliding_window"
    return "general"


# ---- proofs about added masks ----------------------------------------------------------------------------------------


def _not_binary(expression: Any, gain: float) -> str | None:
    """None when every value is 0 or hides a key; else why not: "opaque" (unknown values) or "bias"."""
    conditions = _conditions(expression)
    if len(conditions) > MAX_CONDITIONS:
        return "opaque"
    for _, value in _cases(expression, conditions):
        if value.has(sympy.Function):
            return "opaque"
        if value.free_symbols or not (value == 0 or value * gain <= DROPPED):
            return "bias"
    return None


def _where_zero(expression: Any) -> Any:
    """The condition under which a binary expression is 0."""
    cases = (case for case, value in _cases(expression, _conditions(expression)) if value == 0)
    return sympy.simplify_logic(sympy.Or(*cases))


def _conditions(expression: Any) -> list[Any]:
    """The comparisons that decide the expression's value, one of each that say the same or the opposite."""
    found: list[Any] = []
    for piecewise in expression.atoms(sympy.Piecewise):
        for _, condition in piecewise.args:
            for comparison in sorted(condition.atoms(sympy.core.relational.Relational), key=str):
                if not any(comparison in (*_same_as(c), *_same_as(c.negated)) for c in found):
                    found.append(comparison)
    return found


def _same_as(comparison: Any) -> tuple[Any, Any]:
    return comparison, comparison.reversed


def _cases(expression: Any, conditions: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Every combination of the conditions with the value it gives; an equality that holds replaces its left side."""
    for truth in itertools.product((True, False), repeat=len(conditions)):
        held = [c if true else c.negated for c, true in zip(conditions, truth, strict=True)]
        replaced: dict[Any, Any] = {}
        for c in held:
            replaced.update(dict.fromkeys(_same_as(c), sympy.true))
            replaced.update(dict.fromkeys(_same_as(c.negated), sympy.false))
        value = sympy.sympify(expression.xreplace(replaced)).doit()
        for c in held:
            if isinstance(c, sympy.Eq):
                value = value.xreplace({c.lhs: c.rhs})
        yield sympy.And(*held), sympy.sympify(value).doit()


# ---- evaluation ------------------------------------------------------------------------------------------------------


def _broadcast(node: Any, index: Index) -> Index:
    """The index into an operand that broadcasts against the right end of `index`."""
    shape = shape_of(node) if isinstance(node, Node) else ()
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if isinstance(n, int) and n == 1 else i for n, i in zip(shape, tail, strict=True))


def _is_condition(value: Any) -> bool:
    """Whether a value is a truth value; sympy counts every plain symbol as one."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def _as_bool(value: Any) -> Any:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if _is_condition(value):
        return value
    if isinstance(value, sympy.Piecewise):
        branches = [(_as_bool(e), c) for e, c in value.args]
        kept = sympy.false
        for e, c in reversed(branches):
            kept = sympy.Or(sympy.And(c, e), sympy.And(sympy.Not(c), kept))
        return kept
    return sympy.Ne(value, 0)


def _as_number(value: Any) -> Any:
    if _is_condition(value):
        return sympy.Piecewise((1, value), (0, True))
    return sympy.sympify(value)


class _Evaluator:
    """Element of a node at a symbolic index, memoised."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, Index], Any] = {}

    def value(self, node: Any, index: Index) -> Any:
        if not isinstance(node, Node):
            return _as_bool(node) if isinstance(node, bool) else _number(float(node))
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._compute(node, index)
        return self._known[key]

    def _compute(self, node: Node, index: Index) -> Any:
        constant = constant_of(node)
        if constant is not None:
            return _number(constant)
        rule = RULES.get(node.target) if node.op == "call_function" else None
        found = rule(self, node, index) if rule is not None else None
        return self.opaque(node, index) if found is None else found

    def opaque(self, node: Node, index: Index) -> Any:
        """An unknown function of the index; a bool one is the condition that it is not 0."""
        leaf = sympy.Function(f"{node.name}_", real=True)(*index) if index else sympy.Symbol(f"{node.name}_", real=True)
        return sympy.Ne(leaf, 0) if dtype_of(node) == torch.bool else leaf

    def operand(self, node: Node, place: int, index: Index) -> Any:
        """The element of an elementwise op's operand."""
        given = inputs(node)[place]
        return self.value(given, _broadcast(given, index))


def _number(value: float) -> Any:
    return sympy.Integer(int(value)) if math.isfinite(value) and float(value).is_integer() else sympy.Float(value)


Rule = Callable[[_Evaluator, Node, Index], Any]


def _same(e: _Evaluator, n: Node, i: Index) -> Any:
    """A copy or a cast; a cast that may round or wrap is followed only for values it keeps."""
    value = e.operand(n, 0, i)
    source, target = dtype_of(inputs(n)[0]), dtype_of(n)
    if target == torch.bool:
        return _as_bool(value)
    value = _as_number(value)
    if target == source or (target in EXACT_CASTS and not (source in FLOATS and target not in FLOATS)):
        return value
    leaves = [x for x, _ in value.args] if isinstance(value, sympy.Piecewise) else [value]
    return value if all(x.is_number and (x in (0, 1) or (target in FLOATS and x <= DROPPED)) for x in leaves) else None


FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
EXACT_CASTS = frozenset({torch.int32, torch.int64, torch.float32, torch.float64})
"""Dtypes that hold every index and mask value in use."""


def _compare(relation: Callable[[Any, Any], Any]) -> Rule:
    def rule(e: _Evaluator, n: Node, i: Index) -> Any:
        return relation(_as_number(e.operand(n, 0, i)), _as_number(e.operand(n, 1, i)))

    return rule


def _logical(combine: Callable[..., Any]) -> Rule:
    def rule(e: _Evaluator, n: Node, i: Index) -> Any:
        if dtype_of(n) != torch.bool:
            return None
        return combine(*(_as_bool(e.operand(n, place, i)) for place in range(len(inputs(n)))))

    return rule


def _arithmetic(combine: Callable[[Any, Any], Any]) -> Rule:
    def rule(e: _Evaluator, n: Node, i: Index) -> Any:
        if n.kwargs.get("alpha", 1) != 1 or len(inputs(n)) != 2:
            return None
        x, y = (_as_number(e.operand(n, place, i)) for place in (0, 1))
        result = (
            sympy.piecewise_fold(combine(x, y)) if x.has(sympy.Piecewise) or y.has(sympy.Piecewise) else combine(x, y)
        )
        return _as_bool(result) if dtype_of(n) == torch.bool else result

    return rule


def _where(condition: Any, x: Any, y: Any, is_bool: bool) -> Any:
    condition = _as_bool(condition)
    if is_bool:
        x, y = _as_bool(x), _as_bool(y)
        return sympy.Or(sympy.And(condition, x), sympy.And(sympy.Not(condition), y))
    return sympy.Piecewise((_as_number(x), condition), (_as_number(y), True))


def _rule_where(e: _Evaluator, n: Node, i: Index) -> Any:
    condition, x, y = (e.operand(n, place, i) for place in range(3))
    return _where(condition, x, y, dtype_of(n) == torch.bool)


def _rule_masked_fill(e: _Evaluator, n: Node, i: Index) -> Any:
    old, mask, fill = (e.operand(n, place, i) for place in range(3))
    return _where(mask, fill, old, dtype_of(n) == torch.bool)


def _filled(number: int) -> Rule:
    return lambda e, n, i: _as_bool(bool(number)) if dtype_of(n) == torch.bool else sympy.Integer(number)


def _rule_full(place: int) -> Rule:
    def rule(e: _Evaluator, n: Node, i: Index) -> Any:
        given = arg(n, place, "fill_value")
        fill = float(given) if isinstance(given, bool) else constant_of(given)
        if fill is None:
            return None
        return _as_bool(bool(fill)) if dtype_of(n) == torch.bool else _number(fill)

    return rule


def _rule_arange(e: _Evaluator, n: Node, i: Index) -> Any:
    start = inputs(n)[0] if n.target is not aten.arange.default else 0
    step = arg(n, 2, "step", 1) if n.target is aten.arange.start_step else 1
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    return start + step * i[0]


def _rule_expand(e: _Evaluator, n: Node, i: Index) -> Any:
    return e.operand(n, 0, i)


def _rule_unsqueeze(e: _Evaluator, n: Node, i: Index) -> Any:
    dim = normal_dim(inputs(n)[1], len(i))
    return e.value(inputs(n)[0], i[:dim] + i[dim + 1 :])


def _rule_transpose(e: _Evaluator, n: Node, i: Index) -> Any:
    order = list(i)
    x, y = (normal_dim(d, len(i)) for d in inputs(n)[1:3])
    order[x], order[y] = order[y], order[x]
    return e.value(inputs(n)[0], tuple(order))


def _rule_permute(e: _Evaluator, n: Node, i: Index) -> Any:
    order: list[Any] = [None] * len(i)
    for place, dim in enumerate(inputs(n)[1]):
        order[normal_dim(dim, len(i))] = i[place]
    return e.value(inputs(n)[0], tuple(order))


def _rule_select(e: _Evaluator, n: Node, i: Index) -> Any:
    rank = len(shape_of(inputs(n)[0]))
    dim, at = normal_dim(inputs(n)[1], rank), inputs(n)[2]
    if not isinstance(at, int) or at < 0:
        return None
    return e.value(inputs(n)[0], (*i[:dim], sympy.Integer(at), *i[dim:]))


def _rule_slice(e: _Evaluator, n: Node, i: Index) -> Any:
    dim = normal_dim(arg(n, 1, "dim", 0), len(i))
    start, step = arg(n, 2, "start") or 0, arg(n, 4, "step", 1)
    if not isinstance(start, int) or start < 0 or not isinstance(step, int):
        return None
    return e.value(inputs(n)[0], (*i[:dim], start + step * i[dim], *i[dim + 1 :]))


def _rule_reshape(e: _Evaluator, n: Node, i: Index) -> Any:
    """A reshape that, with those before it, only adds or drops dims of size 1."""
    source = inputs(n)[0]
    while source.target in (aten.reshape.default, aten.view.default):
        source = inputs(source)[0]
    before, after = shape_of(source), shape_of(n)
    kept = [index for size, index in zip(after, i, strict=True) if not (isinstance(size, int) and size == 1)]
    if [str(s) for s in before if s != 1] != [str(s) for s in after if s != 1]:
        return None
    given = iter(kept)
    return e.value(source, tuple(sympy.Integer(0) if isinstance(s, int) and s == 1 else next(given) for s in before))


def _rule_index(e: _Evaluator, n: Node, i: Index) -> Any:
    """Gather with an index tensor for every dim. A negative index wraps, so one that may be is not followed."""
    source, indices = inputs(n)[0], inputs(n)[1]
    if len(indices) != len(shape_of(source)) or any(
        not isinstance(x, Node) or dtype_of(x) == torch.bool for x in indices
    ):
        return None
    at = tuple(_as_number(e.value(x, _broadcast(x, i))) for x in indices)
    return e.value(source, at) if all(a.is_nonnegative for a in at) else e.opaque(n, at)


def _rule_triangle(lower: bool) -> Rule:
    def rule(e: _Evaluator, n: Node, i: Index) -> Any:
        diagonal = arg(n, 1, "diagonal", 0)
        inside = sympy.Le(i[-1], i[-2] + diagonal) if lower else sympy.Ge(i[-1], i[-2] + diagonal)
        return _where(inside, e.operand(n, 0, i), 0, dtype_of(n) == torch.bool)

    return rule


def _rule_not(e: _Evaluator, n: Node, i: Index) -> Any:
    return sympy.Not(_as_bool(e.operand(n, 0, i))) if dtype_of(n) == torch.bool else None


RULES: dict[object, Rule] = {
    **dict.fromkeys(
        (
            aten.to.dtype,
            aten.to.dtype_layout,
            aten.to.device,
            aten.to.other,
            aten._to_copy.default,
            aten.type_as.default,
            aten.clone.default,
            aten.contiguous.default,
            aten.alias.default,
            aten.detach.default,
            aten.lift_fresh_copy.default,
        ),
        _same,
    ),
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), _filled(0)),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), _filled(1)),
    aten.full.default: _rule_full(1),
    aten.full_like.default: _rule_full(1),
    aten.new_full.default: _rule_full(2),
    aten.arange.default: _rule_arange,
    aten.arange.start: _rule_arange,
    aten.arange.start_step: _rule_arange,
    aten.expand.default: _rule_expand,
    aten.unsqueeze.default: _rule_unsqueeze,
    aten.transpose.int: _rule_transpose,
    aten.permute.default: _rule_permute,
    aten.select.int: _rule_select,
    aten.slice.Tensor: _rule_slice,
    aten.reshape.default: _rule_reshape,
    aten.view.default: _rule_reshape,
    aten.squeeze.dim: _rule_reshape,
    aten.index.Tensor: _rule_index,
    aten.tril.default: _rule_triangle(lower=True),
    aten.triu.default: _rule_triangle(lower=False),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _compare(sympy.Eq)),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _compare(sympy.Ne)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _compare(sympy.Lt)),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _compare(sympy.Le)),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _compare(sympy.Gt)),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _compare(sympy.Ge)),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default), _logical(sympy.And)),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.logical_or.default), _logical(sympy.Or)),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _rule_not),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _arithmetic(lambda x, y: x + y)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _arithmetic(lambda x, y: x - y)),
    **dict.fromkeys((aten.rsub.Scalar, aten.rsub.Tensor), _arithmetic(lambda x, y: y - x)),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _arithmetic(lambda x, y: x * y)),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar), _rule_where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _rule_masked_fill),
}
