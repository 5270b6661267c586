"""Sizes of a region as arguments of its operator, symbolic ones among them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.utils._sympy.functions import FloorDiv

from monarch_compile.passes.graph import aten, shape_of

ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
}
"""What sizes are made with."""


class Sizes:
    """Finds sizes in the part of a graph before one of its nodes, and makes what is not there from what is.

    avoid: nodes that disappear, of which no size may be read.
    """

    def __init__(self, before: Node, avoid: Iterable[Node]) -> None:
        self._graph: Graph = before.graph
        self._places = _places(before, frozenset(avoid))
        self._made: dict[str, Node] = {}

    def can_give(self, size: Any) -> bool:
        """Whether a size is a number, or can be found or made."""
        return isinstance(size, int) or self._knows(size.node.expr)

    def _knows(self, expr: sympy.Expr) -> bool:
        if expr.is_Integer or str(expr) in self._places:
            return True
        return expr.func in ARITHMETIC and all(map(self._knows, expr.args))

    def __call__(self, size: Any) -> Any:
        """A number or a node; new nodes go where the graph inserts now."""
        return size if isinstance(size, int) else self._argument(size.node.expr)

    def all_of(self, sizes: Iterable[Any]) -> list[Any]:
        """The same for several."""
        return [self(size) for size in sizes]

    def _argument(self, expr: sympy.Expr) -> Any:
        if expr.is_Integer:
            return int(expr)
        name = str(expr)
        if name not in self._made:
            self._made[name] = self._read(name) if name in self._places else self._computed(expr)
        return self._made[name]

    def _read(self, name: str) -> Node:
        node, dim = self._places[name]
        return node if dim is None else self._graph.call_function(aten.sym_size.int, (node, dim))

    def _computed(self, expr: sympy.Expr) -> Node:
        function = ARITHMETIC[expr.func]
        found: Node = reduce(
            lambda one, other: self._graph.call_function(function, (one, other)), map(self._argument, expr.args)
        )
        return found


def _places(before: Node, avoid: frozenset[Node]) -> dict[str, tuple[Node, int | None]]:
    """Where each symbolic size is to be had: a node that is it, else a dim of a tensor."""
    found: dict[str, tuple[Node, int | None]] = {}
    dims: dict[str, tuple[Node, int | None]] = {}
    for node in before.graph.nodes:
        if node is before:
            break
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.setdefault(str(value), (node, None))
        elif node not in avoid:
            for dim, size in enumerate(shape_of(node)):
                if isinstance(size, torch.SymInt):
                    dims.setdefault(str(size), (node, dim))
    return {**dims, **found}
