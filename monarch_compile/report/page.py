"""A report as one self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined

from monarch_compile.cost.prediction import Quantity
from monarch_compile.report.graphs import site_windows, to_svg
from monarch_compile.report.report import Report, Site, dtype_name
from monarch_compile.version import __version__

if TYPE_CHECKING:
    from monarch_compile.codegen.tuning.resources import Resources

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


class Used(NamedTuple):
    """What a kernel takes, and the pass that it is of."""

    word: str
    resources: Resources


@dataclass(frozen=True)
class Card:
    """A site as the page shows it: the numbers as text, what its kernels take where that is known, the windows of the
    graphs as SVG."""

    site: Site
    resources: tuple[Used, ...]
    rows: tuple[tuple[str, str, str], ...]
    before: str
    after: str


def render(report: Report) -> str:
    """The page: summary, table of sites, and a card for each site with graphs, IR, costs and kernels."""
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            cards=[_card(report, site) for site in report.sites],
            lowered=sum(site.lowered for site in report.sites),
            versions=f"monarch_compile {__version__}, torch {torch.__version__}",
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("monarch_compile.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(gain=_gain, dtype=dtype_name, bytes=lambda value: _count(value, "B"))
    return environment


def _card(report: Report, site: Site) -> Card:
    before, after = site_windows(report.graph.before, report.graph.after, f"{site.graph}/{site.node}")
    return Card(site, _resources(site), _rows(site), to_svg(before), to_svg(after) if site.lowered else "")


def _resources(site: Site) -> tuple[Used, ...]:
    """Of the kernels of the forward and the backward pass."""
    passes = (("forward", site.kernels), ("backward", site.backward_kernels))
    return tuple(Used(word, x.resources) for word, kernels in passes for x in kernels if x.resources is not None)


def _rows(site: Site) -> tuple[tuple[str, str, str], ...]:
    """(quantity, exact form, lowered form) of what is known; a row of exponentials where there are any."""
    exact, monarch = site.exact, site.monarch
    rows = []
    if exact is not None:
        rows = [
            ("FLOPs", _count(exact.flops), _count(monarch.flops) if monarch else "–"),
            ("bytes moved", _count(exact.bytes, "B"), _count(monarch.bytes, "B") if monarch else "–"),
        ]
        if exact.exps != 0:
            rows.append(("exponentials", _count(exact.exps), _count(monarch.exps) if monarch else "–"))
    if site.exact_s is not None and site.monarch_s is not None:
        rows.append(("predicted time", _seconds(site.exact_s), _seconds(site.monarch_s)))
    return tuple(rows)


def _count(value: Quantity, unit: str = "") -> str:
    if not isinstance(value, int):
        return str(value)
    scale, prefix = next(((s, p) for s, p in PREFIXES if value >= s), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}".rstrip()


def _seconds(value: float) -> str:
    scale, unit = next(((s, u) for s, u in TIMES if value >= s), TIMES[-1])
    return f"{value / scale:.3g} {unit}"


def _gain(site: Site) -> str:
    return "–" if site.predicted_speedup is None else f"{site.predicted_speedup:.2f}×"
