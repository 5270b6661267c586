"""The emitted kernels on a CUDA device: a check against the float64 reference, and a sweep of schedules.

    python -m benchmarks.gpu_kernels result.json            # check
    python -m benchmarks.gpu_kernels result.json --sweep    # check, then the best schedules of a few problems
    python -m benchmarks.gpu_kernels result.json --sweep --window 1    # the same with an exact window

Times are in ms, percentiles over CUDA-graph replays; `monarch-compile bench speed` compares them with exact attention.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from benchmarks.speed.__main__ import machine
from benchmarks.speed.measure import cuda_clocks
from benchmarks.speed.problems import Problem as Attention
from benchmarks.speed.problems import inputs
from monarch_compile.codegen import launch as launching
from monarch_compile.codegen.launch import Launcher, Problem
from monarch_compile.codegen.schedule import Schedule, Tiling, padded
from monarch_compile.ir import ExactGroups
from monarch_compile.ops import attention
from monarch_compile.reference import reference

NUM_HEADS, HEAD_DIM = 12, 64
SWEEP = tuple((n, b) for n in (1024, 4096, 16384, 65536) for b in (32, 64, 128, 256) if n / 16 <= b * b <= n * 16)
WINDOW_SWEEP = ((1024, 64), (4096, 64), (16384, 128), (65536, 256))
CHECKS = (
    # batch, num_heads, N, head_dim, block_size, num_iters, init, pad, masked, window, prefix
    (2, 3, 1000, 64, 39, 1, "identity", "post", False, None, 0),
    (2, 3, 1000, 64, 39, 2, "mean", "pre", True, None, 0),
    (1, 2, 4999, 128, 70, 3, "identity", "post", True, None, 0),
    (1, 2, 1500, 25, 300, 1, "identity", "pre", False, None, 0),
    (1, 2, 777, 80, 32, 1, "mean", "post", True, None, 0),
    (1, 2, 700, 256, 100, 2, "identity", "post", False, None, 0),
    (1, 2, 16384, 64, 128, 1, "identity", "post", False, None, 0),
    (2, 3, 1000, 64, 39, 1, "identity", "post", False, 1, 0),
    (2, 3, 1000, 64, 39, 1, "identity", "pre", True, 1, 4),
    (1, 2, 4999, 128, 70, 1, "identity", "post", False, 2, 100),
    (1, 2, 1500, 25, 300, 1, "identity", "post", True, 0, 0),
    (2, 3, 1000, 64, 39, 2, "mean", "pre", True, 1, 4),
    (1, 2, 777, 80, 32, 3, "identity", "post", False, 40, 0),
    (1, 2, 700, 256, 100, 1, "mean", "post", False, 1, 0),
    (1, 2, 16384, 64, 128, 1, "identity", "post", False, 1, 0),
)
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--sweep", action="store_true", help="also search schedules")
    parser.add_argument("--window", type=int, help="with --sweep: the exact window (default: none)")
    parser.add_argument("--skip-check", action="store_true")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py needs a CUDA device")
    dtype = getattr(torch, arguments.dtype)
    result: dict[str, Any] = {"environment": machine("cuda"), "dtype": arguments.dtype, "head_dim": arguments.head_dim}
    print(result["environment"], flush=True)
    try:
        if not arguments.skip_check:
            result["check"] = check()
        if arguments.sweep:
            result |= {"window": arguments.window, "rows": []}
            for row in sweep(dtype, arguments.head_dim, arguments.window):
                result["rows"].append(row)  # one at a time: what was measured is kept when a later row fails
    finally:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def check() -> list[dict[str, Any]]:
    """Relative Frobenius error of every check and dtype against the float64 reference; exits when one is too large."""
    rows, allocate = [], launching._allocate
    launching._allocate = lambda like, shape, kind: allocate(like, shape, kind).fill_(float("nan"))
    try:
        for case, dtype in itertools.product(CHECKS, TOLERANCES):
            error = _error(case, dtype)
            fine = error <= TOLERANCES[dtype]
            rows.append({"case": case, "dtype": str(dtype), "error": error, "fine": fine})
            print(f"{'ok  ' if fine else 'FAIL'} {error:.1e} {dtype} {case}", flush=True)
    finally:
        launching._allocate = allocate
    if not all(row["fine"] for row in rows):
        sys.exit("the kernels disagree with the reference")
    return rows


def _error(case: tuple[Any, ...], dtype: torch.dtype) -> float:
    batch, num_heads, seq_len, head_dim, block_size, num_iters, init, pad, masked, window, prefix = case
    q, k, v = random_inputs(batch, num_heads, seq_len, head_dim, dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, seq_len, device="cuda") > 0.3
        mask[0, -2 * block_size :] = False
    options = {"block_size": block_size, "num_iters": num_iters, "init": init, "pad": pad, "scale": head_dim**-0.5}
    options |= {"window": window, "prefix": prefix}
    found = attention(q, k, v, mask, **options)
    expected = reference(q.double(), k.double(), v.double(), mask, **options)
    error = ((found - expected).norm() / expected.norm()).item()
    return math.inf if math.isnan(error) else error


def random_inputs(
    batch: int, num_heads: int, seq_len: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v on the device."""
    x = inputs(Attention(batch, seq_len, num_heads, head_dim, str(dtype).removeprefix("torch.")), "cuda")
    return x.q, x.k, x.v


def graph_time(run: Callable[[], Tensor], rep: int = 50) -> list[float]:
    """Percentiles of one call's time, in ms, over replays of a CUDA graph."""
    timing = cuda_clocks(rep)["graph"](run)
    return [timing.p20, timing.p50, timing.p80]


def sweep(dtype: torch.dtype, head_dim: int, window: int | None) -> Iterator[dict[str, Any]]:
    """The best tiling of each stage, the others at their default, for every problem of SWEEP or WINDOW_SWEEP."""
    started = time.monotonic()
    problems = SWEEP if window is None else WINDOW_SWEEP
    tasks = {
        (launcher.problem, schedule, seq_len)
        for seq_len, block_size in problems
        for launcher in [_launcher(seq_len, block_size, head_dim, dtype, window)]
        for _, schedule in variants(launcher.schedule, seq_len, block_size)
    }
    print(f"compiling {len(tasks)} schedules", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 4) - 2), mp_context=context) as pool:
        list(pool.map(_compile, tasks, chunksize=4))
    print(f"compiled after {time.monotonic() - started:.0f} s", flush=True)
    for seq_len, block_size in problems:
        yield _sweep_one(seq_len, block_size, head_dim, dtype, window)


def _sweep_one(seq_len: int, block_size: int, head_dim: int, dtype: torch.dtype, window: int | None) -> dict[str, Any]:
    q, k, v = random_inputs(1, NUM_HEADS, seq_len, head_dim, dtype)
    default = _launcher(seq_len, block_size, head_dim, dtype, window)
    times: dict[str, list[tuple[float, str, dict[str, Any]]]] = {}
    for stage, schedule in variants(default.schedule, seq_len, block_size):
        try:
            median = graph_time(run(Launcher(default.problem, schedule), q, k, v), rep=10)[1]
        except triton.runtime.errors.OutOfResources:
            continue
        change, name = {stage: getattr(schedule, stage)}, str(getattr(schedule, stage))
        if stage == "near":
            change["fused"] = schedule.fused
            name += " fused" if schedule.fused else " apart"
        times.setdefault(stage, []).append((median, name, change))
    ranked = {stage: sorted(rows, key=lambda row: row[0]) for stage, rows in times.items()}
    best = default.schedule
    for rows in ranked.values():
        best = replace(best, **rows[0][2])
    row = {"seq_len": seq_len, "block_size": block_size, "default": str(default.schedule), "best": str(best)}
    for name, launcher in (("default_ms", default), ("best_ms", Launcher(default.problem, best))):
        row[name] = graph_time(run(launcher, q, k, v))
    if window is not None:
        row["no_window_ms"] = graph_time(run(_launcher(seq_len, block_size, head_dim, dtype, None), q, k, v))
    row["ranked"] = {stage: [entry[:2] for entry in rows[:8]] for stage, rows in ranked.items()}
    plain = f"; without window {row['no_window_ms'][1]:.4f}" if window is not None else ""
    print(f"N={seq_len} B={block_size}: {row['default_ms'][1]:.4f} -> {row['best_ms'][1]:.4f} ms{plain}")
    for stage, rows in row["ranked"].items():
        print(f"  {stage}: " + ", ".join(f"{name} {ms:.4f}" for ms, name in rows[:4]), flush=True)
    return row


def run(launcher: Launcher, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """One call of a launcher, its kernels launched plainly, as the operator launches them in eager mode."""
    num_blocks = -(-q.shape[2] // launcher.problem.block_size)

    def call() -> Tensor:
        with set_wrap_triton_enabled(False):
            return launcher(q, k, v, None, num_blocks)

    return call


def _launcher(seq_len: int, block_size: int, head_dim: int, dtype: torch.dtype, window: int | None) -> Launcher:
    form = (1, "identity", "post", False, ExactGroups(window))
    problem = Problem(head_dim, head_dim, dtype, block_size, head_dim**-0.5, *form)
    return launching.build(problem, -(-seq_len // block_size), torch.cuda.get_device_capability(), False)


def variants(default: Schedule, seq_len: int, block_size: int) -> Iterator[tuple[str, Schedule]]:
    """Schedules that differ from the default in one stage's tiling."""
    for stage, extent in (("summarize", block_size), ("attend", -(-seq_len // block_size))):
        for tiling in _tilings(extent):
            yield stage, replace(default, **{stage: tiling})
    if default.near is not None:
        for step in (16, 32, 64, 128):
            yield "near", replace(default, near=replace(default.near, step=step), fused=True)
        for tiling in _tilings(block_size):
            if tiling.num_stages > 1 and tiling.rows >= default.near.rows:
                yield "near", replace(default, near=tiling, fused=False)


def _tilings(extent: int) -> Iterator[Tiling]:
    """Those worth trying for a stage whose rows and reduction both extend over `extent`."""
    largest = padded(extent)
    sizes = [size for size in (16, 32, 64, 128) if size <= largest and size >= min(32, largest)]
    for rows, step, num_warps in itertools.product(sizes, sizes, (1, 2, 4, 8)):
        if not 16 * num_warps <= rows <= 32 * num_warps and (rows, num_warps) != (64, 8):
            continue  # a warp owns 16 or 32 rows, but for the widest tile
        for num_stages in (1, 2, 3) if step < extent else (1,):
            yield Tiling(rows, step, num_warps, num_stages)


def _compile(task: tuple[Problem, Schedule, int]) -> None:
    """Compile in a worker, into the disk cache; two heads are specialised as twelve are."""
    problem, schedule, seq_len = task
    q, k, v = random_inputs(1, NUM_HEADS, seq_len, problem.head_dim, problem.dtype)
    with contextlib.suppress(triton.runtime.errors.OutOfResources):  # met again, and skipped, when it is timed
        run(Launcher(problem, schedule), q, k, v)()


if __name__ == "__main__":
    main()
