"""`explain`: run the passes on a model without compiling it, and report what they would do."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch.fx import GraphModule

from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.graphs import to_networkx
from monarch_compile.report import GraphPair, Report, Site, site_of


def explain(model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """Report what ``torch.compile(model, backend="monarch", options=options)`` does with this call's shapes.

    The model runs once, eagerly and unchanged, on `args` and `kwargs`: in its own train or eval mode and under the
    caller's grad mode. Nothing is compiled, and a model that is compiled already stays as it is.

    Args:
        model: a module or function, compiled or not.
        options: as for torch.compile, those of `MonarchConfig`; Inductor's own keys are checked and ignored.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
    """
    config, _ = parse_options(options)
    collector = Collector(config)
    torch.compile(_fresh(_uncompiled(model)), backend=collector, dynamic=False)(*args, **kwargs)
    return collector.report()


@dataclass(eq=False)
class Collector:
    """A Dynamo backend that runs the passes on each graph, keeps what they decided, and leaves the graph as it is."""

    config: MonarchConfig
    sites: list[Site] = field(default_factory=list)
    before: list[nx.DiGraph] = field(default_factory=list)
    after: list[nx.DiGraph] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_graphs: int = 0

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Collect what the passes do with `gm`, and return it to run eagerly."""
        self._collect(gm, example_inputs)
        self.num_graphs += 1
        run: Callable[..., Any] = gm.forward
        return run

    def report(self) -> Report:
        """Everything collected, as a value."""
        pair = GraphPair(nx.compose_all([nx.DiGraph(), *self.before]), nx.compose_all([nx.DiGraph(), *self.after]))
        return Report(tuple(self.sites), pair, self.num_graphs, tuple(self.failures))

    def _collect(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        from monarch_compile.passes.pipeline import rewrite

        try:
            result = rewrite(gm, example_inputs, self.config)
        except Exception as error:  # the backend falls back on the same error; a report has to say so, not to fail
            self.failures.append(f"graph {self.num_graphs}: {error!r}")
            return
        index, before, after = self.num_graphs, result.before.graph, result.after.graph
        names_before, names_after = ([n.name for n in graph.nodes] for graph in (before, after))
        self.before.append(to_networkx(before, str(index), names_after))
        self.after.append(to_networkx(after, str(index), names_before, after=True))
        hints = _hints(result.before)
        self.sites += [site_of(decision, hints, index) for decision in result.decisions]


def _hints(gm: GraphModule) -> dict[str, int]:
    """The value that each symbolic size in `gm` had in the call."""
    values = (node.meta.get("val") for node in gm.graph.nodes)
    sizes: list[Any] = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    return {str(size): int(size.node.hint) for size in sizes if isinstance(size, torch.SymInt) and size.node.has_hint()}


def _uncompiled(model: Callable[..., Any]) -> Callable[..., Any]:
    """What was given to torch.compile, for a model that is compiled already."""
    inner = getattr(model, "_orig_mod", None) or getattr(model, "_torchdynamo_orig_callable", None)
    return _uncompiled(inner) if inner is not None else model


def _fresh(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `model`, with a code object of its own: Dynamo's caches hang on code objects, so neither
    the user's compiled functions nor an earlier `explain` meet this one."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
