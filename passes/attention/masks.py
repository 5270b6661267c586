"""What kind of mask is this? Proved from its elements as sympy functions of (b, h, q, k)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from torch.fx import Node

from monarch_compile.passes.attention.region import MaskTerm
from monarch_compile.passes.constants import DROPPED
from monarch_compile.passes.elements.rules import Evaluator
from monarch_compile.passes.elements.values import Index, as_bool, as_number, broadcast, place
from monarch_compile.passes.graph import dtype_of, shape_of

MAX_CONDITIONS = 6
"""A mask decided by more comparisons is not proved."""

UNPROVED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What sympy raises where it cannot compute with an expression."""

B, H, Q, K = map(place, "bhqk")
MORE = tuple(map(place, ("b1", "b2", "b3", "b4")))
"""Places of the scores: batch, head, query and key, and further batch dims."""


def index_of(rank: int, swapped: bool = False) -> Index:
    """The symbolic index into scores of a rank from 2 to 8: batch dims, the heads from rank 4 on, then (q, k).

    Swapped scores are (..., keys, queries).
    """
    lead = (B, *MORE[: rank - 4], H)[-(rank - 2) :] if rank >= 4 else (B,) * (rank - 2)
    return (*lead, K, Q) if swapped else (*lead, Q, K)


@dataclass(frozen=True)
class MaskFact:
    """What was proved of a mask: its kind, a key of KINDS, with why and where.

    length: that of every packed sequence, where it is one constant. is_triangle: whether a causal mask hides all later
    keys, and no others but by what depends on the key alone, the last query being at the last key; hides_keys: whether
    it hides such keys, too.
    """

    kind: str
    reason: str
    node: Node
    length: int | None = None
    is_triangle: bool = False
    hides_keys: bool = False


KINDS = {
    "none": "the mask hides nothing",
    "key_padding": "the mask depends on the key alone",
    "causal": "a causal mask",
    "sliding_window": "a sliding-window mask: a block-sparse exact kernel such as FlexAttention suits it better",
    "prefix_causal": "a causal mask with a prefix that every query sees, which is not lowered yet",
    "packed": "a query sees the keys of its own group alone (packed sequences), and not in sequences of one constant "
    "length under no other mask than a causal one: FlexAttention or a varlen kernel suits it",
    "key_bias": "a bias that depends on the key alone is added to the scores",
    "split_bias": "a bias of the key is added to the scores that differs by head, by row or under a causal mask (as in "
    "ALiBi), which is not lowered yet",
    "general": "the mask depends on the query, and not only through a causal triangle or a window",
    "bias": "a bias that depends on the query is added to the scores, which a Monarch matrix cannot hold",
    "multiplied": "the scores or probabilities are multiplied by a tensor that is not proved to be 1 wherever a key "
    "is visible",
    "opaque": "the mask is an added float tensor that cannot be proved to hold only 0 and large negative values; "
    "pass it as a bool mask",
}
LOWERED_KINDS = ("none", "key_padding", "key_bias")


def classify_all(terms: Sequence[MaskTerm], ahead: Any = 0) -> tuple[MaskFact, ...]:
    """Prove what each of a site's masks hides. A mask that only repeats what the others hide is "none".

    ahead: how many more keys than queries there are, an integer or an expression of sizes. Triangles are those in which
    query q is at key q + ahead.
    """
    facts = _facts(terms, 0)
    if ahead == 0:
        return facts
    pairs = zip(_facts(terms, ahead), facts, strict=True)
    return tuple(
        shifted if shifted.kind == "causal" and shifted.is_triangle else replace(fact, is_triangle=False)
        for shifted, fact in pairs
    )


def _facts(terms: Sequence[MaskTerm], ahead: Any) -> tuple[MaskFact, ...]:
    read = [_guarded(_read, term, ahead) for term in terms]
    visible = sympy.And(*(r.keep for r in read if isinstance(r, Reading) and r.keep is not None))
    facts = []
    for term, reading in zip(terms, read, strict=True):
        found = reading if isinstance(reading, MaskFact) else _guarded(_fact, term, reading, visible)
        facts.append(found)
    return tuple(facts)


def classify(term: MaskTerm) -> MaskFact:
    """`classify_all` for a mask by itself."""
    return classify_all([term])[0]


@dataclass(frozen=True)
class Reading:
    """A mask's element at a symbolic index, the condition on which it keeps a key (None: not a mask), and a bias."""

    element: Any
    keep: Any = None
    bias: Any = None


def _guarded(prove: Callable[..., Any], term: MaskTerm, *rest: Any) -> Any:
    try:
        return prove(term, *rest)
    except UNPROVED as error:
        return MaskFact("opaque", f"the mask could not be proved to be anything: {error}", term.node)


def _read(term: MaskTerm, ahead: Any) -> Reading:
    index = index_of(term.score_rank, term.swapped)
    element = Evaluator().value(term.node, broadcast(term.node, index))
    if ahead != 0:
        element = _counted_from_keys(element, ahead)
    if term.role in ("keep", "drop"):
        keep = as_bool(element)
        return Reading(element, sympy.Not(keep) if term.role == "drop" else keep)
    return _read_added(as_number(element), term.gain) if term.role == "add" else Reading(element)


def _counted_from_keys(element: Any, ahead: Any) -> Any:
    """An element as a function of where the query is among the keys, in place of where it is among the queries."""
    return sympy.sympify(element).xreplace({Q: Q - ahead})


def _fact(term: MaskTerm, reading: Reading, visible: Any) -> MaskFact:
    kind = REPEATS[term.role](reading.element, visible) if term.role in REPEATS else _kind(reading)
    if kind == "causal":
        return MaskFact(kind, KINDS[kind], term.node, **_triangle(reading.keep))
    return _packed(term, reading.keep) if kind == "packed" else MaskFact(kind, KINDS[kind], term.node)


def _packed(term: MaskTerm, keep: Any) -> MaskFact:
    """The fact of packed sequences; each of them may be under a triangle of its own, which is that of the whole row."""
    conditions = sympy.And.make_args(keep)
    groups = [part for part in conditions if isinstance(part, sympy.Eq)]
    edges = [part for part in conditions if part not in groups]
    is_known = len(groups) == 1 and all(isinstance(part, Relational) and _lag(part) == 0 for part in edges)
    length = _length(groups[0]) if is_known else None
    return MaskFact("packed", KINDS["packed"], term.node, length, is_triangle=bool(length and edges))


def _triangle(keep: Any) -> dict[str, bool]:
    """`is_triangle` and `hides_keys` of a causal mask that keeps a key on a condition."""
    conditions = sympy.And.make_args(keep)
    of_keys = [part for part in conditions if _condition_kind(part) == "key_padding"]
    edges = [part for part in conditions if part not in of_keys]
    is_triangle = all(isinstance(part, Relational) and _lag(part) == 0 for part in edges)
    return {"is_triangle": is_triangle, "hides_keys": bool(of_keys)}


def _length(keep: sympy.Eq) -> int | None:
    """L, where a key is kept if q // L = k // L."""
    if not isinstance(keep.lhs, sympy.floor):
        return None
    length = 1 / keep.lhs.args[0].xreplace({Q: sympy.Integer(1), K: sympy.Integer(1)})
    found = length.is_Integer and length > 0 and {*keep.args} == {sympy.floor(Q / length), sympy.floor(K / length)}
    return int(length) if found else None


def _kind(reading: Reading) -> str:
    if reading.bias is not None:
        return str(reading.bias)
    return "none" if reading.keep == sympy.true else _keep_kind(reading.keep)


# ---- conditions ------------------------------------------------------------------------------------------------------

ORDER = ("general", "packed", "prefix_causal", "sliding_window", "causal", "key_padding")
"""Kinds of conditions; of several, the first one found names the mask."""


def _keep_kind(keep: Any) -> str:
    kinds = {_condition_kind(part) for part in sympy.And.make_args(keep)}
    if "general" in kinds and len(keep.atoms(Relational)) <= MAX_CONDITIONS:
        kinds = {_condition_kind(part) for part in sympy.And.make_args(sympy.to_cnf(keep, simplify=True))}
    return next(kind for kind in ORDER if kind in kinds)


def _condition_kind(part: Any) -> str:
    """The kind of one of the conditions that must hold together."""
    if not part.free_symbols & {Q, H}:
        return "key_padding"
    if isinstance(part, sympy.Or):
        return "prefix_causal" if {_condition_kind(p) for p in part.args} == {"causal", "key_padding"} else "general"
    if isinstance(part, sympy.And):
        kinds = {_condition_kind(p) for p in part.args}
        return next(kind for kind in ORDER if kind in kinds)
    if not isinstance(part, Relational) or H in part.free_symbols:
        return "general"
    if isinstance(part, sympy.Eq):
        left, right = part.lhs, part.rhs
        mirrored = left.xreplace({Q: K}) == right.xreplace({Q: K})
        return (
            "packed"
            if mirrored and len(left.free_symbols & {Q, K}) == len(right.free_symbols & {Q, K}) == 1
            else ("general")
        )
    return _edge_kind(part)


def _edge_kind(part: Any) -> str:
    """k - q at most (or at least) a constant."""
    part = _as_less(part)
    if not isinstance(part, (sympy.Lt, sympy.Le)) or part.has(AppliedUndef):
        return "general"
    distance = part.lhs - part.rhs
    if isinstance(part.lhs, sympy.Abs) and not part.rhs.free_symbols & {Q, K, H}:
        distance = part.lhs.args[0]
        return "sliding_window" if _slopes(distance) in ((1, -1), (-1, 1)) else "general"
    if distance.has(sympy.Abs):
        return "general"
    if _slopes(distance) == (-1, 1):  # k is at most q - lag
        return "sliding_window" if _lag(part).is_negative else "causal"
    return "sliding_window" if _slopes(distance) == (1, -1) else "general"


def _as_less(part: Any) -> Any:
    return part.reversed if isinstance(part, (sympy.Gt, sympy.Ge)) else part


def _lag(part: Any) -> Any:
    """n, where a comparison of places says that k is at most q - n."""
    part = _as_less(part)
    return sympy.expand(part.lhs - part.rhs - (K - Q)) + (0 if isinstance(part, sympy.Le) else 1)


def _slopes(distance: Any) -> tuple[Any, Any]:
    return sympy.diff(distance, Q), sympy.diff(distance, K)


# ---- added masks and biases ------------------------------------------------------------------------------------------


def _read_added(expression: Any, gain: float) -> Reading:
    """An added tensor: where it is 0 a key is kept, where it is very low it is hidden; any other value is a bias."""
    conditions = _conditions(expression)
    if len(conditions) > MAX_CONDITIONS:
        return Reading(expression, bias="opaque")
    kept, values = [], []
    for held, value in _cases(expression, conditions):
        if value.has(sympy.nan, sympy.zoo):
            return Reading(expression, bias="opaque")
        if value.is_number and bool(value * gain >= -DROPPED):
            return Reading(expression, bias="opaque")  # a bias so large that eager rounds the scores beside it away
        hides = not value.free_symbols and not value.has(sympy.Function) and bool(value * gain <= DROPPED)
        if not hides:
            kept.append(held)
            values.append(value)
    if all(value == 0 for value in values):
        return Reading(expression, sympy.simplify_logic(sympy.Or(*kept)))
    return Reading(expression, bias=_bias_kind(expression, values))


def _bias_kind(expression: Any, values: list[Any]) -> str:
    """Of the values where keys are visible: one function of the key, plus what is the same in a whole row?"""
    unknown = any(value.has(AppliedUndef) for value in values)
    if not expression.free_symbols & {Q, H}:
        return "key_bias"
    if not expression.free_symbols & {Q} or (len(set(values)) == 1 and _splits(values[0])):
        return "split_bias"
    return "opaque" if unknown else "bias"


def _splits(value: Any) -> bool:
    """Whether value(q, k) is f(k) + g(q): softmax ignores g."""
    return K not in sympy.expand(value - value.xreplace({Q: sympy.Integer(0)})).free_symbols


def _conditions(expression: Any) -> list[Any]:
    """The comparisons that decide the expression's value, one of each that say the same or the opposite."""
    found: list[Any] = []
    for piecewise in expression.atoms(sympy.Piecewise):
        for _, condition in piecewise.args:
            _collect(condition, found)
    return found


def _collect(condition: Any, found: list[Any]) -> None:
    for comparison in sorted(condition.atoms(Relational), key=str):
        if not any(comparison in (*_same_as(c), *_same_as(c.negated)) for c in found):
            found.append(comparison)


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


# ---- masks that repeat others ----------------------------------------------------------------------------------------


def is_binary(node: Node) -> bool:
    """Whether every element is proved to be 0 or 1 (a bool one is)."""
    if dtype_of(node) == torch.bool:
        return True
    try:
        expression = as_number(Evaluator().value(node, broadcast(node, index_of(max(2, len(shape_of(node)))))))
        conditions = _conditions(expression)
        return len(conditions) <= MAX_CONDITIONS and all(v in (0, 1) for _, v in _cases(expression, conditions))
    except UNPROVED:
        return False


def _holds_where(visible: Any, claim: Callable[[Any], bool], expression: Any) -> bool:
    """Whether, wherever a key is visible, the expression's value satisfies the claim."""
    conditions = _conditions(expression)
    _collect(visible, conditions)
    _collect(sympy.sympify(expression), conditions)
    if len(conditions) > MAX_CONDITIONS:
        return False
    seen = _cases(visible, conditions)
    values = _cases(expression, conditions)
    return all(shown == sympy.false or claim(value) for (_, shown), (_, value) in zip(seen, values, strict=True))


def _kind_of_times(element: Any, visible: Any) -> str:
    """0 or 1 everywhere (so that a hidden score stays hidden), and 1 wherever a key is visible."""
    element = as_number(element)
    binary = _holds_where(sympy.true, lambda value: value in (0, 1), element)
    return "none" if binary and _holds_where(visible, lambda value: value == 1, element) else "multiplied"


def _kind_of_again(element: Any, visible: Any) -> str:
    claim = _holds_where(visible, lambda value: value == sympy.false, as_bool(element))
    return "none" if claim else "multiplied"


def _kind_of_again_keep(element: Any, visible: Any) -> str:
    claim = _holds_where(visible, lambda value: value == sympy.true, as_bool(element))
    return "none" if claim else "multiplied"


REPEATS: dict[str, Callable[[Any, Any], str]] = {
    "times": _kind_of_times,
    "again": _kind_of_again,
    "again_keep": _kind_of_again_keep,
}
"""Roles of masks that hide nothing by themselves: what has to be proved of them, given the condition of visibility."""
