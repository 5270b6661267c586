"""Which sites learn, and which elements of which weights: sites that share a weight learn together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from monarch_compile.calibration.metrics import ratio, squares_apart
from monarch_compile.distillation.recording import Recorder, Sample, family_of
from monarch_compile.distillation.unlearned import Unlearned
from monarch_compile.distillation.widened import widened
from monarch_compile.errors import DistillationError
from monarch_compile.family import family, forms_of

if TYPE_CHECKING:
    from monarch_compile.passes.feeding import Feed

REPLAY_BOUND = 1e-3
ROUNDED_REPLAY_BOUND = 0.03
"""The largest relative error of what a replay gives, and where the model rounds to 16 bits on the way."""

Masters = Mapping[nn.Parameter, Tensor]
"""Values of parameters, in float32 where these have 16 bits."""


@dataclass(frozen=True, eq=False)
class Group:
    """Sites that share weights, in the order in which they were found, with what leads to them in every graph."""

    sites: tuple[str, ...]
    feeds: tuple[Feed, ...]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that lead to the sites, each once."""
        return tuple(dict.fromkeys(p for feed in self.feeds for p in feed.weights.values()))


def groups_of(
    graphs: Sequence[Recorder], sites: Sequence[str], known: Mapping[nn.Parameter, str]
) -> tuple[list[Group], dict[str, Unlearned]]:
    """Groups of the lowered sites of these names, and why others do not learn. known: the model's parameters."""
    found: dict[str, list[Feed]] = defaultdict(list)
    refused: dict[str, Unlearned] = {}
    varied = set[nn.Parameter]().union(*(graph.varied for graph in graphs))
    for graph in graphs:
        for site, feed in _feeds(graph, known):
            if not isinstance(feed, Unlearned) and not varied.isdisjoint(feed.weights.values()):
                feed = Unlearned("several_layers", "one graph runs it with the weights of several layers")
            if isinstance(feed, Unlearned):
                refused.setdefault(site, feed)
            else:
                found[site].append(feed)
    for site in sites:
        if site not in found and site not in refused:
            refused[site] = Unlearned("in_body", "it stands in the body of another operator")
    names = [site for site in sites if site in found and site not in refused]
    shared = nx.Graph()
    for site in names:
        shared.add_node(site)
        shared.add_edges_from((site, parameter) for feed in found[site] for parameter in feed.weights.values())
    groups = []
    for part in nx.connected_components(shared):
        own = tuple(site for site in names if site in part)
        groups.append(Group(own, tuple(feed for site in own for feed in found[site])))
    return groups, refused


def _feeds(graph: Recorder, known: Mapping[nn.Parameter, str]) -> Iterable[tuple[str, Feed | Unlearned]]:
    """The lowered sites of a graph that have forms, with what leads to each."""
    from monarch_compile.passes.feeding import feed_of
    from monarch_compile.passes.frontends import frontends
    from monarch_compile.passes.graph import FLOATS, SITE_NAME

    ops = [frontend.op for frontend in frontends() if family(frontend.family).forms is not None]
    parameters = {node: p for node, p in graph.parameters.items() if p in known and p.dtype in FLOATS}
    for node in graph.graph.nodes:
        if node.target in ops and SITE_NAME in node.meta:
            learned = forms_of(family_of(node)).learned
            yield node.meta[SITE_NAME], feed_of(node.meta[SITE_NAME], node, learned, parameters)


def masters_of(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Copies of the values of parameters, in float32 where they have 16 bits."""
    return {p: widened(p.detach().clone()) for p in parameters}


def learned_values(sample: Sample, masters: Masters) -> tuple[Tensor, ...]:
    """What the arguments that learn are, with these values of the parameters."""
    from monarch_compile.passes.feeding import replay

    feed = sample.feed
    values = replay(feed.path, {**_at(sample.leaves, masters), **_weights(feed, masters)})
    return tuple(values[node] for node in feed.outputs)


def _weights(feed: Feed, masters: Masters) -> dict[Node, Any]:
    return {node: masters[parameter] for node, parameter in feed.weights.items()}


def _at(leaves: Mapping[Node, Any], masters: Masters) -> dict[Node, Any]:
    """The leaves, on the device of the weights; a parameter among them gets no gradient."""
    device = next(iter(masters.values())).device
    return {
        node: pytree.tree_map_only(Tensor, lambda x: widened(x.detach()).to(device), x) for node, x in leaves.items()
    }


def require_finite(samples: Iterable[Sample]) -> None:
    """Raise DistillationError where the exact model gives a site something that is not finite, or makes it of that."""
    for sample in samples:
        if not all(bool(x.isfinite().all()) for x in (*sample.given, sample.target)):
            raise DistillationError(
                f"{sample.feed.site}: what it is given, or its exact output, is not finite in one of the calls; the "
                "model's weights are as they were"
            )


def check_replay(samples: Sequence[Sample], masters: Masters) -> Unlearned | None:
    """Whether the first run of each feed is what the replay of its path gives, and why it does not learn if not."""
    for sample in (sample for sample in samples if sample.given):
        bound = ROUNDED_REPLAY_BOUND if sample.feed.is_rounded else REPLAY_BOUND
        with torch.no_grad():
            values = learned_values(sample, masters)
        for given, value in zip(sample.given, values, strict=True):
            if given.shape != value.shape or not ratio(*squares_apart(given.to(value.device), value)) <= bound:
                why = "what the path from its weights gives is not what the model gave"
                return Unlearned("not_replayed", f"{sample.feed.site}: {why}")
    return None


def learned_elements(
    group: Group,
    graphs: Sequence[Recorder],
    samples: Sequence[Sample],
    known: Mapping[nn.Parameter, str],
    *,
    train_frozen: bool,
) -> dict[nn.Parameter, Tensor] | Unlearned:
    """For each parameter that may learn, which of its elements lead to the sites, as bool; or why none does.

    An element leads to a tensor if the tensor's gradient reaches it: of random tokens, so that no 0 is by chance.
    """
    free = [p for p in group.parameters if train_frozen or p.requires_grad]
    if not any(p.dim() > 1 for p in free):
        names = ", ".join(known[p] for p in group.parameters)
        return Unlearned("frozen_weight", f"{names} must not change: requires_grad is False")
    elements = {p: torch.zeros_like(p, dtype=torch.bool) for p in free}
    other_uses: list[tuple[nn.Parameter, Tensor, str]] = []
    for graph in graphs:
        nodes = {node: p for node, p in graph.parameters.items() if p in elements}
        if nodes:
            learned, others, reader = _reached(graph, nodes, group, samples)
            other_uses += [(p, found, reader) for p, found in others.items()]
            for p, found in learned.items():
                elements[p] |= found
    for p, found, reader in other_uses:
        if (elements[p] & found).any():
            return Unlearned("shared_weight", f"{known[p]} also leads to {reader}")
    return elements


def _reached(
    graph: Recorder, nodes: Mapping[Node, nn.Parameter], group: Group, samples: Sequence[Sample]
) -> tuple[dict[nn.Parameter, Tensor], dict[nn.Parameter, Tensor], str]:
    """Elements of parameters that the group's sites in a graph read, those that something else reads, and what."""
    from monarch_compile.passes.feeding import other_uses, replay

    first = {sample.feed: sample for sample in reversed(samples)}
    feeds = [feed for feed in group.feeds if feed.op.graph is graph.graph and feed in first]
    by_feeds = {(leaf, user) for feed in feeds for leaf in feed.leaves for user in leaf.users if user in feed.path}
    path, read = other_uses(graph.graph, feeds, nodes)
    masters = {p: value.requires_grad_() for p, value in masters_of({*group.parameters, *nodes.values()}).items()}
    values: dict[Node, Any] = {}
    for feed in feeds:
        values |= _at(first[feed].leaves, masters)
        values |= {node: _random_like(values[node]) for node in feed.tokens}
    for feed in feeds:
        values |= _weights(feed, masters)
    values |= {node: masters[p] for node, p in nodes.items()}
    with torch.enable_grad():
        found = replay(path, values)
        outputs = [found[node] for feed in feeds for node in feed.outputs]
        others = pytree.tree_leaves([found[node] for node in read])
    wanted = {p: masters[p] for p in dict.fromkeys(nodes.values())}
    names = [user.name for node in read for user in node.users if user not in path or (node, user) in by_feeds]
    return _gradients(outputs, wanted), _gradients(others, wanted), ", ".join(dict.fromkeys(names)) or "nothing"


def _gradients(outputs: Sequence[Tensor], wanted: Masters) -> dict[nn.Parameter, Tensor]:
    """Which elements some tensors depend on."""
    totals = [(x * _random_like(x)).sum() for x in outputs if x.requires_grad]
    none = {p: torch.zeros_like(x, dtype=torch.bool) for p, x in wanted.items()}
    if not totals or not wanted:
        return none
    grads = torch.autograd.grad(totals, list(wanted.values()), allow_unused=True, retain_graph=True)
    return {p: none[p] if grad is None else grad != 0 for p, grad in zip(wanted, grads, strict=True)}


def _random_like(x: Tensor) -> Tensor:
    """Standard normal numbers; a tensor that is not floating as it is."""
    if not x.is_floating_point():
        return x
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device, x.dtype)
