"""Schedules tuned on this machine: looked up, tuned where they are missing, and put to use in this process."""

from __future__ import annotations

import functools
import hashlib
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from monarch_compile.cost.ceilings import real_tensors
from monarch_compile.errors import CodegenError
from monarch_compile.tools.timing import cuda_graph_times

if TYPE_CHECKING:
    from monarch_compile.codegen.emitters import IR, Schedule
    from monarch_compile.codegen.tuning.store import Tuned

logger = logging.getLogger(__name__)

LAZY_SECONDS = 60.0
"""What `options={"autotune": True}` spends on a problem that was not tuned before."""
TIMER_REP_MS = 10
LOCK_SECONDS = 5 * LAZY_SECONDS
"""How long a process waits for another that tunes the same problem, before it runs the shipped schedule."""
IDLE_CORES = 2
"""Cores that compiling ahead leaves alone."""


@dataclass(frozen=True)
class Machine:
    """Where schedules are tuned and run. capability: None only under Triton's interpreter."""

    device: torch.device
    gpu: str
    capability: tuple[int, int] | None
    triton: str

    @staticmethod
    def here() -> Machine:
        """The current CUDA device.

        Raises:
            CodegenError: there is none that kernels run on, or no triton.
        """
        from monarch_compile.codegen.launcher import capability_of

        if not torch.cuda.is_available():
            raise CodegenError("tuning needs a CUDA device, and this machine has none")
        try:
            import triton
        except ImportError as error:
            raise CodegenError("tuning needs triton, which is not installed") from error
        device = torch.device("cuda", torch.cuda.current_device())
        return Machine(device, torch.cuda.get_device_name(device), capability_of(device), triton.__version__)


Tune = Callable[..., "tuple[Tuned, dict[str, str]]"]


def ensure(irs: Iterable[IR], machine: Machine, tune: Tune | None = None) -> str:
    """Put a tuned schedule to use for each of `irs`; what the cache does not hold is tuned now, and kept.

    What its family does not tune keeps the shipped schedule, and so does a problem whose tuning fails, with a warning.
    The result is a digest of the schedules in use, for the keys of compile caches.
    """
    from monarch_compile.codegen.emitters import emitter
    from monarch_compile.codegen.launcher import use

    used = []
    for ir in dict.fromkeys(irs):
        if not emitter(ir.family).tuning.applies(ir):
            logger.info("this is not tuned and runs the shipped schedule: %s", ir)
            continue
        schedule = _schedule(ir, machine, tune or default_tune())
        if schedule is not None:
            use(ir, machine.capability, schedule)
            used.append(f"{emitter(ir.family).bucketed(ir)} {schedule}")
    return hashlib.sha256("\n".join(used).encode()).hexdigest()[:16]


def tuned_now(ir: IR, machine: Machine, tune: Tune) -> tuple[Tuned, dict[str, str]]:
    """Tune `ir` whatever the cache holds, and keep the result there."""
    from monarch_compile.codegen.emitters import emitter
    from monarch_compile.codegen.tuning.store import write

    sized = emitter(ir.family).tuning.sized(ir)
    with real_tensors(), torch.no_grad():  # a backend is called while Dynamo traces
        result, rejected = tune(sized, device=machine.device, capability=machine.capability, timer=graph_timer)
    write({key(ir, machine): result})
    return result, rejected


def key(ir: IR, machine: Machine) -> str:
    """The cache's key for `ir`, which tuning applies to, on `machine`."""
    from monarch_compile.codegen.tuning.store import key_of

    return key_of(ir, machine.gpu, machine.triton)


def graph_timer(call: Callable[[], Any]) -> float:
    """Median milliseconds over CUDA-graph replays."""
    times = sorted(cuda_graph_times(call, TIMER_REP_MS))
    return times[len(times) // 2]


def default_tune(seconds: float | None = None) -> Tune:
    """The search, for about as long; `LAZY_SECONDS` where nothing is said."""
    from monarch_compile.codegen.tuning.search import tune

    return functools.partial(tune, seconds=LAZY_SECONDS if seconds is None else seconds)


def _schedule(ir: IR, machine: Machine, tune: Tune) -> Schedule | None:
    held = _held(ir, machine)
    if held is not None:
        return held
    try:
        with _tuning_alone(key(ir, machine)):
            held = _held(ir, machine)  # another process, such as another rank, may have tuned it meanwhile
            if held is not None:
                return held
            logger.info("tuning %s on %s, for up to %.0f s", ir, machine.gpu, LAZY_SECONDS)
            result, _ = tuned_now(ir, machine, tune)
    except Exception as error:  # tuning is a nicety: the shipped schedule is always there
        logger.warning("tuning failed, %s runs the shipped schedule: %r", ir, error)
        return None
    logger.info("tuned %s: %.4f -> %.4f ms with %s", ir, result.shipped_ms, result.ms, result.schedule)
    return result.schedule


def _held(ir: IR, machine: Machine) -> Schedule | None:
    """The tuned schedule that the cache holds, if it can run `ir`."""
    from monarch_compile.codegen.tuning.store import is_legal, read

    held = read().get(key(ir, machine))
    return held.schedule if held is not None and is_legal(held.schedule, ir, machine.capability) else None


def _tuning_alone(problem: str) -> FileLock:
    """A lock that one process of those that share the cache holds while it tunes a problem; the others wait for it.

    Raises:
        Timeout: when it is entered, another process has held it for `LOCK_SECONDS`.
    """
    from monarch_compile.codegen.tuning.store import tuned_path

    path = tuned_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(problem.encode()).hexdigest()[:16]
    return FileLock(path.parent / f"tuning-{name}.lock", timeout=LOCK_SECONDS)


def tunable(irs: Iterable[IR | None]) -> Iterator[IR]:
    """Those that kernels exist for."""
    from monarch_compile.codegen.emitters import emitter

    for ir in irs:
        if ir is not None:
            try:
                emitter(ir.family).check(ir)
            except CodegenError:
                continue
            yield ir


def gradients_of(irs: Iterable[IR]) -> list[IR]:
    """The gradients of each of `irs` that have kernels."""
    from monarch_compile.codegen.emitters import emitter

    found = (emitter(ir.family).gradients(ir) for ir in irs)
    return [ir for ir in found if ir is not None]


def run(
    irs: Sequence[IR],
    machine: Machine,
    *,
    seconds: float,
    fresh: bool = False,
    jobs: int | None = 0,
    tune: Tune | None = None,
) -> None:
    """Tune each of `irs` that the cache does not hold (all of them if `fresh`), and print what was found.

    jobs: processes that compile ahead; None: as many as there are cores to spare.
    """
    from monarch_compile.codegen.tuning.store import read, tuned_path

    held = {} if fresh else read()
    missing = [ir for ir in irs if key(ir, machine) not in held]
    _compile_ahead(missing, machine, max(1, (os.cpu_count() or 1) - IDLE_CORES) if jobs is None else jobs)
    for place, ir in enumerate(irs, 1):
        print(f"[{place}/{len(irs)}] {ir}", flush=True)
        if ir not in missing:
            print(f"    tuned already: {held[key(ir, machine)].schedule}", flush=True)
            continue
        try:
            result, rejected = tuned_now(ir, machine, tune or default_tune(seconds))
        except Exception as error:  # one that fails must not take the others with it
            print(f"    failed: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"    {result.shipped_ms:.4f} -> {result.ms:.4f} ms ({result.speedup:.2f}x), error {result.error:.1e};")
        print(f"    {result.tried} timed, {len(rejected)} rejected; {result.schedule}")
        table = type(result.schedule).__module__.removeprefix("monarch_compile.").replace(".", "/")
        print(f"    to put into {table}.py: {result.schedule!r}", flush=True)
    print(f'{tuned_path()}: used by options={{"autotune": True}}')


def _compile_ahead(irs: Sequence[IR], machine: Machine, jobs: int) -> None:
    """Fill Triton's disk cache from `jobs` processes; a search without it is only slower."""
    from monarch_compile.codegen.emitters import emitter
    from monarch_compile.codegen.tuning.search import compile_ahead, tasks

    if jobs < 1 or not irs:
        return
    sized = [emitter(ir.family).tuning.sized(ir) for ir in tunable(irs)]
    found = [task for ir in sized for task in tasks(ir, machine.capability, str(machine.device))]
    print(f"compiling {len(found)} schedules in {jobs} processes ", end="", flush=True)
    started = time.monotonic()
    try:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for place, _ in enumerate(pool.map(compile_ahead, found, chunksize=4), 1):
                print("." if place % 25 == 0 else "", end="", flush=True)
    except Exception as error:
        print(f" stopped: {error!r}", end="")
    print(f" {time.monotonic() - started:.0f} s", flush=True)
