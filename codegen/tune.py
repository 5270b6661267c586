"""Tuning: schedules near the shipped one are pruned by legality and by the compiler's report, checked, then timed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monarch_compile.codegen.emit import emit, role_tiling, steps
from monarch_compile.codegen.facts import expected_facts
from monarch_compile.codegen.inspect_ptx import CompileReport, compile_report
from monarch_compile.codegen.launch import Launcher, Problem, plainly
from monarch_compile.codegen.schedule import (
    ALL,
    Schedule,
    Tiling,
    choose_schedule,
    padded,
    shared_bytes,
    shared_limit,
    turns_of,
)
from monarch_compile.codegen.source import KernelSource
from monarch_compile.codegen.tuned import Tuned
from monarch_compile.errors import CodegenError
from monarch_compile.ir import MonarchAttention
from monarch_compile.reference import reference

logger = logging.getLogger(__name__)

SIZES = (16, 32, 64, 128)
LONGEST_STEP = 256
"""A step that takes a whole block, or all blocks, may be as long as this."""
WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3)
WARP_ROWS = (16, 32)
"""The least and the most rows that a warp owns, but for 64 rows on 8 warps."""
MAX_SPILL = 16
"""Bytes of local memory a thread may use beyond what the shipped schedule's kernel uses."""
GAIN = 1.02
"""A schedule stands in for the shipped one where it is this many times faster: less may be noise."""
GATE_HEADS = 2
ERROR_BOUNDS = {torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8, torch.float32: 32 * 2.0**-24}
"""Relative Frobenius error against the float64 reference that a kernel may have, for each iteration."""

Timer = Callable[[Callable[[], Tensor]], float]
"""Median milliseconds of one call."""
Inspect = Callable[[KernelSource, MonarchAttention, Schedule, tuple[int, int]], CompileReport]


@dataclass(frozen=True)
class Sizes:
    """What a problem is tuned at, beside what its kernels depend on."""

    seq_len: int
    batch: int = 1
    num_kv_heads: int = 12


@dataclass
class Search:
    """The state of one search: what was best so far, and why the others were passed over."""

    problem: Problem
    sizes: Sizes
    device: torch.device
    capability: tuple[int, int] | None
    timer: Timer
    inspect: Inspect | None
    rejected: dict[str, str] = field(default_factory=dict)
    reports: dict[tuple[str, Tiling], CompileReport] = field(default_factory=dict)
    tried: int = 0

    @functools.cached_property
    def ir(self) -> MonarchAttention:
        """The largest problem of the bucket, which is the one that legality is judged by."""
        return self.problem.largest(self.blocks_key)

    @property
    def blocks_key(self) -> int:
        """The bucket of the number of blocks."""
        return self.problem.blocks_key(self.sizes.seq_len)

    @functools.cached_property
    def shipped(self) -> Schedule:
        """The schedule without tuning."""
        return choose_schedule(self.ir, self.capability)

    @functools.cached_property
    def full(self) -> tuple[Tensor, ...]:
        """q, k, v and perhaps a mask at full size, to be timed."""
        return _inputs(self.problem, self.sizes, self.device)

    @functools.cached_property
    def small(self) -> tuple[Tensor, ...]:
        """The same with few heads, to be checked."""
        return _inputs(self.problem, replace(self.sizes, batch=1, num_kv_heads=GATE_HEADS), self.device)

    @functools.cached_property
    def expected(self) -> Tensor:
        """The float64 reference of `small`."""
        q, k, v, *mask = self.small
        return reference(q.double(), k.double(), v.double(), *(mask or (None,)), **self.problem.options())

    def launch_small(self, schedule: Schedule) -> Tensor:
        """The output of the kernels under `schedule` for `small`."""
        return self._call(schedule, self.small)()

    def error(self, schedule: Schedule) -> float:
        """Relative Frobenius error of the kernels under `schedule`; inf where anything is not finite."""
        found = self.launch_small(schedule)
        error = ((found.double() - self.expected).norm() / self.expected.norm()).item()
        return error if math.isfinite(error) else math.inf

    def milliseconds(self, schedule: Schedule) -> float:
        """The timer's verdict."""
        self.tried += 1
        return self.timer(self._call(schedule, self.full))

    def _call(self, schedule: Schedule, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        q, k, v, *mask = tensors
        num_blocks = self.problem.num_blocks(self.sizes.seq_len)
        launcher = Launcher(self.problem, schedule)
        return plainly(lambda: launcher(q, k, v, mask[0] if mask else None, num_blocks))


def tune(
    problem: Problem,
    sizes: Sizes,
    *,
    device: torch.device,
    capability: tuple[int, int] | None,
    timer: Timer,
    inspect: Inspect | None = compile_report,
    seconds: float = 60.0,
) -> tuple[Tuned, dict[str, str]]:
    """The fastest schedule found in about `seconds`, and why others were rejected: stage by stage, nearest first.

    The shipped schedule is always measured, and stays where nothing is `GAIN` times faster.

    Raises:
        CodegenError: no kernel exists for the problem, or the shipped schedule itself fails the accuracy check.
    """
    search = Search(problem, sizes, device, capability, timer, inspect)
    error = search.error(search.shipped)
    if error > _bound(problem):
        found = f"the shipped schedule {search.shipped} is off by {error:.2e}"
        raise CodegenError(f"{found}; at most {_bound(problem):.2e} is right")
    best = _searched(search, seconds)
    shipped_ms = best_ms = search.milliseconds(search.shipped)  # again, side by side: clocks drift over a search
    if best != search.shipped:
        best_ms = search.milliseconds(best)
    if shipped_ms < GAIN * best_ms:
        best, best_ms = search.shipped, shipped_ms
    return Tuned(best, best_ms, shipped_ms, search.error(best), search.tried), search.rejected


def _searched(search: Search, seconds: float) -> Schedule:
    """The fastest schedule met: each stage has its share of the time, and what earlier ones left of theirs."""
    started, names = time.monotonic(), stages(search.ir)
    best, best_ms = search.shipped, search.milliseconds(search.shipped)
    spilled = _spilled(search, search.shipped) if search.inspect else {}
    for place, stage in enumerate(names, 1):
        for candidate in candidates(best, stage, search.ir, search.capability):
            if time.monotonic() >= started + seconds * place / len(names):
                break
            ms = _measured(search, candidate, spilled)
            if ms is not None and ms < best_ms:
                best, best_ms = candidate, ms
    return best


class Task(NamedTuple):
    """What one call of `compile_ahead` compiles."""

    problem: Problem
    sizes: Sizes
    schedule: Schedule
    capability: tuple[int, int] | None
    device: str


def tasks(problem: Problem, sizes: Sizes, capability: tuple[int, int] | None, device: str) -> list[Task]:
    """The shipped schedule and all that differ from it in one stage: most of what a search compiles."""
    ir = problem.largest(problem.blocks_key(sizes.seq_len))
    shipped = choose_schedule(ir, capability)
    near = (schedule for stage in stages(ir) for schedule in candidates(shipped, stage, ir, capability))
    return [Task(problem, sizes, schedule, capability, device) for schedule in (shipped, *near)]


def compile_ahead(task: Task) -> None:
    """Compile kernels into Triton's disk cache, as they are inspected and as they are launched; for a worker process.

    What does not compile is met again, and rejected, by the search.
    """
    device = torch.device(task.device)
    search = Search(task.problem, task.sizes, device, task.capability, lambda call: 0.0, compile_report)
    with contextlib.suppress(Exception):
        _spilled(search, task.schedule)
    with contextlib.suppress(Exception):
        search.launch_small(task.schedule)


def stages(ir: MonarchAttention) -> tuple[str, ...]:
    """The fields of a schedule that matter to `ir`, the costliest first."""
    between = ("represent",) if ir.form.num_iters > 1 or ir.form.init != "identity" else ()
    return ("summarize", "attend", *(("near",) if ir.form.has_exact_keys else ()), *between)


def candidates(
    start: Schedule, stage: str, ir: MonarchAttention, capability: tuple[int, int] | None
) -> Iterator[Schedule]:
    """Legal schedules that differ from `start` in one stage, those that differ least first."""
    limit = shared_limit(capability)
    found = {s for s in _variants(start, stage, ir) if all(shared_bytes(t, ir) <= limit for _, t in s.tilings())}
    place: Tiling = getattr(start, stage)
    yield from sorted(found - {start}, key=lambda s: (_distance(place, getattr(s, stage)), str(s)))


def _variants(start: Schedule, stage: str, ir: MonarchAttention) -> Iterator[Schedule]:
    blocks = ir.num_blocks or 1
    if stage == "near":
        yield from _near_variants(start, ir)
        return
    extent = ir.form.block_size if stage == "summarize" else blocks
    for tiling in _in_turn(_tilings(extent), stage, ir, extent):
        changed: dict[str, Any] = {stage: tiling}
        if stage == "attend":
            changed["whole"] = blocks <= tiling.step
        if stage == "represent" and ir.form.num_iters > 1 and blocks <= tiling.rows:
            changed["exchange"] = True
            if ir.form.init == "identity":  # the mean start alone would read the step
                changed[stage] = replace(tiling, step=tiling.rows, num_stages=1)
        elif stage == "represent":
            changed["exchange"] = False
        if stage == "summarize" and start.near is not None and start.fused:
            changed["near"] = replace(tiling, step=start.near.step, turns=1)
        yield replace(start, **changed)


def _near_variants(start: Schedule, ir: MonarchAttention) -> Iterator[Schedule]:
    """A part of stage 1, whose tiling it shares but for the step, or a kernel of its own."""
    if start.near is None:
        return
    if start.fused:
        for step in SIZES:
            yield replace(start, near=replace(start.summarize, step=step, turns=1))
    for tiling in _tilings(ir.form.block_size):
        if tiling.num_stages > 1:
            yield replace(start, near=tiling, fused=False)


def _tilings(extent: int) -> Iterator[Tiling]:
    """Those worth trying for a stage whose rows and reduction both extend over `extent`."""
    largest = padded(extent)
    sizes = [size for size in SIZES if size <= largest and size >= min(32, largest)]
    steps = [*sizes, LONGEST_STEP] if largest == LONGEST_STEP else sizes
    for rows, step, num_warps in itertools.product(sizes, steps, WARPS):
        if not WARP_ROWS[0] * num_warps <= rows <= WARP_ROWS[1] * num_warps and (rows, num_warps) != (64, 8):
            continue
        for num_stages in STAGES if step < extent else (1,):
            yield Tiling(rows, step, num_warps, num_stages)


def _in_turn(tilings: Iterator[Tiling], stage: str, ir: MonarchAttention, extent: int) -> Iterator[Tiling]:
    """The same, and all that take several tiles in turn, of which there must be some."""
    for tiling in tilings:
        yield tiling
        if extent > tiling.step:
            continue
        for turns in turns_of(tiling, stage, ir, whole=True):
            if turns > 1 or (turns == ALL and tiling.rows < extent):
                yield from (replace(tiling, num_stages=stages, turns=turns) for stages in STAGES)


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
            if error <= _bound(search.problem):
                return search.milliseconds(schedule)
            reason = f"off by {error:.2e}; at most {_bound(search.problem):.2e} is right"
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
    roles = {role.name: role_tiling(role, schedule) for role in steps(search.ir, schedule)}
    for source in emit(search.ir, schedule, expected_facts(search.ir, schedule)):
        code = "\n".join(line for line in source.text.splitlines() if not line.startswith("#"))
        place = code, roles[source.name]
        if place not in search.reports and search.inspect is not None:
            search.reports[place] = search.inspect(source, search.ir, schedule, search.capability or (9, 0))
        yield search.reports[place]


def _bound(problem: Problem) -> float:
    return problem.form.num_iters * ERROR_BOUNDS[problem.dtype]


def _inputs(problem: Problem, sizes: Sizes, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v as a fused projection gives them, standard normal, and a mask that hides some keys where there is one."""
    generator = torch.Generator(device).manual_seed(0)

    def rows(heads: int, dim: int) -> Tensor:
        shape = (sizes.batch, sizes.seq_len, heads, dim)
        return torch.randn(shape, device=device, dtype=problem.dtype, generator=generator).transpose(1, 2)

    heads = sizes.num_kv_heads
    qkv = rows(heads * problem.group, problem.head_dim), rows(heads, problem.head_dim), rows(heads, problem.value_dim)
    if not problem.masked:
        return qkv
    seen = torch.rand((sizes.batch, sizes.seq_len), device=device, generator=generator) > 0.1
    return *qkv, seen
