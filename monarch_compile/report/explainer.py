"""`explain`: run the passes on a model without compiling it, and report what they would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
from torch import Tensor

from monarch_compile.calibration.instrument import Probe, Switch, capture, monarch, size_hints
from monarch_compile.calibration.metrics import ratio, relative_error, squares_apart
from monarch_compile.calibration.snapshot import Snapshot, kept
from monarch_compile.calls import launcher_of
from monarch_compile.config import parse_options
from monarch_compile.decision import LOWERED
from monarch_compile.family import SiteCall
from monarch_compile.report.graphs import to_networkx
from monarch_compile.report.kernels import capability_here
from monarch_compile.report.report import GraphPair, Report, Site, site_of


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    measure: bool = False,
    resources: bool = False,
    **kwargs: Any,
) -> Report:
    """Report what ``torch.compile(model, backend="monarch", options=options)`` does with this call's shapes.

    The model runs eagerly on `args` and `kwargs`, in its own train or eval mode and under the caller's grad mode.
    Nothing is compiled, and a model that is compiled already stays as it is.

    Args:
        model: a module or function, compiled or not.
        options: as for torch.compile, those of `MonarchConfig`; of Inductor's own keys, those count that
            decide who launches kernels.
        measure: also compare the exact and the lowered form on these inputs, where that is an approximation. The model
            runs once with these sites exact, where the relative error of each is taken on what the exact model gives
            it, and once lowered, for the relative error of the model's output. What is exact up to rounding (long
            convolutions) runs lowered both times, and has no error here. Both runs start from the same random state,
            buffers, attributes and inputs, which are put back in the end; what a `Snapshot` cannot save (parameters
            that forward writes to, globals, attributes of classes, what hooks hold) a model must not change. Without it
            the model runs once, unchanged.
        resources: also compile the kernels of lowered sites, and those of their gradients where they train, for the GPU
            at hand (without one, for sm_90), and report registers, spills, shared memory and bytes moved; this takes
            seconds for each kernel.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
        PlanError: the options' plan cannot be read or does not fit the model.
        InputError: `measure` is asked for and the model's output holds no floating tensor.
    """
    config, patches = parse_options(options)
    meter = Meter()
    probe = Probe(config, Switch(meter) if measure else None, launcher=launcher_of(patches))
    run = capture(model, probe)
    if probe.switch is None:
        run(*args, **kwargs)
        return _report(probe, resources=resources)
    with Snapshot(model, args, kwargs) as state:
        output = kept(run(*args, **kwargs))
        state.restore()
        probe.switch.behaviour = monarch
        output_error = relative_error(output, run(*args, **kwargs))
    return _report(probe, meter.errors(), output_error, resources=resources)


@dataclass(eq=False)
class Meter:
    """What runs both forms, keeps the sums of squares of each site, and goes on with the exact form."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, call: SiteCall) -> Tensor:
        """The exact output, its difference from the Monarch form noted."""
        output = call.exact()
        difference, norm = squares_apart(output, call.monarch())
        before = self.sums.get(call.site, (0.0, 0.0))
        self.sums[call.site] = (before[0] + difference, before[1] + norm)
        return output

    def errors(self) -> dict[str, float]:
        """Relative error of each site's output, over all of its calls."""
        return {site: ratio(*sums) for site, sums in self.sums.items()}


def _report(
    probe: Probe,
    errors: Mapping[str, float] | None = None,
    output_error: float | None = None,
    *,
    resources: bool = False,
) -> Report:
    """Everything that the passes decided, as a value."""
    from monarch_compile.passes.capture.enclosed import all_graphs, path_of

    sites: list[Site] = []
    capability = capability_here() if resources else None
    before, after = [nx.DiGraph()], [nx.DiGraph()]
    for index, result in enumerate(probe.rewrites):
        for old, new in zip(all_graphs(result.before), all_graphs(result.after), strict=True):
            names_before, names_after = ([n.name for n in gm.graph.nodes] for gm in (old, new))
            prefix = f"{index}/{path_of(old.graph)}".removesuffix("/")
            before.append(to_networkx(old.graph, prefix, names_after))
            after.append(to_networkx(new.graph, prefix, names_before, after=True))
        hints = size_hints(result.before)
        sites += [
            replace(
                site_of(d, hints, index, capability), error=(errors or {}).get(d.name) if d.status == LOWERED else None
            )
            for d in result.decisions
        ]
    pair = GraphPair(nx.compose_all(before), nx.compose_all(after))
    num_graphs = len(probe.rewrites) + len(probe.failures)
    changes = tuple(change for result in probe.rewrites for change in result.changes)
    return Report(tuple(sites), pair, num_graphs, tuple(probe.failures), output_error, changes)
