"""Tuning: schedules near the shipped one are pruned by legality and by the compiler's report, checked, then timed."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monarch_compile.codegen.emitters import IR, Emitter, Schedule, emitter
from monarch_compile.codegen.launcher import Launcher, untraced
from monarch_compile.codegen.program import Kernel
from monarch_compile.codegen.render import render
from monarch_compile.codegen.tiling import Capability, Tiling, shared_limit
from monarch_compile.codegen.tuning.compiler_report import CompileReport, compile_report
from monarch_compile.codegen.tuning.store import Tuned
from monarch_compile.errors import CodegenError

logger = logging.getLogger(__name__)

MAX_SPILL = 16
"""Bytes of local memory a thread may use beyond what the shipped schedule's kernel uses."""
GAIN = 1.02
"""A schedule stands in for the shipped one where it is this many times faster: less may be noise."""
Timer = Callable[[Callable[[], Any]], float]
"""Median milliseconds of one call."""
Inspect = Callable[[Kernel, Capability], CompileReport]
Tensors = tuple[Any, ...]


@dataclass
class Search:
    """The state of one search: what was best so far, and why the others were passed over. `ir` has known sizes."""

    ir: IR
    device: torch.device
    capability: Capability | None
    timer: Timer
    inspect: Inspect | None
    rejected: dict[str, str] = field(default_factory=dict)
    reports: dict[tuple[str, Tiling], CompileReport] = field(default_factory=dict)
    tried: int = 0

    @functools.cached_property
    def emitter(self) -> Emitter:
        """That of the IR's family."""
        return emitter(self.ir.family)

    @functools.cached_property
    def largest(self) -> IR:
        """The largest IR of the bucket, which is the one that legality is judged by."""
        return self.emitter.bucketed(self.ir)

    @functools.cached_property
    def shipped(self) -> Schedule:
        """The schedule without tuning."""
        found: Schedule = self.emitter.choose_schedule(self.largest, self.capability)
        return found

    @functools.cached_property
    def full(self) -> Tensors:
        """Inputs at full size, to be timed."""
        return self.emitter.tuning.inputs(self.ir, self.device)

    @functools.cached_property
    def small(self) -> Tensors:
        """Smaller inputs of the same kernels, to be checked."""
        return self.emitter.tuning.inputs(self.emitter.tuning.small(self.ir), self.device)

    @functools.cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """The float64 reference of `small`."""
        return _all(self.emitter.tuning.expected(self.ir, self.small))

    @property
    def bound(self) -> float:
        """The largest relative error that is right."""
        return self.emitter.tuning.bound(self.ir)

    def launch_small(self, schedule: Schedule) -> tuple[Tensor, ...]:
        """What the kernels give under `schedule` for `small`."""
        return _all(self._call(schedule, self.small)())

    def error(self, schedule: Schedule) -> float:
        """Relative Frobenius error of the kernels under `schedule`, the largest of what they give; inf where anything
        is not finite."""
        pairs = zip(self.launch_small(schedule), self.expected, strict=True)
        errors = [((found.double() - right).norm() / right.norm()).item() for found, right in pairs]
        return max(errors) if all(map(math.isfinite, errors)) else math.inf

    def milliseconds(self, schedule: Schedule) -> float:
        """The timer's verdict."""
        self.tried += 1
        return self.timer(self._call(schedule, self.full))

    def _call(self, schedule: Schedule, tensors: Tensors) -> Callable[[], Any]:
        launcher = Launcher(self.largest, schedule)
        return untraced(lambda: self.emitter.run(launcher, *tensors))


def _all(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def tune(
    ir: IR,
    *,
    device: torch.device,
    capability: Capability | None,
    timer: Timer,
    inspect: Inspect | None = compile_report,
    seconds: float = 60.0,
) -> tuple[Tuned, dict[str, str]]:
    """The fastest schedule found in about `seconds`, and why others were rejected: stage by stage, nearest first.

    ir: the IR to tune for; its sizes are known.

    The shipped schedule is always measured, and stays where nothing is `GAIN` times faster.

    Raises:
        CodegenError: no kernel exists for `ir`, or the shipped schedule itself fails the accuracy check.
    """
    search = Search(ir, device, capability, timer, inspect)
    error = search.error(search.shipped)
    if error > search.bound:
        found = f"the shipped schedule {search.shipped} is off by {error:.2e}"
        raise CodegenError(f"{found}; at most {search.bound:.2e} is right")
    best = _searched(search, seconds)
    shipped_ms = best_ms = search.milliseconds(search.shipped)  # again, side by side: clocks drift over a search
    if best != search.shipped:
        best_ms = search.milliseconds(best)
    if shipped_ms < GAIN * best_ms:
        best, best_ms = search.shipped, shipped_ms
    return Tuned(best, best_ms, shipped_ms, search.error(best), search.tried), search.rejected


def _searched(search: Search, seconds: float) -> Schedule:
    """The fastest schedule met: each stage has its share of the time, and what earlier ones left of theirs."""
    started, names = time.monotonic(), search.emitter.tuning.stages(search.largest)
    best, best_ms = search.shipped, search.milliseconds(search.shipped)
    spilled = _spilled(search, search.shipped) if search.inspect else {}
    for place, stage in enumerate(names, 1):
        for candidate in candidates(best, stage, search.largest, search.capability):
            if time.monotonic() >= started + seconds * place / len(names):
                break
            ms = _measured(search, candidate, spilled)
            if ms is not None and ms < best_ms:
                best, best_ms = candidate, ms
    return best


class Task(NamedTuple):
    """What one call of `compile_ahead` compiles."""

    ir: IR
    schedule: Schedule
    capability: Capability | None
    device: str


def tasks(ir: IR, capability: Capability | None, device: str) -> list[Task]:
    """The shipped schedule and all that differ from it in one stage: most of what a search compiles."""
    own = emitter(ir.family)
    largest = own.bucketed(ir)
    shipped = own.choose_schedule(largest, capability)
    others = (s for stage in own.tuning.stages(largest) for s in candidates(shipped, stage, largest, capability))
    return [Task(ir, schedule, capability, device) for schedule in (shipped, *others)]


def compile_ahead(task: Task) -> None:
    """Compile kernels into Triton's disk cache, as they are inspected and as they are launched; for a worker process.

    What does not compile is met again, and rejected, by the search.
    """
    device = torch.device(task.device)
    search = Search(task.ir, device, task.capability, lambda call: 0.0, compile_report)
    with contextlib.suppress(Exception):
        _spilled(search, task.schedule)
    with contextlib.suppress(Exception):
        search.launch_small(task.schedule)


def candidates(start: Schedule, stage: str, ir: IR, capability: Capability | None) -> Iterator[Schedule]:
    """Legal schedules that differ from `start` in one stage, those that differ least first. ir: a bucketed one."""
    limit, tuning = shared_limit(capability), emitter(ir.family).tuning
    varied = tuning.variants(start, stage, ir)
    found = {s for s in varied if all(tuning.shared_bytes(name, t, ir) <= limit for name, t in s.tilings())}
    place: Tiling = getattr(start, stage)
    yield from sorted(found - {start}, key=lambda s: (_distance(place, getattr(s, stage)), str(s)))


def _distance(a: Tiling, b: Tiling) -> float:
    """How many doublings lie between two tilings."""
    sizes = ((a.rows, b.rows), (a.step, b.step), (a.num_warps, b.num_warps), (a.num_stages, b.num_stages))
    return math.fsum(abs(math.log2(x / y)) for x, y in sizes) + (a.turns != b.turns)


def _measured(search: Search, schedule: Schedule, spilled: dict[str, int]) -> float | None:
    """Milliseconds, or None where the schedule is rejected; why is noted. What it uses comes first, then its error."""
    try:
        reason = _misfit(search, schedule, spilled)
        if not reason:
            error = search.error(schedule)
            if error <= search.bound:
                return search.milliseconds(schedule)
            reason = f"off by {error:.2e}; at most {search.bound:.2e} is right"
    except Exception as failure:  # a schedule that does not compile or launch is no candidate
        reason = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
    search.rejected[str(schedule)] = reason
    logger.debug("rejected %s: %s", schedule, reason)
    return None


def _misfit(search: Search, schedule: Schedule, spilled: dict[str, int]) -> str:
    """Why the compiler's report speaks against a schedule; "" where it does not."""
    if search.inspect is None:
        return ""
    limit = shared_limit(search.capability)
    for report in _reports(search, schedule):
        if report.shared_bytes > limit:
            return f"{report.name} needs {report.shared_bytes} bytes of shared memory; {limit} are there"
        allowed = spilled.get(report.name, 0) + MAX_SPILL
        if report.local_bytes > allowed:
            return (
                f"{report.name} spills {report.local_bytes} bytes with {report.registers} registers; {allowed} may be"
            )
    return ""


def _spilled(search: Search, schedule: Schedule) -> dict[str, int]:
    return {report.name: report.local_bytes for report in _reports(search, schedule)}


def _reports(search: Search, schedule: Schedule) -> Iterator[CompileReport]:
    """Reports of a schedule's kernels, each compiled once: most are as they were under another schedule."""
    own, ir = search.emitter, search.largest
    for kernel in dict.fromkeys(own.program_of(ir, schedule, own.expected(ir, schedule)).kernels):
        code = "\n".join(line for line in render(kernel).text.splitlines() if not line.startswith("#"))
        place = code, kernel.tiling
        if place not in search.reports and search.inspect is not None:
            search.reports[place] = search.inspect(kernel, search.capability or (9, 0))
        yield search.reports[place]
