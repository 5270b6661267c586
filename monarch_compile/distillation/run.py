"""One run of `distill`: the teacher's outputs, the groups of sites in turn, the new weights at the end."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.calibration.inputs import Call
from monarch_compile.calibration.instrument import Behaviour, exact, monarch
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.calibration.plan import Plan, SitePlan, site_shape
from monarch_compile.calibration.snapshot import Snapshot, kept
from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import installed
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.distillation import joint, training
from monarch_compile.distillation.checkpoint import Checkpoint, digest
from monarch_compile.distillation.descent import Schedule
from monarch_compile.distillation.groups import (
    Group,
    Masters,
    check_replay,
    groups_of,
    learned_elements,
    masters_of,
    require_finite,
)
from monarch_compile.distillation.joint import Elements, joint_training
from monarch_compile.distillation.recording import Sample, Teacher
from monarch_compile.distillation.report import DISTILLED, DistilledSite, DistillReport, Errors, JointReport
from monarch_compile.distillation.training import Training, loss_of_sites
from monarch_compile.distillation.unlearned import Unlearned
from monarch_compile.distillation.widened import widened
from monarch_compile.errors import InputError
from monarch_compile.family import with_forms
from monarch_compile.progress import Progress

logger = logging.getLogger(__name__)

Pair = tuple[float | None, float | None]
"""The error of the output over the calls, and over the held-out ones; None where unknown."""
SAVE_EVERY = 50
"""Steps between two writes of the checkpoint."""


@dataclass(frozen=True, eq=False)
class Settings:
    """What a run is asked for beside the model and its calls.

    joint: of the steps that all sites take together at the end; None: there are none. train_frozen: whether weights
    that want no gradient may change. hold: where the teacher's inputs are kept, None for
    the model's device. target: what a site is to give. tied: names of parameters whose memory is another tensor's, too,
    with the name of that.
    """

    config: MonarchConfig
    schedule: Schedule
    train_frozen: bool = False
    hold: torch.device | None = None
    checkpoint: str | Path | None = None
    progress: bool = True
    target: Behaviour = exact
    tied: Mapping[str, str] = field(default_factory=dict)
    joint: Schedule | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a group: rows of the report, the new values of the parameters that changed, and which of their
    elements may change."""

    rows: tuple[DistilledSite, ...]
    weights: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    elements: Elements = field(default_factory=dict)


class Run:
    """The state of a run on a model in eval mode. calls: those to learn from, then those that are held out."""

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], held_out: Sequence[Call], state: Snapshot, settings: Settings
    ) -> None:
        self._model, self._settings = model, settings
        self._calls, self._num_calls = [*calls, *held_out], len(calls)
        self._teacher = Teacher(model, self._calls, settings.config, state, settings.hold)
        self._known = {p: name for name, p in model.named_parameters()}
        self._say = Progress("distill", settings.progress)

    def report(self) -> DistillReport:
        """Let every site learn that can, write the new weights into the model, and report."""
        start = time.perf_counter()
        references = [self._output(n, "exact model", self._teacher.count) for n in range(len(self._calls))]
        for failure in self._teacher.probe.failures:
            logger.warning("the passes failed on a graph, which stays exact: %s", failure)
        before = self._output_errors(references, "lowered model")
        groups, rows = self._groups()
        path = self._settings.checkpoint
        checkpoint = Checkpoint.open(path, "" if path is None else self._key(groups))
        weights: dict[nn.Parameter, Tensor] = {}
        elements: dict[nn.Parameter, Tensor] = {}
        for outcome in self._outcomes(groups, checkpoint):
            rows |= {row.name: row for row in outcome.rows}
            weights |= outcome.weights
            elements |= {p: learns.to(p.device) for p, learns in outcome.elements.items()}
        with written(weights):
            after = self._output_errors(references, "distilled model") if weights else before
            found, after = self._learn_jointly(elements, references, after, checkpoint)
            self._say.end()
            calls, held_out = (Errors(*pair) for pair in zip(before, after, strict=True))
            return self._reported(rows, calls, held_out, found, time.perf_counter() - start)

    def _reported(
        self,
        rows: Mapping[str, DistilledSite],
        calls: Errors,
        held_out: Errors,
        found: JointReport | None,
        seconds: float,
    ) -> DistillReport:
        return DistillReport(
            sites=tuple(rows.values()),
            calls=calls,
            held_out=held_out,
            num_calls=self._num_calls,
            num_held_out=len(self._calls) - self._num_calls,
            **asdict(self._settings.schedule),
            joint=found,
            seconds=seconds,
            plan=self._settings.config.plan or self._plan(rows, calls.after),
            model=self._model,
        )

    def _groups(self) -> tuple[list[Group], dict[str, DistilledSite]]:
        """The groups that may learn, and a row of every site, by its name in the order found: why it did not, so
        far."""
        decisions = self._decisions()
        lowered = [name for name, decision in decisions.items() if decision.status == LOWERED]
        if not lowered:
            logger.warning("nothing to distill: no site is lowered under these options")
        groups, refused = groups_of(self._teacher.tape.graphs, lowered, self._known)
        rows = {name: _left(name, Unlearned("exact", decision.reason)) for name, decision in decisions.items()}
        return groups, rows | {name: _left(name, unlearned) for name, unlearned in refused.items()}

    def _learn_jointly(
        self, elements: Elements, references: Sequence[Any], before: Pair, checkpoint: Checkpoint
    ) -> tuple[JointReport | None, Pair]:
        """Let all that has learned, and is written in the model, learn together; what came of it, and the errors of the
        output then. The new weights are kept if the error over the calls fell."""
        schedule = self._settings.joint
        if schedule is None:
            return None, before
        if not elements or before[0] is None or not math.isfinite(before[0]):
            why = "nothing has learned" if not elements else f"the error of the model's output is {before[0]}"
            logger.warning("sites do not learn together: %s", why)
            return None, before
        own = joint_training(self._teacher, references[: self._num_calls], elements, schedule)
        old = {p: p.detach().clone() for p in elements}
        self._train(joint.NUMBER, own, checkpoint)
        checkpoint.current = (joint.NUMBER, own.progressed())
        checkpoint.write()
        with written(own.learned()):
            after = self._output_errors(references, joint.NAME)
        is_better = after[0] is not None and after[0] < before[0]
        if not is_better:
            write(old)
        calls, held_out = (Errors(*pair) for pair in zip(before, after, strict=True))
        unreached = tuple(self._known[p] for p in elements if p in own.unreached)
        if unreached:
            logger.warning("while sites learned together, no gradient reached %s", ", ".join(unreached))
        found = JointReport(calls, held_out, is_better, schedule.steps, schedule.lr, own.seconds, unreached)
        return found, after if is_better else before

    def _output(self, number: int, what: str, run: Callable[[int], Any]) -> Any:
        self._say(f"{what}, call {number + 1} of {len(self._calls)}")
        return kept(run(number))

    def _output_errors(self, references: Sequence[Any], what: str) -> Pair:
        """Relative error of the lowered model's output over the calls, and over the held-out ones."""
        outputs = [self._output(n, what, lambda n: self._teacher.output(n, monarch)) for n in range(len(references))]
        cut = self._num_calls
        return _error_of(references[:cut], outputs[:cut]), _error_of(references[cut:], outputs[cut:])

    def _decisions(self) -> dict[str, Decision]:
        """A decision about each site that has forms, in the order found: one that lowers it, if any."""
        found: dict[str, Decision] = {}
        for result in self._teacher.probe.rewrites:
            for decision in with_forms(result.decisions):
                if decision.name not in found or decision.status == LOWERED:
                    found[decision.name] = decision
        return found

    def _outcomes(self, groups: Sequence[Group], checkpoint: Checkpoint) -> list[Outcome]:
        """What became of each group: learned now, or read from the checkpoint."""
        outcomes = []
        for number, group in enumerate(groups):
            if number not in checkpoint.done:
                outcome = self._learn(number, group, checkpoint)
                weights, elements = (
                    {self._known[p]: value.cpu() for p, value in found.items()}
                    for found in (outcome.weights, outcome.elements)
                )
                rows = [asdict(row) for row in outcome.rows]
                checkpoint.done[number] = {"weights": weights, "elements": elements, "rows": rows}
                checkpoint.current = None
                checkpoint.write()
            outcomes.append(self._read(checkpoint.done[number]))
        return outcomes

    def _read(self, done: Mapping[str, Any]) -> Outcome:
        named = {name: p for p, name in self._known.items()}
        errors = ("calls", "held_out")
        rows = [DistilledSite(**{**row, **{name: Errors(**row[name]) for name in errors}}) for row in done["rows"]]
        weights, elements = ({named[name]: x for name, x in done[kind].items()} for kind in ("weights", "elements"))
        return Outcome(tuple(rows), weights, elements)

    def _key(self, groups: Sequence[Group]) -> str:
        """A hash of all that the new weights depend on."""
        decisions = [decision for result in self._teacher.probe.rewrites for decision in result.decisions]
        lowered = [(d.name, str(d.ir)) for d in decisions if d.status == LOWERED]
        own = (
            self._settings.schedule,
            self._settings.joint,
            self._settings.train_frozen,
            [group.sites for group in groups],
            lowered,
        )
        return digest([repr(own), self._num_calls, self._calls, list(self._model.state_dict().items())])

    def _learn(self, number: int, group: Group, checkpoint: Checkpoint) -> Outcome:
        """Let a group learn, from its start or from where the checkpoint is."""
        names = ", ".join(group.sites)
        calls, held_out = self._samples(names, group)
        elements = self._elements(group, calls, held_out)
        if isinstance(elements, Unlearned):
            return Outcome(tuple(_left(site, elements) for site in group.sites))
        ran = [call for call in calls if call]
        own = Training(names, loss_of_sites(ran), len(ran), group.parameters, elements, self._settings.schedule)
        self._train(number, own, checkpoint)
        self._say(f"{names}: errors")
        return self._judged(group, own, calls, held_out)

    def _train(self, number: int, own: Training, checkpoint: Checkpoint) -> None:
        """Take all steps that are left, from where the checkpoint is."""
        if checkpoint.current is not None and checkpoint.current[0] == number:
            own.resume(checkpoint.current[1])

        def save() -> None:
            checkpoint.current = (number, own.progressed())
            checkpoint.write()

        own.run(self._say, save, SAVE_EVERY)

    def _samples(self, names: str, group: Group) -> tuple[list[list[Sample]], list[list[Sample]]]:
        """What the group's sites are given in each of the calls, and in each of the held-out ones."""
        found = []
        for n in range(len(self._calls)):
            self._say(f"{names}: inputs of call {n + 1} of {len(self._calls)}")
            found.append(self._teacher.samples(n, group.feeds, self._settings.target))
        return found[: self._num_calls], found[self._num_calls :]

    def _elements(
        self, group: Group, calls: Sequence[Sequence[Sample]], held_out: Sequence[Sequence[Sample]]
    ) -> dict[nn.Parameter, Tensor] | Unlearned:
        """Which elements of which parameters learn, or why the group does not."""
        if not any(calls):
            return Unlearned("not_run", "none of the calls runs it")
        every = [sample for call in (*calls, *held_out) for sample in call]
        require_finite(every)
        refused = check_replay(every, masters_of(group.parameters))
        if refused is not None:
            return refused
        graphs, train_frozen = self._teacher.tape.graphs, self._settings.train_frozen
        elements = learned_elements(group, graphs, every, self._known, train_frozen=train_frozen)
        if isinstance(elements, Unlearned):
            return elements
        for name in (self._known[p] for p, learns in elements.items() if learns.any()):
            if name in self._settings.tied:
                return Unlearned("shared_weight", f"{name} shares memory with {self._settings.tied[name]}")
        return elements

    def _judged(
        self, group: Group, own: Training, calls: Sequence[Sequence[Sample]], held_out: Sequence[Sequence[Sample]]
    ) -> Outcome:
        """The group with its new weights, if its error over the calls fell; else with the old ones."""
        weights = own.learned()
        old = masters_of(group.parameters)
        new = {**old, **{p: widened(value) for p, value in weights.items()}}
        whole = [training.relative_error(calls, values) for values in (old, new)]
        reason = ""
        if not whole[1] < whole[0]:
            reason = f"its error went from {whole[0]:.4g} to {whole[1]:.4g}, so that its weights are kept"
            weights, new = {}, old
        rows = []
        for site in group.sites:
            seen, unseen = (_errors_of(site, part, old, new) for part in (calls, held_out))
            code = "no_gain" if reason else DISTILLED
            names = tuple(self._known[p] for p in weights)
            rows.append(DistilledSite(site, code, reason, names, seen, unseen, own.step, own.seconds))
        return Outcome(tuple(rows), weights, {p: own.elements[p] for p in weights})

    def _plan(self, rows: Mapping[str, DistilledSite], output_error: float | None) -> Plan:
        """The forms that the sites were lowered to."""
        decisions = self._decisions()
        sites = tuple(_site_plan(decision, rows[name]) for name, decision in decisions.items())
        graphs = [tuple(d.name for d in with_forms(result.decisions)) for result in self._teacher.probe.rewrites]
        worst = max((site.error for site in sites), default=0.0) if output_error is None else output_error
        return Plan(
            sites=sites,
            graphs=tuple(dict.fromkeys(names for names in graphs if names)),
            budget=worst,
            metric=worst,
            num_samples=self._num_calls,
            num_passes=1,
            device=installed(next(iter(decisions.values())).device).name if decisions else "",
        )


@contextlib.contextmanager
def written(weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Give parameters new values: all of them, or none where this, or what is run with them, is interrupted."""
    old = {parameter: parameter.detach().clone() for parameter in weights}
    try:
        write(weights)
        yield
    except BaseException:
        write(old)
        raise


def write(weights: Mapping[nn.Parameter, Tensor]) -> None:
    """Give parameters new values, and make autocast forget what it has cast of the old ones."""
    for parameter, value in weights.items():
        parameter.data.copy_(value)  # without a new version, of which a snapshot would warn
    torch.clear_autocast_cache()


def _left(site: str, unlearned: Unlearned) -> DistilledSite:
    return DistilledSite(site, unlearned.code, unlearned.reason)


def _errors_of(site: str, calls: Sequence[Sequence[Sample]], old: Masters, new: Masters) -> Errors:
    """Errors of one site of a group over calls; unknown where none of them runs it."""
    own = [[sample for sample in call if sample.feed.site == site] for call in calls]
    return Errors(*(training.relative_error(own, values) for values in (old, new))) if any(own) else Errors()


def _error_of(references: Sequence[Any], outputs: Sequence[Any]) -> float | None:
    """Relative error over several outputs; None where there is no floating tensor in them."""
    try:
        return relative_error(list(references), list(outputs))
    except InputError:
        return None


def _site_plan(decision: Decision, row: DistilledSite) -> SitePlan:
    shape = site_shape(decision.q_shape, decision.v_shape)
    if decision.status != LOWERED:
        return SitePlan(decision.name, shape, None, decision.reason)
    return SitePlan(decision.name, shape, decision.ir.form, error=row.calls.after or 0.0)
