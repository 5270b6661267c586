"""Timing that stands up on a busy machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from monarch_compile.version import __version__


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one form: the 20th, 50th and 80th percentile of `runs` runs."""

    p20: float
    p50: float
    p80: float
    runs: int

    def __str__(self) -> str:
        return f"{self.p50:.2f} [{self.p20:.2f}, {self.p80:.2f}]"


def time_interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float = 1.0, min_runs: int = 10
) -> dict[str, Timing]:
    """Time `calls` in turns, so that a disturbance of the machine meets all of them, for about `seconds` in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    stop = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_runs or time.perf_counter() < stop:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return {name: timing_of(values) for name, values in times.items()}


def timing_of(values: Sequence[float]) -> Timing:
    """Percentiles of the milliseconds of single runs."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Timing(p20=fifths[0], p50=statistics.median(values), p80=fifths[3], runs=len(values))


def cuda_graph_times(call: Callable[[], object], rep_ms: int) -> list[float]:
    """Milliseconds of a call, over replays of a CUDA graph on a side stream; the L2 cache stays warm between them."""
    from triton.testing import do_bench_cudagraph

    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        return list(do_bench_cudagraph(call, rep=rep_ms, return_mode="all"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the body with one intra-op thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, Any]:
    """What a reader of a timing needs to know about the machine."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monarch_compile": __version__,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
