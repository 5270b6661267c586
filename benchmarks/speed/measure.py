"""Rows: one form of attention on one problem, timed, with what it did to the device and what was predicted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.clocks import Clock, reason, synchronize, tidy
from benchmarks.speed.problems import AutoForm, Inputs, Problem, inputs
from benchmarks.speed.subjects import EXACT, Call, Subject, monarch
from monarch_compile.attention.work import exact_cost, monarch_cost, predict
from monarch_compile.cost.devices import Device
from monarch_compile.tools.timing import Timing

MONARCH = "monarch"
CLOSE = 1.1
"""A choice is right where it loses at most this factor against the other form."""


@dataclass(frozen=True)
class Bench:
    """What every row has in common. clocks: "graph" (CUDA-graph replays) and "eager" (plain calls), in that order."""

    place: str
    device: Device
    clocks: Mapping[str, Clock]
    peers: Sequence[Subject] = ()

    def subjects(self) -> tuple[Subject, ...]:
        """Exact attention by every hand there is, then the peers."""
        return (*EXACT[self.place], *self.peers)


@dataclass(frozen=True)
class Row:
    """One subject on one problem. times: by clock, those that could be taken; failures: the others, and why.

    flops, bytes: of the matrix products, and between memory and kernels, as the cost model counts them.
    """

    problem: Problem
    subject: str
    exact: bool
    form: AutoForm | None
    block_size: int | None
    flops: int
    bytes: int
    predicted_ms: float | None
    times: dict[str, Timing]
    failures: dict[str, str]

    @property
    def ms(self) -> float | None:
        """The median that rows are compared by: over CUDA-graph replays where there are any."""
        return next((time.p50 for time in self.times.values()), None)

    def fractions(self, device: Device) -> dict[str, float]:
        """FLOP and bytes over time as fractions of the device's ceilings, where those are known."""
        if self.ms is None or device.ceiling is None or self.problem.torch_dtype.itemsize != 2:
            return {}
        seconds, ceiling = self.ms / 1e3, device.ceiling
        return {
            "flops": self.flops / seconds / ceiling.half_flops,
            "bytes": self.bytes / seconds / ceiling.bytes_per_s,
        }

    def to_dict(self, device: Device) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"fractions": self.fractions(device)}


@dataclass(frozen=True)
class Verdict:
    """What policy "auto" chooses for one problem and form, beside what was measured; None: not measured."""

    problem: Problem
    form: AutoForm
    block_size: int
    choice: str
    predicted_exact_ms: float
    predicted_monarch_ms: float
    exact_ms: float | None
    monarch_ms: float | None

    @property
    def is_right(self) -> bool | None:
        """Whether the choice was measured the faster one, or nearly; None where that is not known."""
        if self.exact_ms is None or self.monarch_ms is None:
            return None
        chosen, other = self.exact_ms, self.monarch_ms
        if self.choice == MONARCH:
            chosen, other = other, chosen
        return chosen <= CLOSE * other

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"is_right": self.is_right}


def rows(bench: Bench, problem: Problem, forms: Sequence[AutoForm]) -> Iterator[Row]:
    """Every subject on `problem`: the exact ones and the peers once, the Monarch form in each of `forms`."""
    made: list[Inputs] = []

    def timed(subject: Subject) -> tuple[dict[str, Timing], dict[str, str]]:
        with subject.around():
            return _timed(bench, lambda: subject.prepare(_only(made, problem, bench.place)))

    reference = AutoForm().ir(problem, bench.device)
    exact = exact_cost(reference)
    for subject in bench.subjects():
        predicted = predict(reference, bench.device).exact_s * 1e3 if subject.exact else None
        found = timed(subject)
        yield Row(problem, subject.name, subject.exact, None, None, exact.flops, exact.bytes, predicted, *found)
    for form in forms:
        ir = form.ir(problem, bench.device)
        cost, predicted = monarch_cost(ir), predict(ir, bench.device).monarch_s * 1e3
        found = timed(Subject(MONARCH, functools.partial(monarch, ir), exact=False))
        yield Row(problem, MONARCH, False, form, ir.form.block_size, cost.flops, cost.bytes, predicted, *found)


def verdicts(bench: Bench, measured: Sequence[Row]) -> list[Verdict]:
    """One for each Monarch row of a problem, against the fastest exact row of that problem."""
    found = []
    for row in measured:
        if row.form is None:
            continue
        rivals = [r.ms for r in measured if r.exact and r.problem == row.problem and r.ms is not None]
        ir = row.form.ir(row.problem, bench.device)
        prediction = predict(ir, bench.device)
        found.append(
            Verdict(
                row.problem,
                row.form,
                ir.form.block_size,
                MONARCH if prediction.pays else "exact",
                prediction.exact_s * 1e3,
                prediction.monarch_s * 1e3,
                min(rivals, default=None),
                row.ms,
            )
        )
    return found


def _only(made: list[Inputs], problem: Problem, place: str) -> Inputs:
    """The inputs, made when they are first asked for: where that fails, each subject fails by it."""
    if not made:
        made.append(inputs(problem, place))
    return made[0]


def _timed(bench: Bench, prepare: Callable[[], Call]) -> tuple[dict[str, Timing], dict[str, str]]:
    """Times by clock, and what went wrong: a subject may fail in any way without taking the others with it."""
    times: dict[str, Timing] = {}
    failures: dict[str, str] = {}
    try:
        call = prepare()
        with torch.no_grad():
            call()
            synchronize(bench.place)
    except Exception as error:
        return {}, {"call": reason(error)}
    finally:
        tidy(bench.place)
    for name, clock in bench.clocks.items():
        try:
            with torch.no_grad():
                times[name] = clock(call)
        except Exception as error:
            failures[name] = reason(error)
        finally:
            tidy(bench.place)
    return times, failures
