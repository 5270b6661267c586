"""Rows: one way to compute a layer, timed, beside how wrong it is and what it takes of the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.clocks import Clock, peak_mib, reason, synchronize, tidy
from benchmarks.linear.problems import Inputs, Problem, inputs
from benchmarks.linear.subjects import DENSE_LAYER, INDUCTOR, Forward, Subject
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.cost.devices import Device
from monarch_compile.linear import forms
from monarch_compile.linear.ir import PRODUCTS
from monarch_compile.linear.reference import reference
from monarch_compile.tools.timing import Timing

TIMED, CHECKED = 0, 1
"""Seeds: results are checked on inputs that no timed call has seen."""
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Bench:
    """What every row has in common."""

    place: str
    device: Device
    clocks: Mapping[str, Clock]


@dataclass(frozen=True)
class Row:
    """One subject on one problem; what could not be measured is missing, and `failures` says why.

    form: that the operator ran in; "" of other subjects. error: the largest relative one, against float64, of the
    result and of all gradients. predicted_ms: of a forward pass. peak_mib: of device memory beside its inputs.
    first_call_s: with compilation.
    """

    problem: Problem
    subject: str
    form: str
    times: dict[str, Timing]
    failures: dict[str, str]
    error: float | None = None
    predicted_ms: float | None = None
    peak_mib: float | None = None
    first_call_s: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self) | {"share": self.problem.share}


def measured(bench: Bench, problem: Problem, subject: Subject) -> Row:
    """The row of one subject, which may fail in any way without taking others with it."""
    try:
        with torch.set_grad_enabled(problem.backward):
            return _row(bench, problem, subject)
    finally:
        tidy(bench.place)


def step(forward: Forward, given: Inputs, subject: Subject) -> Step:
    """What is timed: a forward pass, and all gradients where there is one of its result."""
    tensors = (given.x, given.weight) if subject.name == DENSE_LAYER else given.factors
    leaves = [x for x in tensors if x is not None]

    def both() -> tuple[Tensor, ...]:
        y = forward(given)
        return (y.detach(), *torch.autograd.grad(y, leaves, given.grad))

    return (lambda: (forward(given),)) if given.grad is None else both


def _row(bench: Bench, problem: Problem, subject: Subject) -> Row:
    row = Row(problem, subject.name, _form(bench, problem, subject), {}, {})
    row = replace(row, predicted_ms=_predicted_ms(bench, row))
    try:
        given = inputs(problem, bench.place, TIMED)
        start = time.perf_counter()
        forward = subject.prepare(problem)
        run = step(forward, given, subject)
        run()
        synchronize(bench.place)
        row = replace(row, first_call_s=time.perf_counter() - start)
        row = replace(row, error=error_of(bench.place, problem, subject, forward))
    except Exception as error:
        return replace(row, failures={"call": reason(error)})
    tidy(bench.place)
    for name, clock in bench.clocks.items():
        try:
            row.times[name] = clock(run)
        except Exception as error:
            row.failures[name] = reason(error)
    try:
        return replace(row, peak_mib=peak_mib(run, bench.place))
    except Exception as error:
        row.failures["memory"] = reason(error)
        return row


def error_of(place: str, problem: Problem, subject: Subject, forward: Forward) -> float:
    """The largest relative error of what a step gives, over fresh inputs and results that start as NaN."""
    given = inputs(problem, place, CHECKED)
    with poisoned():
        found = step(forward, given, subject)()
    wide = Inputs(**{name: _wide(x) for name, x in vars(given).items()})

    def exact(of: Inputs) -> Tensor:
        return linear(of.x, of.weight) if subject.name == DENSE_LAYER else reference(*of.factors)

    expected = step(exact, wide, subject)()
    errors = [relative_error(wanted, own) for wanted, own in zip(expected, found, strict=True)]
    return max(errors, key=lambda e: float("inf") if e != e else e)


def _wide(x: Tensor | None) -> Any:
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """While this lasts, what the emitted kernels write starts as NaN."""
    from monarch_compile.codegen import launcher

    plain = launcher._allocate

    def allocate(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        return like.new_full(tuple(shape), float("nan"), dtype=dtype)

    launcher._allocate = allocate
    try:
        yield
    finally:
        launcher._allocate = plain


def _form(bench: Bench, problem: Problem, subject: Subject) -> str:
    if not subject.form:
        return ""
    ir = replace(problem.ir(), tokens="M")
    found = forms.ranges(ir, bench.device, forms.has_kernels(torch.device(bench.place)), subject.form)
    return forms.form_of(found, problem.tokens)


def _predicted_ms(bench: Bench, row: Row) -> float | None:
    if row.problem.backward:
        return None
    if row.subject == DENSE_LAYER:
        return 1e3 * forms.dense_seconds(row.problem.ir(), bench.device)
    form = PRODUCTS if row.subject == INDUCTOR else row.form
    return 1e3 * forms.seconds(row.problem.ir(), form, bench.device)
