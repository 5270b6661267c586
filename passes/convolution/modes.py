"""Grad mode and autocast: which nodes run in the modes that a convolution's transforms run in."""

from __future__ import annotations

from bisect import bisect
from dataclasses import dataclass

from torch.fx import Graph, Node

from monarch_compile.passes.graph import switches_mode


@dataclass(frozen=True)
class Modes:
    """Places of a graph's nodes and of its switches of modes, and the place of the node that others are compared to."""

    places: dict[Node, int]
    switches: tuple[int, ...]
    own: int

    @staticmethod
    def of(graph: Graph, node: Node) -> Modes:
        """Those of a graph, compared to one of its nodes."""
        places = {n: place for place, n in enumerate(graph.nodes)}
        switches = tuple(place for n, place in places.items() if switches_mode(n))
        return Modes(places, switches, places[node])

    def covers(self, node: Node) -> bool:
        """Whether no mode is switched between a node and the one that it is compared to."""
        return bisect(self.switches, self.places[node]) == bisect(self.switches, self.own)
