"""The passes, in order, and what a run of them leaves behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch.fx import GraphModule, Node

import monarch_compile
from monarch_compile.calls import Launcher, is_trained, launcher_of
from monarch_compile.config import MonarchConfig
from monarch_compile.decision import EXACT, LOWERED, Change, Decision
from monarch_compile.family import family, sites_in_words
from monarch_compile.passes.canonical import (
    drop_inactive_dropout,
    fill_by_shape,
    fold_aliases,
    fold_puts,
    functionalize_private_writes,
)
from monarch_compile.passes.capture.enclosed import all_graphs, copy_graph, open_bodies, place_of
from monarch_compile.passes.capture.trace import to_aten
from monarch_compile.passes.dump import Dump
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.frontends import Frontend, frontends
from monarch_compile.passes.graph import SITE_NAME, site_name
from monarch_compile.passes.memory import must_be_kept
from monarch_compile.passes.stack import with_stack_chunk
from monarch_compile.passes.state import Choice, Pass, RefusedSite, State, kept_exact
from monarch_compile.passes.surroundings import Surroundings, trained_nodes
from monarch_compile.refusal import Refusal
from monarch_compile.sources import digest_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rewrite:
    """The graph before (pre-dispatch ATen, canonical) and after lowering, and a decision for every site found.

    num_protected: how many nodes were changed, in nothing that they compute, to be kept from Inductor's own rewrites.
    changes: what was changed beside the sites.
    """

    before: GraphModule
    after: GraphModule
    decisions: tuple[Decision, ...]
    num_protected: int = 0
    dump: Dump = field(default_factory=lambda: Dump(None), compare=False)
    changes: tuple[Change, ...] = ()

    @property
    def num_lowered(self) -> int:
        """How many sites were lowered."""
        return sum(d.status == LOWERED for d in self.decisions)


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


def _match(state: State) -> str:
    state.sites = [(frontend.family, site) for frontend in state.frontends for site in frontend.find(state.graph)]
    return f"{sites_in_words(own for own, _ in state.sites)} found"


def _choose(state: State) -> str:
    names = _distinct([site_name(site.anchor) + place_of(site.anchor.graph) for _, site in state.sites])
    plan = state.config.plan
    if plan is not None:
        pairs = zip(state.sites, names, strict=True)
        plan.check_graph(name for (own, _), name in pairs if plan.has(name) or family(own).forms is not None)
    trained = frozenset() if state.launcher.infers else trained_nodes(state.graph, state.example_inputs)
    matched = sum(not isinstance(site, RefusedSite) for _, site in state.sites)
    around = Surroundings.of(state.graph, matched, state.launcher, trained)
    layouts = Layouts()  # one for all sites: no graph changes until the pass ends
    choose = {frontend.family: frontend.choose for frontend in state.frontends}
    state.choices = [
        choose[own](site, name, state.config, around, layouts)
        for (own, site), name in zip(state.sites, names, strict=True)
    ]
    return f"{_to_lower(state)} to lower"


def _arbitrate(state: State) -> str:
    """Of sites of different families that claim one node, the one that gains most is lowered."""
    families = [own for own, _ in state.sites]
    refused = 0
    order = sorted(range(len(families)), key=lambda place: -state.choices[place].gain)
    taken: dict[Node, int] = {}
    for place in order:
        choice = state.choices[place]
        if not choice.lowers:
            continue
        others = {taken[node] for node in choice.claims if node in taken}
        winner = next((other for other in sorted(others) if families[other] != families[place]), None)
        if winner is None:
            taken.update(dict.fromkeys(choice.claims, place))
            continue
        kept = state.choices[winner].decision.name
        why = f"it shares nodes with {kept}, of family {families[winner]}, which gains more"
        state.choices[place] = Choice(
            kept_exact(replace(choice.decision, status=EXACT), "cost", Refusal("claimed", why))
        )
        refused += 1
    return f"{refused} sites left to other families"


def _lower(state: State) -> str:
    if not any(c.lowers for c in state.choices):
        return "nothing lowered"
    state.before = copy_graph(state.graph)
    lower = {frontend.family: frontend.lower for frontend in state.frontends}
    for (own, _), choice in zip(state.sites, state.choices, strict=True):
        if choice.lowers:
            lower[own](choice).meta[SITE_NAME] = choice.decision.name
    for gm in all_graphs(state.graph):
        gm.graph.eliminate_dead_code(must_be_kept)
    return f"{_to_lower(state)} lowered"


def _to_lower(state: State) -> str:
    return sites_in_words(choice.decision.family for choice in state.choices if choice.lowers)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, a repeated one numbered from its second place on: a module may run twice in one graph."""
    return [f"{name} #{n}" if (n := names[: i + 1].count(name)) > 1 else name for i, name in enumerate(names)]


def pipeline(families: Sequence[Frontend]) -> tuple[Pass, ...]:
    """The passes in order, those of the families among them."""
    return (
        Pass("open_bodies", _open_bodies),
        Pass("fold_aliases", _fold_aliases),
        Pass("drop_inactive_dropout", _drop_dropout),
        Pass("fill_by_shape", _fill_by_shape),
        Pass("functionalize_private_writes", _functionalize),
        Pass("fold_puts", _fold_puts),
        *(step for family in families for step in family.prepare),
        Pass("match", _match),
        Pass("choose", _choose),
        Pass("arbitrate", _arbitrate),
        Pass("lower", _lower),
        *(step for family in families for step in family.finish),
    )


def rewrite(
    gm: GraphModule, example_inputs: Sequence[Any], config: MonarchConfig, launcher: Launcher | None = None
) -> Rewrite:
    """Run the pipeline on a graph from Dynamo. `gm` itself is not changed.

    Hooks on saved tensors rest meanwhile: a checkpoint around the call would count what tracing saves.

    launcher: who launches kernels, if not what the mode of `config` says.
    """
    launcher = launcher or launcher_of(config.mode_patches())
    with _disable_saved_tensors_hooks_during_tracing():
        result: Rewrite = with_stack_chunk(_rewrite, gm, example_inputs, config, launcher)
    return result


def _rewrite(gm: GraphModule, example_inputs: Sequence[Any], config: MonarchConfig, launcher: Launcher) -> Rewrite:
    dump = Dump.from_environment()
    graph = to_aten(gm, example_inputs)
    state = State(graph, config, launcher, example_inputs, frontends(graph))
    dump.graph("capture", state.graph)
    for step in pipeline(state.frontends):
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
    for change in state.changes:
        logger.info("%s: %s", change.name, change.reason)
    dump.decisions(decisions)
    changes = tuple(state.changes)
    return Rewrite(state.before or state.graph, state.graph, decisions, state.num_protected, dump, changes)


@cache
def source_digest() -> str:
    """A hash of the package's sources and templates: part of every compile-cache key."""
    return digest_of(Path(monarch_compile.__file__).parent)
