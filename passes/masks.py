"""What kind of mask is this? Proved from its elements as sympy functions of (b, h, q, k)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
from torch.fx import Node

from monarch_compile.passes.attention import DROPPED
from monarch_compile.passes.elements import B, Evaluator, H, Index, K, Q, as_bool, as_number, broadcast
from monarch_compile.passes.region import MaskTerm

MAX_CONDITIONS = 6
"""A mask decided by more comparisons is not proved."""


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
    try:
        return _prove(term, index)
    except (ArithmeticError, NotImplementedError, RecursionError, TypeError, ValueError) as error:
        return MaskFact("opaque", f"the mask could not be proved to be anything: {error}", term.node)


def _prove(term: MaskTerm, index: Index) -> MaskFact:
    expression = Evaluator().value(term.node, broadcast(term.node, index))
    if term.role == "add":
        return _classify_added(term, expression)
    keep = as_bool(expression)
    return _classify_keep(term.node, sympy.Not(keep) if term.role == "drop" else keep)


def _classify_added(term: MaskTerm, expression: Any) -> MaskFact:
    expression = as_number(expression)
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
        if value.has(sympy.Function, sympy.nan, sympy.zoo):
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
