"""A plan: for each attention site of a model, exact attention or a Monarch form; made by `calibrate`, kept as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monarch_compile.errors import IRError, PlanError
from monarch_compile.ir import Dim

if TYPE_CHECKING:
    from monarch_compile.family import Form

PLAN_VERSION = 1


def site_shape(q_shape: tuple[Dim, ...], v_shape: tuple[Dim, ...]) -> tuple[int, ...]:
    """(num_heads, head_dim, value_dim), what a plan knows a site by; () where one is unknown or symbolic."""
    sizes = (q_shape[1], q_shape[3], v_shape[3]) if q_shape and v_shape else ()
    known = tuple(n for n in sizes if isinstance(n, int))
    return known if len(known) == len(sizes) else ()


@dataclass(frozen=True)
class SitePlan:
    """What a plan says of one site.

    name: as in a report. shape: (num_heads, head_dim, value_dim), what the model must have there; () where the site
    was not understood. form: the Monarch form, None for exact attention; reason: why exact, "" otherwise.
    error: relative error of the site's own output in that form, 0 where exact. exact_s, monarch_s: predicted seconds
    of all its calls in the calibration's graphs, in exact form and as planned; None where unknown.
    """

    name: str
    shape: tuple[int, ...]
    form: Form | None
    reason: str = ""
    error: float = 0.0
    exact_s: float | None = None
    monarch_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """The forms of all sites of a model whose lowered form approximates, and what was measured with them.

    sites: in the order in which they were found. graphs: the names of these sites of each captured graph that has any.
    budget: what `calibrate` was asked to keep; metric: its metric's value under this plan, the worst of the samples.
    num_samples, num_passes: calls that were calibrated on, and how often the model ran on all of them.
    device: name of the device whose cost model predicted the times.
    """

    sites: tuple[SitePlan, ...]
    graphs: tuple[tuple[str, ...], ...]
    budget: float
    metric: float
    num_samples: int
    num_passes: int
    device: str
    version: int = PLAN_VERSION

    @property
    def num_lowered(self) -> int:
        """How many sites the plan lowers."""
        return sum(site.form is not None for site in self.sites)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what a model must have for this plan to fit it: its sites, their heads and its graphs."""
        shape = [[site.name, *site.shape] for site in self.sites]
        return hashlib.sha256(json.dumps([shape, self.graphs]).encode()).hexdigest()[:16]

    def has(self, name: str) -> bool:
        """Whether the plan says anything of a site."""
        return any(site.name == name for site in self.sites)

    def site(self, name: str, shape: tuple[int, ...]) -> SitePlan:
        """The entry of a site found in a model.

        Raises:
            PlanError: the plan has no such site, or one of another shape.
        """
        found = next((site for site in self.sites if site.name == name), None)
        if found is None:
            raise PlanError(f"the plan does not fit this model: it has no site {name!r}; it has {self._names()}")
        if found.shape and shape and found.shape != shape:
            raise PlanError(
                f"the plan does not fit this model: site {name!r} has (num_heads, head_dim, value_dim) {shape}, "
                f"the plan's has {found.shape}"
            )
        return found

    def check_graph(self, names: Iterable[str]) -> None:
        """Raise PlanError where a graph with these sites is none of those that the plan was made for."""
        found = tuple(names)
        if found and found not in self.graphs:
            graphs = "; ".join(", ".join(graph) for graph in self.graphs) or "none"
            raise PlanError(
                f"the plan does not fit this model: a captured graph has the sites {', '.join(found)}, "
                f"and the plan's graphs have {graphs}"
            )

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON and return the path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        sites = [asdict(site) | {"form": _written(site.form)} for site in self.sites]
        content = {"fingerprint": self.fingerprint, **asdict(self), "sites": sites}
        target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return target

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanError: the file is missing, is no plan, was changed in a way that breaks it, or has another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"cannot read a plan from {path}: {error}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != PLAN_VERSION:
            raise PlanError(f"{path} is a plan of version {version!r}; this monarch_compile reads {PLAN_VERSION}")
        return _parsed(content, path)

    def __str__(self) -> str:
        return "\n".join([*_table(self.sites), self._summary()])

    def _summary(self) -> str:
        exact, planned = (sum(t or 0.0 for t in times) for times in self._times())
        gain = (
            f"; predicted attention time on {self.device} {1e3 * exact:.3g} -> {1e3 * planned:.3g} ms"
            if planned
            else ""
        )
        return (
            f"{self.num_lowered} of {len(self.sites)} sites lowered; metric {self.metric:.4g} of budget "
            f"{self.budget:.4g}, worst of {self.num_samples} samples, in {self.num_passes} passes{gain}"
        )

    def _times(self) -> tuple[list[float | None], list[float | None]]:
        return [s.exact_s for s in self.sites], [s.monarch_s for s in self.sites]

    def _names(self) -> str:
        return ", ".join(site.name for site in self.sites) or "no site"


def _written(form: Form | None) -> dict[str, Any] | None:
    return None if form is None else {"family": form.family, **form.stored()}


def _read(form: Mapping[str, Any] | None) -> Form | None:
    if form is None:
        return None
    from monarch_compile.family import forms_of

    options = dict(form)
    return forms_of(options.pop("family")).read(**options)


def _parsed(content: dict[str, Any], path: str | Path) -> Plan:
    stored = content.pop("fingerprint", None)
    try:
        sites = tuple(
            SitePlan(
                **{
                    **site,
                    "shape": tuple(site["shape"]),
                    "form": _read(site["form"]),
                }
            )
            for site in content.pop("sites")
        )
        graphs = tuple(tuple(names) for names in content.pop("graphs"))
        plan = Plan(sites=sites, graphs=graphs, **content)
    except (TypeError, KeyError, IRError) as error:
        raise PlanError(f"{path} is not a plan: {error}") from error
    if stored != plan.fingerprint:
        raise PlanError(f"{path} is broken: its fingerprint is {stored!r}, its content's is {plan.fingerprint!r}")
    return plan


def _table(sites: Iterable[SitePlan]) -> list[str]:
    sites = list(sites)
    options = list(dict.fromkeys(name for site in sites if site.form is not None for name in site.form.stored()))
    rows = [("site", "form", *options, "error", "predicted"), *(_cells(site, options) for site in sites)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _cells(site: SitePlan, options: Sequence[str]) -> tuple[str, ...]:
    if site.form is None:
        return (site.name, "exact", *("-" for _ in options), "-", site.reason)
    gain = f"{site.exact_s / site.monarch_s:.2f}x" if site.exact_s and site.monarch_s else "-"
    values = site.form.stored()
    return (site.name, "monarch", *(str(values.get(name, "-")) for name in options), f"{site.error:.3f}", gain)
