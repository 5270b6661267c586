"""What passes hand to each other, and what a frontend decides about a site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from monarch_compile.calls import Launcher
from monarch_compile.config import MonarchConfig
from monarch_compile.decision import EXACT, LOWERED, Change, Decision
from monarch_compile.passes.capture.enclosed import all_graphs, name_of
from monarch_compile.passes.graph import dtype_of, source_of, value_of
from monarch_compile.refusal import Refusal

if TYPE_CHECKING:
    from monarch_compile.passes.frontends import Frontend


class Site(Protocol):
    """What a frontend finds: a region that it can lower, or a `RefusedSite`."""

    @property
    def anchor(self) -> Node:
        """The node that the site was found by; it names the site."""


@dataclass(frozen=True)
class RefusedSite:
    """What looks like a family's operator and could not be read as a region."""

    anchor: Node
    refusal: Refusal


@dataclass(frozen=True)
class Choice:
    """A decision and what lowering needs to carry it out.

    claims: the nodes that disappear with the rewrite; no two families may claim one. gain: how many times faster the
    lowered form is predicted to be. details: what the frontend has found of the site beside its region.
    """

    decision: Decision
    region: Any = None
    ir: Any = None
    claims: frozenset[Node] = frozenset()
    gain: float = 1.0
    details: Any = None

    @property
    def lowers(self) -> bool:
        """Whether the site is to be rewritten."""
        return self.decision.status == LOWERED


def kept_exact(base: Decision, stage: str, refusal: Refusal) -> Decision:
    """The site stays exact; a refusal without a node leaves the one that `base` has."""
    decision = replace(base, stage=stage, code=refusal.code, reason=refusal.reason)
    if refusal.node is None:
        return decision
    return replace(decision, node=name_of(refusal.node), source=source_of(refusal.node))


def undecided(family: str, name: str, anchor: Node, output: Node | None = None) -> Decision:
    """What is known of a site before anything is decided. output: the node of its result, where it was matched."""
    node = output or anchor
    return Decision(
        family=family,
        name=name,
        status=EXACT,
        stage="match",
        code="",
        reason="",
        node=name_of(node),
        source=source_of(node),
        dtype=dtype_of(anchor),
        device=_device_of(anchor),
    )


def _device_of(node: Node) -> str:
    """Where a node's (first) tensor is: one that it gives, or, if it only writes, one that it is given."""
    values = pytree.tree_leaves([value_of(n) for n in (node, *node.all_input_nodes)])
    return next((x.device.type for x in values if isinstance(x, torch.Tensor)), "cpu")


@dataclass
class State:
    """The graph and what is known of it so far.

    frontends: those of the families that the graph may hold sites of.
    before: a copy of the graph as it was before the first change that is no canonical spelling.
    sites, choices: of all families, in the order in which they were found. num_protected: how many nodes were changed,
    in nothing that they compute, to be kept from Inductor's own rewrites. changes: what was changed beside the sites.
    """

    graph: GraphModule
    config: MonarchConfig
    launcher: Launcher
    example_inputs: Sequence[Any]
    frontends: tuple[Frontend, ...]
    before: GraphModule | None = None
    sites: list[tuple[str, Any]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    num_protected: int = 0
    changes: list[Change] = field(default_factory=list)

    def on_each_graph(self, change: Callable[[GraphModule], int]) -> int:
        """Change the graph, and every body in it that may be lowered; returns how many changes there were."""
        return sum(change(gm) for gm in all_graphs(self.graph))

    def of_family(self, family: str) -> Iterable[tuple[Any, Choice]]:
        """The sites of one family with what was decided about each."""
        pairs = zip(self.sites, self.choices, strict=True)
        return [(site, choice) for (own, site), choice in pairs if own == family]


@dataclass(frozen=True)
class Pass:
    """A named step; it changes the state and says what it did."""

    name: str
    run: Callable[[State], str]
