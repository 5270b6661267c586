"""Symbolic indices and values: what the elements of masks are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from monarch_compile.passes.graph import aten, shape_of

if TYPE_CHECKING:
    from monarch_compile.passes.elements.rules import Evaluator

Index = tuple[Any, ...]

CASTS_AND_COPIES = (
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
)
"""Ops that give each element of their operand, in its place, perhaps as another dtype."""


class Place(sympy.Symbol):  # type: ignore[misc]  # sympy has no types
    """A symbolic index into one dim; a family names those that it asks about."""


class Unknown(sympy.Symbol):  # type: ignore[misc]  # sympy has no types
    """The one element of a tensor that nothing is known of."""


def place(name: str) -> Place:
    """The place of a name: an integer of at least 0."""
    found: Place = Place(name, integer=True, nonnegative=True)
    return found


def broadcast(node: Any, index: Index) -> Index:
    """The index into an operand that broadcasts against the right end of `index`."""
    shape = shape_of(node) if isinstance(node, Node) else ()
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if isinstance(n, int) and n == 1 else i for n, i in zip(shape, tail, strict=True))


def is_condition(value: Any) -> bool:
    """Whether a value is a truth value; sympy counts every plain symbol as one."""
    return isinstance(value, Boolean) and not isinstance(value, sympy.Symbol)


def as_bool(value: Any) -> Any:
    """A value as a truth value."""
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if is_condition(value):
        return value
    if isinstance(value, sympy.Piecewise):
        branches = [(as_bool(e), c) for e, c in value.args]
        kept = sympy.false
        for e, c in reversed(branches):
            kept = sympy.Or(sympy.And(c, e), sympy.And(sympy.Not(c), kept))
        return kept
    return sympy.Ne(value, 0)


def as_number(value: Any) -> Any:
    """A value as a number; a truth value counts 0 or 1."""
    if is_condition(value):
        return sympy.Piecewise((1, value), (0, True))
    return sympy.sympify(value)


def literal(value: float) -> Any:
    """A number that a program spells: integers beyond 2**53 are no floats."""
    return sympy.Integer(value) if isinstance(value, int) else number(float(value))


def number(value: float) -> Any:
    return sympy.Integer(int(value)) if math.isfinite(value) and float(value).is_integer() else sympy.Float(value)


Rule = Callable[["Evaluator", Node, Index], Any]
"""An op's element at an index, or None where it cannot be known."""
