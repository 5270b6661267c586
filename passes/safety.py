"""What has to hold of any region that is rewritten: nothing it reads is written meanwhile, and it runs in one mode."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Graph, Node

from monarch_compile.passes.capture.enclosed import enclosing, given_value
from monarch_compile.passes.graph import ancestors_of, switches_mode
from monarch_compile.passes.memory import Write, storages_of, strided_reader, writes_of

Found = tuple[str, Node] | None
"""A reason and the node that is in the way; None where nothing is."""


@dataclass(frozen=True)
class Footprint:
    """What a rewrite touches.

    inside: nodes that it replaces or looks through. read: nodes that it reads. proved: nodes of which something was
    proved, so that all they are made of counts as read.
    """

    output: Node
    inside: tuple[Node, ...]
    read: tuple[Node, ...]
    proved: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Order:
    """The places of a graph's nodes, and its writes."""

    places: dict[Node, int]
    writes: tuple[Write, ...]

    @staticmethod
    def of(graph: Graph) -> Order:
        return Order({node: i for i, node in enumerate(graph.nodes)}, writes_of(graph))


def write_between(footprint: Footprint, order: Order) -> Found:
    """A write between the making of a value and its last reading, of which the rewrite knows nothing."""
    ancestors = set(ancestors_of(footprint.proved))
    found = _write_between(_readings(footprint, ancestors, order.places), order.places, order.writes)
    body = enclosing(footprint.output.graph)
    while found is None and body is not None:
        graph = body.call.graph
        ancestors = set(ancestors_of(value for node in ancestors if (value := given_value(node)) is not None))
        outer = Order.of(graph)
        found = _write_between(_readings_before(body.call, ancestors, outer.places), outer.places, outer.writes)
        body = enclosing(graph)
    return found


def _write_between(readings: Iterable[tuple[Node, int]], places: dict[Node, int], writes: Sequence[Write]) -> Found:
    for node, until in readings:
        for write in writes:
            if places[node] < write.place < until and write.storages & storages_of(node):
                return f"{write.node.target} writes in place to memory that is read here", write.node
    return None


def _readings(footprint: Footprint, ancestors: set[Node], places: dict[Node, int]) -> Iterator[tuple[Node, int]]:
    """Nodes that the rewrite reads or looks through, with the place where the last such reading happens."""
    for node in (*footprint.read, *footprint.inside):
        yield node, places[footprint.output]
    yield from _readings_among(ancestors, places)


def _readings_before(call: Node, ancestors: set[Node], places: dict[Node, int]) -> Iterator[tuple[Node, int]]:
    """Of what a call gives to its body and what that is made of."""
    yield from ((node, places[call]) for node in call.all_input_nodes if node in ancestors)
    yield from _readings_among(ancestors, places)


def _readings_among(nodes: set[Node], places: dict[Node, int]) -> Iterator[tuple[Node, int]]:
    """Some nodes, with the place where the last of them reads each."""
    for node in nodes:
        yield node, max((places[user] for user in node.users if user in nodes), default=0)


def mode_switch(footprint: Footprint, order: Order) -> Found:
    """Grad mode or autocast switched on or off inside the region: its parts would not all run as they were written."""
    first = min(order.places[n] for n in footprint.inside)
    for node, place in order.places.items():
        if first < place < order.places[footprint.output] and switches_mode(node):
            return "grad mode or autocast changes between its first and its last operator", node
    return None


def strided_read(footprint: Footprint) -> Found:
    """Whether the result's memory is read past its shape."""
    reader = strided_reader(footprint.output)
    return None if reader is None else ("the output is read through as_strided", reader)
