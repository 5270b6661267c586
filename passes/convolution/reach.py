"""How far a region may reach around its transforms: into what runs in their modes, and belongs to no other region."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import Node

from monarch_compile.passes.graph import switches_mode


@dataclass(frozen=True)
class Reach:
    """Places of a graph's nodes and of its switches of grad mode and autocast, and the place of the inverse transform.

    taken: nodes that other regions replace.
    """

    places: dict[Node, int]
    switches: tuple[int, ...]
    own: int
    taken: frozenset[Node]

    @staticmethod
    def of(node: Node, taken: Iterable[Node]) -> Reach:
        """That of the region around an inverse transform."""
        places = {n: place for place, n in enumerate(node.graph.nodes)}
        switches = tuple(place for n, place in places.items() if switches_mode(n))
        return Reach(places, switches, places[node], frozenset(taken))

    def covers(self, node: Node) -> bool:
        """Whether a node may be a part of the region."""
        same_modes = bisect(self.switches, self.places[node]) == bisect(self.switches, self.own)
        return same_modes and node not in self.taken
