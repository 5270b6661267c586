"""How a call is timed, and what a row says of a call that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from monarch_compile.tools.timing import Timing, cuda_graph_times, time_interleaved, timing_of

Call = Callable[[], object]
Clock = Callable[[Call], Timing]


def cuda_clocks(rep_ms: int = 50) -> dict[str, Clock]:
    """CUDA-graph replays on a side stream (the L2 cache stays warm between them), and plain calls (it is cleared)."""
    import triton

    def graph(call: Call) -> Timing:
        return timing_of(cuda_graph_times(call, rep_ms))

    def eager(call: Call) -> Timing:
        return timing_of(triton.testing.do_bench(call, rep=rep_ms, return_mode="all"))

    return {"graph": graph, "eager": eager}


def cpu_clocks(seconds: float = 1.0) -> dict[str, Clock]:
    """Plain calls for about `seconds`."""
    return {"eager": lambda call: time_interleaved({"call": call}, seconds)["call"]}


def reason(error: BaseException) -> str:
    """The first line of an error, with its kind; what a line announces by a colon at its end follows."""
    first, *more = [line.strip() for line in str(error).strip().splitlines()] or [""]
    while first.endswith(":") and more:
        first = f"{first} {more.pop(0)}"
    return f"{type(error).__name__}: {first}"[:400]


def peak_mib(call: Call, place: str) -> float | None:
    """MiB of device memory that a call takes at most beyond what is held before it; None on a CPU."""
    if place != "cuda":
        return None
    synchronize(place)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize(place)
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def synchronize(place: str) -> None:
    """Wait for the device, so that what went wrong on it is raised here."""
    if place == "cuda":
        torch.cuda.synchronize()


def tidy(place: str) -> None:
    """Give back the memory that no tensor holds."""
    if place == "cuda":
        with contextlib.suppress(RuntimeError):  # after a fault on the device; the next row says so
            torch.cuda.empty_cache()
