"""Rows: one way to compute a long convolution, timed, beside how wrong it is and what it takes of the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import Clock, reason, synchronize, tidy
from benchmarks.convolution.problems import Inputs, Problem, inputs
from benchmarks.convolution.subjects import BASELINE, OURS, SUBJECTS, Call, Subject
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.convolution.reference import reference
from monarch_compile.convolution.work import cost, predict, runs_kernels
from monarch_compile.cost.devices import Device
from monarch_compile.tools.timing import Timing

RESULT = "y"
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Bench:
    """What every row has in common. clocks: "graph" (CUDA-graph replays) and "eager" (plain calls), in that order."""

    place: str
    device: Device
    clocks: Mapping[str, Clock]
    peers: Sequence[Subject] = ()

    def subjects(self) -> tuple[Subject, ...]:
        """Everything that is timed on a problem, the baseline first."""
        return (*SUBJECTS, *self.peers)


@dataclass(frozen=True)
class Row:
    """One subject on one problem; what could not be measured is missing, and `failures` says why.

    kernels: whether our forward pass runs on the emitted kernels (False: on FFTs); None for other subjects.
    times: by clock. errors: relative, against float64, of the result ("y") and of the gradient of each input.
    predicted_ms: of a forward pass. peak_mib: of device memory that a call takes beside its inputs. first_call_s: with
    compilation.
    """

    problem: Problem
    subject: str
    kernels: bool | None
    times: dict[str, Timing]
    failures: dict[str, str]
    errors: dict[str, float]
    predicted_ms: float | None = None
    peak_mib: float | None = None
    first_call_s: float | None = None

    def fractions(self, device: Device) -> dict[str, float]:
        """Of the device's ceilings, where those are known: what must be moved, and FLOP of our kernels, over time."""
        if not self.times or device.ceiling is None or self.problem.torch_dtype.itemsize != 2:
            return {}
        seconds, ceiling = next(iter(self.times.values())).p50 / 1e3, device.ceiling
        found = {"bytes": self.problem.floor_bytes / seconds / ceiling.bytes_per_s}
        if self.kernels and not self.problem.backward:  # nothing counts those of a backward pass
            found["flops"] = cost(self.problem.ir()).flops / seconds / ceiling.half_flops
        return found

    def to_dict(self, device: Device) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"fractions": self.fractions(device)}


class Prepared:
    """A problem's tensors, made when they are first asked for: where that fails, each subject fails by it."""

    def __init__(self, problem: Problem, place: str) -> None:
        self.problem, self.place = problem, place

    @functools.cached_property
    def inputs(self) -> Inputs:
        """What subjects are given."""
        return inputs(self.problem, self.place)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """What a step gives, in float64."""
        wide, length = self.inputs.doubled(), self.problem.seq_len
        return step(functools.partial(reference, *wide.tensors, transform_len=2 * length, out_len=length), wide)()


def measured(bench: Bench, given: Prepared, name: str) -> Row:
    """The row of one subject, by its name."""
    (subject,) = (subject for subject in bench.subjects() if subject.name == name)
    try:
        with torch.set_grad_enabled(given.problem.backward):
            return _row(bench, subject, given)
    finally:
        tidy(bench.place)


def step(call: Call, given: Inputs) -> Step:
    """What is timed: a call, and the gradients of all inputs where there is a gradient of its result."""
    wanted = [x for x in given.tensors if x is not None]

    def forward() -> tuple[Tensor, ...]:
        return (call(),)

    def both() -> tuple[Tensor, ...]:
        y = call()
        return (y.detach(), *torch.autograd.grad(y, wanted, given.grad))

    return forward if given.grad is None else both


def output_names(given: Inputs) -> list[str]:
    """Names of what a step gives."""
    if given.grad is None:
        return [RESULT]
    names = [field.name for field in fields(given) if field.name != "grad"]
    return [RESULT, *(name for name, x in zip(names, given.tensors, strict=True) if x is not None)]


def _row(bench: Bench, subject: Subject, given: Prepared) -> Row:
    """A subject may fail in any way without taking the others with it."""
    row = Row(given.problem, subject.name, _kernels(bench, subject, given.problem), {}, {}, {})
    row = replace(row, predicted_ms=_predicted_ms(bench, row))
    try:
        start = time.perf_counter()
        run = step(subject.prepare(given.inputs), given.inputs)
        outputs = run()
        synchronize(bench.place)
        row = replace(row, first_call_s=time.perf_counter() - start)
    except Exception as error:
        return replace(row, failures={"call": reason(error)})
    try:
        row = replace(row, errors=errors(given, outputs))
    except Exception as error:
        row.failures["error"] = reason(error)
    del outputs
    tidy(bench.place)
    try:
        row = replace(row, peak_mib=_peak_mib(bench.place, run))
    except Exception as error:
        row.failures["memory"] = reason(error)
    _take_times(bench, run, row)
    return row


def errors(given: Prepared, outputs: Sequence[Tensor]) -> dict[str, float]:
    """Relative Frobenius error of each output of a step."""
    names = output_names(given.inputs)
    return {name: relative_error(x, y) for name, x, y in zip(names, given.expected, outputs, strict=True)}


def _take_times(bench: Bench, run: Step, row: Row) -> None:
    """Put times, and why there are none, into a row."""
    for name, clock in bench.clocks.items():
        try:
            row.times[name] = clock(run)
        except Exception as error:
            row.failures[name] = reason(error)
        finally:
            tidy(bench.place)


def _kernels(bench: Bench, subject: Subject, problem: Problem) -> bool | None:
    if subject.name not in OURS:
        return None
    ir = problem.ir()
    return runs_kernels(bench.place, ir.dtype, ir.filter_dtype, ir.out_dtype, ir.seq_len, ir.out_len)


def _predicted_ms(bench: Bench, row: Row) -> float | None:
    """What the cost model says of our forward pass and of Inductor's; it does not know the others."""
    if row.problem.backward or row.subject not in (BASELINE, *OURS):
        return None
    prediction = predict(row.problem.ir(), bench.device)
    return (prediction.monarch_s if row.kernels else prediction.exact_s) * 1e3


def _peak_mib(place: str, run: Step) -> float | None:
    if place != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize(place)
    return (torch.cuda.max_memory_allocated() - before) / 2**20
