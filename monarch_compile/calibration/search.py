"""`calibrate`: for each site whose lowered form approximates, the exact or a Monarch form, under an error budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.calibration.inputs import Call, calls_of
from monarch_compile.calibration.instrument import Probe, Switch, capture, exact, size_hints
from monarch_compile.calibration.metrics import ratio, relative_error, squares_apart
from monarch_compile.calibration.plan import Plan, SitePlan, site_shape
from monarch_compile.calibration.selection import Assignment, Candidate, Growth, fitted_power, pareto, select
from monarch_compile.calibration.snapshot import Snapshot, kept
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.cost.devices import Device, installed
from monarch_compile.decision import Decision
from monarch_compile.errors import InputError
from monarch_compile.family import Form, Occurrence, SiteCall, forms_of, total_seconds, with_forms
from monarch_compile.progress import Progress

logger = logging.getLogger(__name__)

Metric = Callable[[Any, Any], float]

MAX_TRIALS = 6
"""How many assignments are measured after the sites' weights are known."""
MAX_BISECTIONS = 30
GOOD_ENOUGH = 0.8
"""The search ends with an assignment that uses at least this share of the budget."""
CAPTURE_LIMIT = 64
"""Graphs that Dynamo may capture for one function: samples may have many shapes."""


def calibrate(
    model: Callable[..., Any],
    inputs: Any,
    *,
    budget: float,
    metric: Metric | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Plan:
    """Choose for each attention site exact attention or a Monarch form: least predicted time under an error budget.

    Only sites whose lowered form is an approximation are in the plan. What is exact up to rounding (long convolutions)
    runs lowered all along: there is nothing to choose, and plans say nothing of it.

    The model runs eagerly, without gradients, in its own train or eval mode. The metric bounds the worst call, not the
    mean. The plan's metric is a measured one; the same inputs give the same plan.

    Every run starts from the random state, buffers, attributes and inputs that there were before `calibrate`, and they
    are put back in the end; what a `Snapshot` cannot save (parameters that forward writes to, globals, attributes of
    classes, what hooks hold) a model must not change. A call does not see what the calls before it left behind: steps
    that build on one another, such as decoding with a cache, are one call of a function that takes them in turn.

    Args:
        model: a module or function, compiled or not.
        inputs: a list of calls; each a tensor, a tuple of positional arguments, a dict of keyword arguments, or
            ((positional, ...), {keyword: ...}). Something else than a list is one call.
        budget: what `metric` may reach on any call; 0 keeps every site exact.
        metric: (reference_output, output) -> float, a distance that is 0 for equal outputs; the relative error of the
            floating tensors in the output when None.
        options: those of `MonarchConfig`. A form option given here (block_size, num_iters, init, pad, window, prefix)
            is kept; the others are searched.
        progress: say on stderr what is being done.

    Raises:
        ConfigError: an option is unknown or has a value that is not allowed.
        InputError: the budget is negative, there are no inputs, or the metric is no distance.
    """
    if not budget >= 0:
        raise InputError(f"budget must be at least 0; found {budget}")
    config, _ = parse_options(options)
    if config.plan is not None:
        raise InputError("calibrate makes a plan: its options cannot have one already")
    fixed = {name: value for name, value in (options or {}).items() if value != "auto"}
    config = replace(config, policy="always", strict=False)
    calls = calls_of(inputs)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=CAPTURE_LIMIT), Snapshot(model, calls) as state:
        return _Search(model, calls, state, metric or relative_error, config, fixed, progress).run(budget)


class _Search:
    """The state of one calibration."""

    def __init__(
        self,
        model: Callable[..., Any],
        calls: list[Call],
        state: Snapshot,
        metric: Metric,
        config: MonarchConfig,
        fixed: Mapping[str, Any],
        progress: bool,
    ) -> None:
        self._calls, self._metric, self._fixed = calls, metric, fixed
        self._say = Progress("calibrate", progress)
        self._state = state
        self._switch = Switch()
        self._probe = Probe(config, self._switch)
        self._model = capture(model, self._probe)
        self._references: list[Any] = []
        self._measured: dict[tuple[tuple[str, Candidate], ...], float] = {}
        self._num_passes = 0

    def run(self, budget: float) -> Plan:
        """The plan."""
        meter = self._reference_pass()
        for failure in self._probe.failures:
            logger.warning("the passes failed on a graph, which stays exact: %s", failure)
        fronts = {name: front for name in meter.errors if len(front := self._front(name, meter.errors[name])) > 1}
        exact = {name: front[-1] for name, front in fronts.items()}
        self._measured[_key(exact)] = 0.0
        if budget > 0 and fronts:
            self._explore(fronts, exact, budget)
        within = [(_seconds(dict(key)), value, dict(key)) for key, value in self._measured.items() if value <= budget]
        _, value, chosen = min(within, key=lambda entry: entry[:2])
        self._say.end()
        return self._plan(chosen, value, fronts, budget, ran=meter.errors.keys())

    def _reference_pass(self) -> _FormMeter:
        """Run the exact model on every call and keep its outputs; the error of each form at each site, on the first."""
        meter = _FormMeter(self._forms, self._say)
        for number, (args, kwargs) in enumerate(self._calls, 1):
            self._switch.behaviour = meter if number == 1 else exact
            self._say(f"exact model, call {number} of {len(self._calls)}")
            self._references.append(kept(self._output(args, kwargs)))
        self._num_passes = 1
        for reference in self._references:
            value = self._value(reference, reference)
            if value != 0:
                raise InputError(f"metric must be a distance; it gives {value} for an output and itself, not 0")
        return meter

    def _explore(self, fronts: Mapping[str, tuple[Candidate, ...]], exact: Assignment, budget: float) -> None:
        """Measure assignments, guided by what each site alone costs, until one uses the budget well."""
        fast, accurate = ({name: front[place] for name, front in fronts.items()} for place in (0, -2))
        if self._worst(fast, "the fastest forms") <= budget:
            return
        accurate_value = self._worst(accurate, "the most accurate forms")
        alone = {name: self._worst({**exact, name: accurate[name]}, f"{name} alone") for name in fronts}
        errors = [[candidate.error for candidate in side.values()] for side in (fast, accurate)]
        power = fitted_power(errors[0], errors[1], self._measured[_key(fast)], accurate_value)
        growth = Growth({name: alone[name] / accurate[name].error ** power for name in fronts}, power)
        self._narrow(lambda target: select(fronts, growth, target), budget)

    def _narrow(self, select_at: Callable[[float], Assignment], budget: float) -> None:
        """Look for the target whose selection measures just under the budget: bisection on a log scale."""
        low, high, target, trials = 0.0, math.inf, budget, 0
        for _ in range(MAX_BISECTIONS):
            assignment = select_at(target)
            trials += _key(assignment) not in self._measured
            value = self._worst(assignment, f"trial {trials}")
            if GOOD_ENOUGH * budget <= value <= budget or trials == MAX_TRIALS:
                return
            if value > budget:
                high = target
            else:
                low = target
            if low and high < math.inf:
                target = math.sqrt(low * high)
            else:
                target *= 2.0 if value <= budget else 0.5

    def _worst(self, assignment: Assignment, title: str) -> float:
        """The metric of an assignment on the worst call: one pass, unless it is known."""
        key = _key(assignment)
        if key not in self._measured:
            self._switch.behaviour = _Assigned(assignment)
            values = []
            for number, ((args, kwargs), reference) in enumerate(zip(self._calls, self._references, strict=True), 1):
                self._say(f"pass {self._num_passes + 1}, {title}, call {number} of {len(self._calls)}")
                values.append(self._value(reference, self._output(args, kwargs)))
            self._num_passes += 1
            self._measured[key] = max(values)
        return self._measured[key]

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One run of the model, from the state that every run starts from."""
        self._state.restore()
        return self._model(*args, **kwargs)

    def _value(self, reference: Any, output: Any) -> float:
        value = float(self._metric(reference, output))
        if not value >= 0:
            raise InputError(f"metric must give a number of at least 0; found {value}")
        return value

    def _forms(self, site: str) -> list[Form]:
        occurrences = self._occurrences(site)
        return forms_of(occurrences[0].ir.family).that_pay(occurrences, self._device(), self._fixed)

    def _front(self, site: str, errors: Mapping[Form, float]) -> tuple[Candidate, ...]:
        """The site's forms that are worth taking, from the fastest to exact attention."""
        occurrences, device = self._occurrences(site), self._device()
        timed = {form: total_seconds(occurrences, device, form) for form in errors}
        exact_s = max((times[0] for times in timed.values()), default=0.0)
        candidates = [Candidate(form, times[1], errors[form]) for form, times in timed.items()]
        return (*pareto([c for c in candidates if c.error > 0]), Candidate(None, exact_s, 0.0))

    def _occurrences(self, site: str) -> list[Occurrence]:
        found = [
            Occurrence(decision.ir, tuple(size_hints(result.before).items()))
            for result in self._probe.rewrites
            for decision in result.decisions
            if decision.name == site and decision.ir is not None
        ]
        return list(dict.fromkeys(found))

    def _decisions(self) -> dict[str, Decision]:
        """The first decision about each site that has forms, in the order in which they were found."""
        found: dict[str, Decision] = {}
        for result in self._probe.rewrites:
            for decision in with_forms(result.decisions):
                found.setdefault(decision.name, decision)
        return found

    def _device(self) -> Device:
        return installed(next(iter(self._decisions().values())).device)

    def _plan(
        self,
        chosen: Assignment,
        value: float,
        fronts: Mapping[str, tuple[Candidate, ...]],
        budget: float,
        ran: Collection[str],
    ) -> Plan:
        decisions = self._decisions()
        sites = tuple(_site_plan(d, chosen.get(name), fronts.get(name), name in ran) for name, d in decisions.items())
        named = [tuple(d.name for d in with_forms(result.decisions)) for result in self._probe.rewrites]
        graphs = [names for names in named if names]
        return Plan(
            sites=sites,
            graphs=tuple(dict.fromkeys(graphs)),
            budget=budget,
            metric=value,
            num_samples=len(self._calls),
            num_passes=self._num_passes,
            device=self._device().name if decisions else "",
        )


@dataclass(eq=False)
class _FormMeter:
    """What runs every form of a site beside the exact one, and goes on with the exact output."""

    forms_of: Callable[[str], list[Form]]
    say: Callable[[str], None]
    forms: dict[str, list[Form]] = field(default_factory=dict)
    sums: dict[str, dict[Form, tuple[float, float]]] = field(default_factory=dict)

    def __call__(self, call: SiteCall) -> Tensor:
        """The exact output, the error of each form noted."""
        output = call.exact()
        if call.site not in self.forms:
            self.forms[call.site] = self.forms_of(call.site)
            self.sums[call.site] = dict.fromkeys(self.forms[call.site], (0.0, 0.0))
        sums = self.sums[call.site]
        for number, form in enumerate(self.forms[call.site], 1):
            self.say(f"{call.site}: form {number} of {len(sums)}")
            difference, norm = squares_apart(output, call.monarch(**asdict(form)))
            sums[form] = (sums[form][0] + difference, sums[form][1] + norm)
        return output

    @property
    def errors(self) -> dict[str, dict[Form, float]]:
        """Relative error of each form of each site."""
        return {site: {form: ratio(*pair) for form, pair in sums.items()} for site, sums in self.sums.items()}


@dataclass(frozen=True, eq=False)
class _Assigned:
    """What gives each site its form; exact where it has none."""

    assignment: Assignment

    def __call__(self, call: SiteCall) -> Tensor:
        """The output of one call."""
        candidate = self.assignment.get(call.site)
        return call.exact() if candidate is None or candidate.form is None else call.monarch(**asdict(candidate.form))


def _key(assignment: Assignment) -> tuple[tuple[str, Candidate], ...]:
    return tuple(sorted(assignment.items(), key=lambda item: item[0]))


def _seconds(assignment: Assignment) -> float:
    return sum(candidate.seconds for candidate in assignment.values())


def _site_plan(
    decision: Decision, chosen: Candidate | None, front: tuple[Candidate, ...] | None, ran: bool
) -> SitePlan:
    shape = site_shape(decision.q_shape, decision.v_shape)
    if chosen is None or front is None:
        reason = "no form is predicted to be faster than exact attention" if ran else "the first call did not run it"
        reason = decision.reason if decision.ir is None else reason
        return SitePlan(decision.name, shape, None, reason)
    reason = "every faster form costs more of the budget than it is worth" if chosen.form is None else ""
    return SitePlan(decision.name, shape, chosen.form, reason, chosen.error, front[-1].seconds, chosen.seconds)
