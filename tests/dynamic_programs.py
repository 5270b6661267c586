"""Compare random dynamic programs with the eager reference, over poisoned buffers: python -m tests.dynamic_programs."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

from monarch_compile.backend import monarch
from tests.support.dynamic_programs import DynamicProgram, worst_error
from tests.support.poison import Poisoned

TOLERANCE = 1e-4  # relative, over float32


def check(job: tuple[int, str]) -> tuple[int, float, str]:
    """The worst error of the program of a seed; inf where it could not be run, and why."""
    torch.set_num_threads(1)
    seed, device = job
    torch._dynamo.reset()
    torch.manual_seed(seed)
    program = DynamicProgram.draw(seed)
    poisoned = Poisoned()
    try:
        with poisoned.installed(device):
            error = worst_error(
                program, device, lambda fn, options: torch.compile(fn, backend=monarch, options=options)
            )
    except Exception as failure:  # a program that cannot be run is a finding like any other
        return seed, float("inf"), f"{program}: {failure!r}"[:2000]
    note = f"wrote past a buffer: {poisoned.overwritten[:3]}" if poisoned.overwritten else ""
    return seed, float("inf") if note else error, f"{program}: {note}"


def read_results(path: Path) -> dict[int, float]:
    """Errors of earlier runs by seed, from a file of JSON lines."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["seed"]: entry["error"] for entry in map(json.loads, lines)}


def main() -> int:
    """Print what was wrong; 1 where anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--results", type=Path, help="a file of JSON lines; seeds that it holds are not run again")
    args = parser.parse_args()
    errors = read_results(args.results) if args.results else {}
    seeds = [s for s in range(args.first_seed, args.first_seed + args.count) if s not in errors]
    started = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for done, (seed, error, what) in enumerate(pool.imap_unordered(check, [(s, args.device) for s in seeds]), 1):
            errors[seed] = error
            if args.results:
                with args.results.open("a") as results:
                    results.write(json.dumps({"seed": seed, "error": error, "torch": torch.__version__}) + "\n")
            if not error <= TOLERANCE:
                print(f"seed {seed}: error {error:.2e}: {what}", flush=True)
            if done % 20 == 0:
                print(f"{done} of {len(seeds)} programs, {time.monotonic() - started:.0f} s", flush=True)
    right = [error for error in errors.values() if error <= TOLERANCE]
    wrong, largest = len(errors) - len(right), max(right, default=0.0)
    print(f"{len(errors)} programs on {args.device}: {wrong} wrong; largest error of the others {largest:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
