"""Putting a family's operator in the place of a site: what nodes stand for others, sizes as arguments, layouts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from monarch_compile.passes.graph import ORIGIN, REGION, aten, shape_of

REPLACED_BY = "monarch_compile_replaced_by"
"""Where a replaced node notes its replacement: a later site of the same graph may have it for an operand."""


def current(node: Node) -> Node:
    """The node that now stands for `node`."""
    while REPLACED_BY in node.meta:
        node = node.meta[REPLACED_BY]
    return node


def replace_by(output: Node, result: Node, op: Node) -> None:
    """Give every reader of `output` the `result`, made from `op` by nodes of one reader each, and erase `output`.

    New nodes say that they come from where `output` does; those that feed them are the ones without metadata.
    """
    made = nodes_between(op, result)
    for node in made:
        node.meta = {key: output.meta[key] for key in ORIGIN if key in output.meta}
    for node in made:
        for fed in _made_for(node):
            fed.meta = {key: output.meta[key] for key in REGION if key in output.meta}
    result.meta["val"] = output.meta["val"]
    output.replace_all_uses_with(result)
    output.meta[REPLACED_BY] = result
    output.graph.erase_node(output)


def nodes_between(op: Node, result: Node) -> list[Node]:
    """`op`, `result` and what is between them, each with one reader."""
    nodes = [op]
    while nodes[-1] is not result:
        nodes.append(next(iter(nodes[-1].users)))
    return nodes


def _made_for(node: Node) -> list[Node]:
    """What was made to feed a node: nodes that say nothing of themselves yet."""
    found, pending = [], [node]
    while pending:
        made = [node for node in pending.pop().all_input_nodes if node.op == "call_function" and not node.meta]
        found += made
        pending += made
    return found


def with_strides_of(graph: Graph, result: Node, output: Node) -> Node:
    """A copy of `result` with the memory order of `output`, for programs that would notice another."""
    strides = [n if isinstance(n, int) else n.node.hint or 0 for n in output.meta["val"].stride()]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    permuted = graph.call_function(aten.permute.default, (result, order))
    copied = graph.call_function(aten.clone.default, (permuted,), {"memory_format": torch.contiguous_format})
    back: Node = graph.call_function(aten.permute.default, (copied, [order.index(d) for d in range(len(order))]))
    return back


def sizes_in(graph: Graph, sizes: Iterable[Any]) -> list[Any]:
    """Sizes as graph arguments: symbolic ones are read off a node that has them."""
    return [n if isinstance(n, int) else _symbolic_size(graph, n) for n in sizes]


def _symbolic_size(graph: Graph, size: Any) -> Node:
    """A node holding a symbolic size: a graph input, or a dim of an earlier tensor."""
    node: Node
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt) and str(node.meta["val"]) == str(size):
            return node
        for dim, n in enumerate(shape_of(node)):
            if isinstance(n, torch.SymInt) and str(n) == str(size):
                read: Node = graph.call_function(aten.sym_size.int, (node, dim))
                return read
    raise ValueError(f"no node has the symbolic size {size}")
