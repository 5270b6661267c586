"""The passes, in order, and what a run of them leaves behind."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch.fx import GraphModule, Node

import monarch_compile
from monarch_compile.calls import Launcher, is_trained, launcher_of
from monarch_compile.config import MonarchConfig
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.passes.attention import find_sites
from monarch_compile.passes.canonicalize import (
    drop_inactive_dropout,
    fill_by_shape,
    fold_aliases,
    fold_puts,
    functionalize_private_writes,
)
from monarch_compile.passes.capture import to_aten
from monarch_compile.passes.choose import Choice, choose
from monarch_compile.passes.debug import Dump
from monarch_compile.passes.enclosed import all_graphs, open_bodies, opened_bodies, place_of
from monarch_compile.passes.fusion import keep_apart, may_be_misread
from monarch_compile.passes.graph import SITE_NAME, site_name
from monarch_compile.passes.heads import share_heads
from monarch_compile.passes.lowering import lower
from monarch_compile.passes.memory import must_be_kept
from monarch_compile.passes.nearby import is_no_attention
from monarch_compile.passes.operands import as_they_lie, hoist_scales
from monarch_compile.passes.region import AttentionRegion, Site
from monarch_compile.passes.room import with_room
from monarch_compile.passes.softmaxes import Folded, fold_softmaxes, unfold_softmaxes
from monarch_compile.passes.surroundings import Surroundings, trained_nodes
from monarch_compile.sources import digest_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewrite:
    """The graph before (pre-dispatch ATen, canonical) and after lowering, and a decision for every site found.

    num_apart: how many softmaxes, of exact sites or of layers, were changed, in nothing that they compute, to be kept
    from Inductor's fusion.
    """

    before: GraphModule
    after: GraphModule
    decisions: tuple[Decision, ...]
    num_apart: int = 0
    dump: Dump = field(default_factory=lambda: Dump(None), compare=False)

    @property
    def num_lowered(self) -> int:
        """How many sites were lowered."""
        return sum(d.status == LOWERED for d in self.decisions)


@dataclass
class State:
    """What passes hand to each other."""

    graph: GraphModule
    config: MonarchConfig
    launcher: Launcher
    example_inputs: Sequence[Any]
    before: GraphModule | None = None
    folded: list[tuple[GraphModule, tuple[Folded, ...]]] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    num_apart: int = 0

    def on_each_graph(self, change: Callable[[GraphModule], int]) -> int:
        """Change the graph, and every body in it that may be lowered; returns how many changes there were."""
        return sum(change(gm) for gm in all_graphs(self.graph))


@dataclass(frozen=True)
class Pass:
    """A named step; it changes the state and says what it did."""

    name: str
    run: Callable[[State], str]


def _open_bodies(state: State) -> str:
    return f"{open_bodies(state.graph, trains=is_trained(state.example_inputs))} bodies of other ops opened"


def _fold_aliases(state: State) -> str:
    return f"{state.on_each_graph(fold_aliases)} ops renamed"


def _drop_dropout(state: State) -> str:
    return f"{state.on_each_graph(drop_inactive_dropout)} inactive dropouts removed"


def _fill_by_shape(state: State) -> str:
    return f"{state.on_each_graph(fill_by_shape)} fills given their shape"


def _functionalize(state: State) -> str:
    return f"{state.on_each_graph(functionalize_private_writes)} in-place ops made functional"


def _fold_puts(state: State) -> str:
    return f"{state.on_each_graph(fold_puts)} masked assignments made masked fills"


def _fold_softmaxes(state: State) -> str:
    state.folded = [(gm, fold_softmaxes(gm)) for gm in all_graphs(state.graph)]
    return f"{sum(len(folded) for _, folded in state.folded)} softmaxes written by hand"


def _hoist_scales(state: State) -> str:
    return f"{state.on_each_graph(hoist_scales)} scales moved behind a reshape"


def _match(state: State) -> str:
    found = find_sites(state.graph)
    state.sites = [share_heads(as_they_lie(s)) if isinstance(s, AttentionRegion) else s for s in found]
    return f"{len(state.sites)} attention sites found"


def _choose(state: State) -> str:
    names = _distinct([site_name(site.anchor) + place_of(site.anchor.graph) for site in state.sites])
    if state.config.plan is not None:
        state.config.plan.check_graph(names)
    trained = frozenset() if state.launcher.infers else trained_nodes(state.graph, state.example_inputs)
    around = Surroundings.of(state.graph, state.sites, state.launcher, trained)
    state.choices = [choose(site, name, state.config, around) for site, name in zip(state.sites, names, strict=True)]
    return f"{sum(c.lowers for c in state.choices)} sites to lower"


def _lower(state: State) -> str:
    if not any(c.lowers for c in state.choices):
        return "nothing lowered"
    state.before = _copy_graph(state.graph)
    for choice in state.choices:
        if choice.lowers and choice.region is not None and choice.ir is not None:
            lower(choice.region, choice.facts, choice.ir).meta[SITE_NAME] = choice.decision.name
    for gm in all_graphs(state.graph):
        gm.graph.eliminate_dead_code(must_be_kept)
    return f"{sum(c.lowers for c in state.choices)} sites lowered"


def _keep_apart(state: State) -> str:
    graphs = {gm.graph for gm in all_graphs(state.graph)}
    pairs = zip(state.sites, state.choices, strict=True)
    stay = [site.anchor for site, choice in pairs if not choice.lowers and site.anchor.graph in graphs]
    anchors = {site.anchor for site in state.sites}
    others = [n for graph in graphs for n in graph.nodes if n not in anchors and is_no_attention(n)]
    misread = [anchor for anchor in (*stay, *others) if may_be_misread(anchor)]
    if misread and state.before is None:
        state.before = _copy_graph(state.graph)
    for anchor in misread:
        keep_apart(anchor)
    state.num_apart = len(misread)
    return f"{state.num_apart} softmaxes kept from Inductor's fusion"


def _unfold_softmaxes(state: State) -> str:
    left = sum(unfold_softmaxes(gm, folded) for gm, folded in state.folded)
    return f"{left} softmaxes of exact sites left as they were written"


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, a repeated one numbered from its second place on: a module may run twice in one graph."""
    return [f"{name} #{n}" if (n := names[: i + 1].count(name)) > 1 else name for i, name in enumerate(names)]


PIPELINE: tuple[Pass, ...] = (
    Pass("open_bodies", _open_bodies),
    Pass("fold_aliases", _fold_aliases),
    Pass("drop_inactive_dropout", _drop_dropout),
    Pass("fill_by_shape", _fill_by_shape),
    Pass("functionalize_private_writes", _functionalize),
    Pass("fold_puts", _fold_puts),
    Pass("fold_softmaxes", _fold_softmaxes),
    Pass("hoist_scales", _hoist_scales),
    Pass("match", _match),
    Pass("choose", _choose),
    Pass("lower", _lower),
    Pass("keep_apart", _keep_apart),
    Pass("unfold_softmaxes", _unfold_softmaxes),
)


def rewrite(
    gm: GraphModule, example_inputs: Sequence[Any], config: MonarchConfig, launcher: Launcher | None = None
) -> Rewrite:
    """Run the pipeline on a graph from Dynamo. `gm` itself is not changed.

    launcher: who launches kernels, if not what the mode of `config` says.
    """
    result: Rewrite = with_room(_rewrite, gm, example_inputs, config, launcher or launcher_of(config.mode_patches()))
    return result


def _rewrite(gm: GraphModule, example_inputs: Sequence[Any], config: MonarchConfig, launcher: Launcher) -> Rewrite:
    dump = Dump.from_environment()
    state = State(to_aten(gm, example_inputs), config, launcher, example_inputs)
    dump.graph("capture", state.graph)
    for step in PIPELINE:
        start = time.perf_counter()
        outcome = step.run(state)
        logger.debug("%s: %s (%.1f ms)", step.name, outcome, 1e3 * (time.perf_counter() - start))
        dump.graph(step.name, state.graph)
    for changed in all_graphs(state.graph):
        changed.graph.lint()
        changed.recompile()
    decisions = tuple(c.decision for c in state.choices)
    for decision in decisions:
        logger.info("%s: %s [%s] %s", decision.name, decision.status, decision.code, decision.reason)
        if decision.status != LOWERED:
            place = f"{decision.node} {decision.source}".strip()
            logger.info("  stopped at %s, by %s; would lower with: %s", decision.stage, place, decision.remedy)
    dump.decisions(decisions)
    return Rewrite(state.before or state.graph, state.graph, decisions, state.num_apart, dump)


def _copy_graph(gm: GraphModule) -> GraphModule:
    """A copy that keeps nodes' metadata and shares parameters; bodies that may be lowered are copied too."""
    graph = copy.copy(gm)
    copies = {id(body): _copy_graph(body) for body in opened_bodies(gm)}
    graph._modules = {name: copies.get(id(module), module) for name, module in gm._modules.items()}
    graph.graph = type(gm.graph)()
    mapping: dict[Node, Node] = {}
    result = graph.graph.graph_copy(gm.graph, mapping)
    output = next(iter(gm.graph.find_nodes(op="output")))
    graph.graph.output(result)
    new_output = next(iter(graph.graph.find_nodes(op="output")))
    new_output.meta = dict(output.meta)
    gm.graph.owning_module = gm  # copying a module makes its graph the copy's
    return graph


@cache
def source_digest() -> str:
    """A hash of the package's sources and templates: part of every compile-cache key."""
    return digest_of(Path(monarch_compile.__file__).parent)
