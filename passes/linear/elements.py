"""Elements of tensors between two products: which element of the first one a symbolic index reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from monarch_compile.passes.elements.rules import Evaluator
from monarch_compile.passes.elements.values import CASTS_AND_COPIES, Index
from monarch_compile.passes.elements.views import VIEW_RULES
from monarch_compile.passes.graph import aten, inputs, shape_of
from monarch_compile.passes.views import TRANSPOSES, source_dims

RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.unsqueeze.default,
        aten.reshape_as.default,
        aten.view_as.default,
    }
)
"""Ops that keep the order of elements, whatever the dims."""
COPIES = frozenset({*CASTS_AND_COPIES} - {aten.detach.default})
"""Ops that give each element in its place, and its gradient: `detach` gives none."""
MOVES = RESHAPES | TRANSPOSES | COPIES
"""Ops that move every element of a tensor to a place of its own."""

_reshaped = VIEW_RULES[aten.reshape.default]


class Elements(Evaluator):
    """Elements as functions of the product, or of another op that is no move, which they come from.

    sources: those, by the names of the functions. through: ops that are looked through as if they were copies.
    """

    def __init__(self, through: frozenset[Any] = frozenset()) -> None:
        super().__init__()
        self.sources: dict[str, Node] = {}
        self._through = through

    def read(self, node: Node, index: Index) -> tuple[Node, Index] | None:
        """The source of a node's element at an index, and the index there; None where no single source is known."""
        value = self.value(node, index)
        if not isinstance(value, AppliedUndef) or value.func.__name__ not in self.sources:
            return None
        return self.sources[value.func.__name__], tuple(value.args)

    def opaque(self, node: Node, index: Index) -> Any:
        """As of every evaluator; the node is noted."""
        value = super().opaque(node, index)
        if isinstance(value, AppliedUndef):
            self.sources[value.func.__name__] = node
        return value

    def _compute(self, node: Node, index: Index) -> Any:
        if node.op != "call_function":
            return self.opaque(node, index)
        if node.target in TRANSPOSES:
            moved: list[Any] = [None] * len(index)
            for at, dim in zip(index, source_dims(node), strict=True):
                moved[dim] = at
            return self.value(inputs(node)[0], tuple(moved))
        if node.target in RESHAPES:
            found = _reshaped(self, node, index)
            return _by_rows(self, node, index) if found is None else found
        if node.target in COPIES or node.target in self._through:
            return self.value(inputs(node)[0], index)
        return self.opaque(node, index)


def _by_rows(elements: Elements, node: Node, index: Index) -> Any:
    """A reshape that merges leading dims, symbolic ones too, and keeps the trailing ones together."""
    source = inputs(node)[0]
    before, after = list(shape_of(source)), list(zip(shape_of(node), index, strict=True))
    kept: list[Any] = []
    while len(before) > 1 and after and str(before[-1]) == str(after[-1][0]):
        kept.insert(0, after.pop()[1])
        before.pop()
    if len(before) != 1:
        return elements.opaque(node, index)
    flat: Any = sympy.Integer(0)
    for size, at in after:
        flat = flat * _expr(size) + at
    return elements.value(source, (flat, *kept))


def _expr(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def source_of_moves(node: Node, through: frozenset[Any] = frozenset()) -> tuple[Node, list[Node]]:
    """What a node is made of by moves alone, and the nodes between, `node` first."""
    between = []
    while node.op == "call_function" and (node.target in MOVES or node.target in through):
        between.append(node)
        node = inputs(node)[0]
    return node, between


def evaluated(expr: Any, grid: Mapping[Any, Any]) -> Any:
    """An index as whole numbers, exactly, where its symbols are arrays of whole numbers.

    Raises:
        ValueError: it has another symbol, or an operation that indices are not made with.
    """
    if expr.is_Integer:
        return int(expr)
    if expr.is_Symbol and expr in grid:
        return grid[expr]
    if isinstance(expr, sympy.floor):
        above, below = expr.args[0].as_numer_denom()
        return evaluated(above, grid) // evaluated(below, grid)
    if isinstance(expr, sympy.Mod):
        return evaluated(expr.args[0], grid) % evaluated(expr.args[1], grid)
    if isinstance(expr, sympy.Add):
        return sum(evaluated(arg, grid) for arg in expr.args)
    if isinstance(expr, sympy.Mul):
        return math.prod(evaluated(arg, grid) for arg in expr.args)
    raise ValueError(f"{expr} is no index of these symbols")


MOST_POINTS = 2**24
"""Of a grid on which indices are compared."""


def grid_of(symbols: Sequence[Any], sizes: Sequence[int]) -> dict[Any, Any]:
    """Every value of some symbols, as arrays that broadcast against each other.

    Raises:
        ValueError: they are too many.
    """
    if math.prod(sizes) > MOST_POINTS:
        raise ValueError("too many points")
    shape = [1] * len(sizes)
    return {
        symbol: np.arange(size, dtype=np.int64).reshape([*shape[:place], size, *shape[place + 1 :]])
        for place, (symbol, size) in enumerate(zip(symbols, sizes, strict=True))
    }


def flat(indices: Sequence[Any], sizes: Sequence[Any]) -> Any:
    """The place in some dims, counted as one number: exprs or arrays."""
    total: Any = 0
    for at, size in zip(indices, sizes, strict=True):
        total = total * size + at
    return total


def is_static(sizes: Sequence[Any]) -> bool:
    """Whether all sizes are numbers."""
    return not any(isinstance(size, torch.SymInt) for size in sizes)
