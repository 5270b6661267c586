"""Ceilings of GPUs that no description was fitted to: measured once on each kind, and kept beside the tuning cache."""

from __future__ import annotations

import functools
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from monarch_compile.cost.devices import Ceiling

logger = logging.getLogger(__name__)

FILE_NAME = "ceilings.json"
FORMAT = 1
LOCK_S = 60.0
"""How long a process waits for another one that measures."""

COPIED_BYTES = 2**28
SIDE = 4096
"""Of the square matrices of a product."""
LAUNCHES = 100
ROUNDS = 7

_found: dict[str, Ceiling | None] = {}
"""What this process knows, by the GPU's name; None where measuring failed."""


def ceiling_of(place: torch.device) -> Ceiling | None:
    """The ceilings of a GPU: those of the file, else measured now; None where that is not possible.

    Safe while Dynamo traces and under fake tensors. Nothing is measured while a CUDA graph is captured, nor on GPUs
    that no kernel runs on. The caller's random state stays as it is.
    """
    from monarch_compile.codegen.launcher import MIN_CAPABILITY

    index = torch.cuda.current_device() if place.index is None else place.index
    name = torch.cuda.get_device_name(index)
    if name not in _found:
        if torch.version.hip is not None or torch.cuda.get_device_capability(index) < MIN_CAPABILITY:
            return None
        held = read().get(name)
        if held is None and torch.cuda.is_current_stream_capturing():
            return None
        _found[name] = held or _measured(name, index)
    return _found[name]


def ceilings_path() -> Path:
    """Where results are kept."""
    from monarch_compile.codegen.source import cache_dir

    return cache_dir() / FILE_NAME


def read(path: Path | None = None) -> dict[str, Ceiling]:
    """Every GPU of the file; a file that is not one of ours is passed over with one warning, and never raises."""
    path = path or ceilings_path()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r} where {FORMAT} is known")
        found = {name: Ceiling(**rates) for name, rates in content["gpus"].items()}
        if not all(rate > 0 for ceiling in found.values() for rate in asdict(ceiling).values()):
            raise ValueError("a rate is not above 0")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn(path, repr(error))
        return {}
    return found


def write(name: str, ceiling: Ceiling, path: Path | None = None) -> None:
    """Put a GPU into the file; call it with the file's lock held."""
    from monarch_compile.codegen.source import replace_file

    path = path or ceilings_path()
    gpus = {known: asdict(rates) for known, rates in sorted({**read(path), name: ceiling}.items())}
    replace_file(path, json.dumps({"format": FORMAT, "gpus": gpus}, indent=1) + "\n")


def measure(index: int) -> Ceiling:
    """Measure a GPU, in about a second: a large copy, a 16-bit matrix product, the launch of a small kernel."""
    with real_tensors(), torch.no_grad(), torch.cuda.device(index):
        place = torch.device("cuda", index)
        generator = torch.Generator(place).manual_seed(0)  # zeros would be multiplied faster than other numbers
        source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=place).fill_(1)
        target = torch.empty_like(source)
        copied_s = _device_seconds(functools.partial(target.copy_, source))
        del source, target
        a, b = (torch.randn(SIDE, SIDE, device=place, dtype=torch.float16, generator=generator) for _ in range(2))
        product_s = _device_seconds(functools.partial(torch.mm, a, b))
        return Ceiling(2 * SIDE**3 / product_s, 2 * COPIED_BYTES / copied_s, _launch_seconds(place))


def real_tensors() -> AbstractContextManager[Any]:
    """While Dynamo traces, a context in which tensors are there."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def _measured(name: str, index: int) -> Ceiling | None:
    """Measure, or wait for the process that does; what comes of it is kept. None, with a warning, where it fails."""
    from filelock import FileLock

    path = ceilings_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=LOCK_S):
            held = read(path).get(name)
            if held is not None:
                return held
            started = time.perf_counter()
            ceiling = measure(index)
            logger.info("measured %s in %.1f s: %s", name, time.perf_counter() - started, ceiling)
            write(name, ceiling, path)
            return ceiling
    except Exception as error:  # out of memory, a folder that cannot be written, a lock that is never given up
        logger.warning("%s could not be measured, so the cost model takes it for an unknown GPU: %r", name, error)
        return None


def _device_seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call on the device."""
    event: Any = torch.cuda.Event
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _launch_seconds(place: torch.device) -> float:
    """Median seconds until the call of a small eager operator returns."""
    small = torch.zeros(1, device=place)
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize(place)
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            small.add_(1)
        times.append((time.perf_counter() - start) / LAUNCHES)
    torch.cuda.synchronize(place)
    return statistics.median(times)


@functools.cache
def _warn(path: Path, what: str) -> None:
    """Once for each file and trouble."""
    logger.warning("%s is ignored: %s; measuring writes it anew", path, what)
