"""What `distill` has done: for each site the error before and after, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from monarch_compile.calibration.plan import Plan
from monarch_compile.distillation.unlearned import REMEDIES

DISTILLED = "distilled"
HEADINGS: Sequence[str] = ("site", "outcome", "before", "after", "unseen before", "unseen after", "steps", "seconds")


@dataclass(frozen=True)
class Errors:
    """Relative errors, against the exact model with its old weights, of the lowered form: with the old weights
    (before), and with the new ones (after); None where unknown."""

    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class DistilledSite:
    """What became of a site.

    name: as in a report or a plan. code: "distilled", or one of `unlearned.REMEDIES`: the site is as it was; reason:
    why, "" where it was distilled. weights: the parameters that changed. calls, held_out: errors of the site's own
    output, on what the exact model gives it in the calls and in the held-out calls. steps, seconds: of its group, the
    sites that share weights.
    """

    name: str
    code: str
    reason: str = ""
    weights: tuple[str, ...] = ()
    calls: Errors = Errors()
    held_out: Errors = Errors()
    steps: int = 0
    seconds: float = 0.0

    @property
    def remedy(self) -> str:
        """What would make the site learn; "" where it has."""
        return REMEDIES.get(self.code, "")


@dataclass(frozen=True)
class JointReport:
    """What became of the steps that all sites took together.

    calls, held_out: errors of the model's output before and after them. kept: whether the new weights were: the error
    over the calls fell. seconds: of the steps, in this process and those that it went on from. unreached: parameters
    that were to learn and that no gradient has reached, for one behind a graph break.
    """

    calls: Errors
    held_out: Errors
    kept: bool
    steps: int
    lr: float
    seconds: float
    unreached: tuple[str, ...] = ()


@dataclass(frozen=True)
class DistillReport:
    """What `distill` returns; `print` it, or `save` it.

    sites: in the order in which they were found. calls, held_out: errors of the model's output, of all floating
    tensors in it. model: the module with the new weights. plan: under which it is to be compiled.
    num_calls, num_held_out, steps, lr, seed: what was asked for. joint: of the steps that all sites took together; None
    where they took none. The errors of sites, also those in the plan, are from before these steps. seconds: all that
    `distill` took in this process.
    """

    sites: tuple[DistilledSite, ...]
    calls: Errors
    held_out: Errors
    num_calls: int
    num_held_out: int
    steps: int
    lr: float
    seed: int
    seconds: float
    plan: Plan = field(repr=False, compare=False)
    model: nn.Module = field(repr=False, compare=False)
    joint: JointReport | None = None

    @property
    def num_distilled(self) -> int:
        """How many sites have learned."""
        return sum(site.code == DISTILLED for site in self.sites)

    def site(self, name: str) -> DistilledSite:
        """The site of a name.

        Raises:
            KeyError: there is none.
        """
        found = next((site for site in self.sites if site.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the model; the plan has a file of its own (`Plan.save`)."""
        names = ("num_calls", "num_held_out", "steps", "lr", "seed", "seconds")
        sites = [asdict(site) | {"remedy": site.remedy} for site in self.sites]
        joint = None if self.joint is None else asdict(self.joint)
        errors = {"calls": asdict(self.calls), "held_out": asdict(self.held_out), "joint": joint}
        return {"sites": sites, **errors, **{name: getattr(self, name) for name in names}}

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON and return the path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return target

    def __str__(self) -> str:
        rows = [HEADINGS, *(_cells(site) for site in self.sites)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        why = [f"{site.name}: {site.reason}; would learn with: {site.remedy}" for site in self.sites if site.reason]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], *why, self._summary()])

    def _summary(self) -> str:
        texts = [f"{self.num_distilled} of {len(self.sites)} sites distilled on {self.num_calls} calls"]
        for what, errors in (("output", self.calls), (f"output of {self.num_held_out} unseen calls", self.held_out)):
            if errors.before is not None:
                texts.append(f"relative error of the {what} {_number(errors.before)} -> {_number(errors.after)}")
        if self.joint is not None:
            pair = f"{_number(self.joint.calls.before)} -> {_number(self.joint.calls.after)}"
            texts.append(f"{self.joint.steps} steps together, {pair}{'' if self.joint.kept else ', not kept'}")
        return f"{'; '.join(texts)}; {self.seconds:.1f} s"


def _cells(site: DistilledSite) -> Sequence[str]:
    errors = (site.calls.before, site.calls.after, site.held_out.before, site.held_out.after)
    spent = (str(site.steps), f"{site.seconds:.1f}") if site.steps else ("-", "-")
    return (site.name, site.code, *map(_number, errors), *spent)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
