"""Compare random dynamic programs with the eager reference, over poisoned buffers: python -m tests.dynamic_programs."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time

import torch

from monarch_compile.backend import monarch
from tests.support.dynamic_programs import DynamicProgram, worst_error
from tests.support.poison import Poisoned


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


def main() -> int:
    """Print what was wrong; 1 where anything was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.count)
    started, wrong, worst = time.monotonic(), 0, 0.0
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for done, (seed, error, what) in enumerate(pool.imap_unordered(check, [(s, args.device) for s in seeds]), 1):
            if not error <= 1e-4:
                wrong += 1
                print(f"seed {seed}: error {error:.2e}: {what}", flush=True)
            else:
                worst = max(worst, error)
            if done % 20 == 0:
                print(f"{done} of {args.count} programs, {wrong} wrong, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{args.count} programs on {args.device}: {wrong} wrong; largest error of the others {worst:.1e}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
