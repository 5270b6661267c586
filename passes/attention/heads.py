"""Keys and values taken before they are repeated for every query head (grouped and multi-query attention).

A repeat is recognised by where its elements come from, not by its spelling: head h
reads head h // group of a node above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from torch.fx import Node

from monarch_compile.passes.attention.operands import COPIES
from monarch_compile.passes.attention.region import AttentionRegion, Operand
from monarch_compile.passes.elements.values import Index, Rule, broadcast
from monarch_compile.passes.elements.views import VIEW_RULES
from monarch_compile.passes.graph import aten, inputs, shape_of

MOVES: dict[object, Rule] = {
    **{
        target: VIEW_RULES[target]
        for target in (
            aten.expand.default,
            aten.repeat.default,
            aten.repeat_interleave.self_int,
            aten.unsqueeze.default,
            aten.squeeze.dim,
            aten.reshape.default,
            aten.view.default,
            aten.transpose.int,
            aten.permute.default,
        )
    },
    **dict.fromkeys(COPIES, VIEW_RULES[aten.expand.default]),
}
"""Ops that only move elements, by which heads are repeated."""


@dataclass
class _Trail:
    """Where an element comes from: the nodes above that hold it, with its index in each, nearest first."""

    found: list[tuple[Node, Index]] = field(default_factory=list)

    def value(self, node: Node, index: Index) -> Any:
        """Note the element and follow it up."""
        self.found.append((node, index))
        rule: Any = MOVES.get(node.target) if node.op == "call_function" else None
        return rule(self, node, index) if rule is not None else None

    def operand(self, node: Node, place: int, index: Index) -> Any:
        """The element that an op took."""
        given = inputs(node)[place]
        return self.value(given, broadcast(given, index))


@dataclass(frozen=True)
class _Source:
    """What an operand repeats `group` times a head; `skipped` are the nodes between."""

    operand: Operand
    group: int
    skipped: tuple[Node, ...]


def share_heads(region: AttentionRegion) -> AttentionRegion:
    """The region with k and v as they are before their heads are repeated, if both are repeated alike."""
    heads = region.lead[1]
    leads = region.qk_lead, region.pv_lead
    if region.group > 1 or not isinstance(heads, int) or heads == 1 or any(lead[-1:] != (heads,) for lead in leads):
        return region
    k, v = ({s.group: s for s in _sources(x, heads)} for x in (region.k, region.v))
    group = max((n for n in k if n in v), default=1)
    if group == 1:
        return region
    skipped = (*region.skipped, *k[group].skipped, *v[group].skipped)
    return replace(region, k=k[group].operand, v=v[group].operand, group=group, skipped=skipped)


def _sources(operand: Operand, heads: int) -> Iterator[_Source]:
    """Every node that the operand may be taken from instead, itself included where it is broadcast over heads."""
    places = sympy.symbols(f"p:{len(operand.dims)}", integer=True, nonnegative=True)
    start: dict[int, Any] = {dim: places[place] for place, dim in enumerate(operand.dims) if dim is not None}
    shape = shape_of(operand.node)
    trail = _Trail()
    trail.value(operand.node, broadcast(operand.node, tuple(start[dim] for dim in range(len(shape)))))
    for node, index in trail.found:
        found = _as_operand(node, index, places, heads)
        if found is not None and _keeps_sizes(operand, found[0]):
            yield _Source(*found, _between(operand.node, node))


def _as_operand(node: Node, index: Index, places: tuple[Any, ...], heads: int) -> tuple[Operand, int] | None:
    """The node as an operand whose heads each serve `group` of the query's; None where its elements lie otherwise."""
    dims: list[int | None] = [None] * len(places)
    spare, group = [], heads
    for dim, (size, at) in enumerate(zip(shape_of(node), index, strict=True)):
        if at in places:
            dims[places.index(at)] = dim
        elif isinstance(size, int) and size == 1:
            spare.append(dim)
        elif isinstance(size, int) and heads % size == 0 and at == sympy.floor(places[-3] / (heads // size)):
            dims[-3] = dim
            group = heads // size
        else:
            return None
    if dims[-3] is not None and group == heads:  # every head has keys of its own
        return None
    free = [place for place, dim in enumerate(dims) if dim is None]
    if len(free) < len(spare):
        return None
    for place, dim in zip(free, spare, strict=False):
        dims[place] = dim
    return Operand(node, tuple(dims)), group


def _keeps_sizes(operand: Operand, found: Operand) -> bool:
    """Whether all but the heads have the sizes they had: nothing else is broadcast, rows and features are there."""
    own, other = (_sizes(x) for x in (operand, found))
    places = [place for place in range(len(own)) if place != len(own) - 3]
    return None not in found.dims[-2:] and all(str(own[place]) == str(other[place]) for place in places)


def _sizes(operand: Operand) -> list[Any]:
    return [1 if dim is None else shape_of(operand.node)[dim] for dim in operand.dims]


def _between(below: Node, above: Node) -> tuple[Node, ...]:
    """The nodes from `below` up to, and without, `above`."""
    found = []
    while below is not above:
        found.append(below)
        below = inputs(below)[0]
    return tuple(found)
