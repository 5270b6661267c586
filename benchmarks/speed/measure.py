"""Rows: one form of attention on one problem, timed, with what it did to the device and what was predicted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.clocks import Clock, peak_mib, reason, tidy
from benchmarks.resumable import FORWARD, STEP
from benchmarks.speed.problems import AutoForm, Inputs, Problem, inputs
from benchmarks.speed.subjects import EXACT, Call, Subject, monarch, step_of
from monarch_compile.attention.work import backward_cost, exact_backward_cost, exact_cost, monarch_cost, predict
from monarch_compile.calls import Calls
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import Cost
from monarch_compile.tools.timing import Timing

MONARCH = "monarch"
CLOSE = 1.1
"""A choice is right where it loses at most this factor against the other form."""


@dataclass(frozen=True)
class Bench:
    """What every row has in common.

    clocks: "graph" (CUDA-graph replays) and "eager" (plain calls), in that order. backward: a call is a step, the
    backward pass included.
    """

    place: str
    device: Device
    clocks: Mapping[str, Clock]
    peers: Sequence[Subject] = ()
    backward: bool = False

    @property
    def timed_pass(self) -> str:
        """What a call is."""
        return STEP if self.backward else FORWARD

    @property
    def calls(self) -> Calls:
        """How the cost model is asked."""
        return Calls(trains=self.backward)

    def subjects(self) -> tuple[Subject, ...]:
        """Exact attention by every hand there is, then the peers."""
        return (*EXACT[self.place], *self.peers)


@dataclass(frozen=True)
class Row:
    """One subject on one problem. times: by clock, those that could be taken; failures: the others, and why.

    flops, bytes: of the matrix products, and between memory and kernels, as the cost model counts them.
    peak_mib: of device memory in one call, beyond its inputs; None where it is not known.
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
    peak_mib: float | None = None

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

    def timed(subject: Subject) -> Timed:
        with subject.around():
            return _timed(bench, lambda: _prepared(bench, subject, _only(made, problem, bench)))

    reference = AutoForm().ir(problem, bench.device)
    flops, moved = _work(bench, exact_cost(reference), exact_backward_cost(reference))
    for subject in bench.subjects():
        predicted = predict(reference, bench.device, calls=bench.calls).exact_s * 1e3 if subject.exact else None
        yield Row(problem, subject.name, subject.exact, None, None, flops, moved, predicted, *timed(subject))
    for form in forms:
        ir = form.ir(problem, bench.device)
        flops, moved = _work(bench, monarch_cost(ir), backward_cost(ir))
        predicted = predict(ir, bench.device, calls=bench.calls).monarch_s * 1e3
        found = timed(Subject(MONARCH, functools.partial(monarch, ir), exact=False))
        yield Row(problem, MONARCH, False, form, ir.form.block_size, flops, moved, predicted, *found)


Timed = tuple[dict[str, Timing], dict[str, str], float | None]
"""Times by clock, failures, and peak memory."""


def _work(bench: Bench, forward: Cost, backward: Cost) -> tuple[int, int]:
    """FLOP and bytes of a call."""
    passes = (forward, backward) if bench.backward else (forward,)
    return sum(cost.flops for cost in passes), sum(cost.bytes for cost in passes)


def _prepared(bench: Bench, subject: Subject, x: Inputs) -> Call:
    """The call to time."""
    return step_of(subject.prepare(x), x) if bench.backward else subject.prepare(x)


def verdicts(bench: Bench, measured: Sequence[Row]) -> list[Verdict]:
    """One for each Monarch row of a problem, against the fastest exact row of that problem."""
    found = []
    for row in measured:
        if row.form is None:
            continue
        rivals = [r.ms for r in measured if r.exact and r.problem == row.problem and r.ms is not None]
        ir = row.form.ir(row.problem, bench.device)
        prediction = predict(ir, bench.device, calls=bench.calls)
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


def _only(made: list[Inputs], problem: Problem, bench: Bench) -> Inputs:
    """The inputs, made when they are first asked for: where that fails, each subject fails by it."""
    if not made:
        given = inputs(problem, bench.place)
        made.append(given.trained() if bench.backward else given)
    return made[0]


def _timed(bench: Bench, prepare: Callable[[], Call]) -> Timed:
    """Times by clock, and what went wrong: a subject may fail in any way without taking the others with it."""
    times: dict[str, Timing] = {}
    failures: dict[str, str] = {}
    with torch.set_grad_enabled(bench.backward):
        try:
            call = prepare()
            call()
            peak = peak_mib(call, bench.place)
        except Exception as error:
            return {}, {"call": reason(error)}, None
        finally:
            tidy(bench.place)
        for name, clock in bench.clocks.items():
            try:
                times[name] = clock(call)
            except Exception as error:
                failures[name] = reason(error)
            finally:
                tidy(bench.place)
    return times, failures, peak
