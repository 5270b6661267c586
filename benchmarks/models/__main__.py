"""The benchmark of whole models: ``monarch-compile bench models`` (or ``python -m benchmarks.models``).

Random weights, long sequences: an encoder as large as ViT-L and the blocks of DiT-XL (presets h200 and tiny); models on
images and videos, whose grids the compiler must find: DINOv2, DiT-XL/2, blocks of Flux and Wan (images, tiny-images).
backend="monarch" against plain torch.compile with the exact attention that is fastest here (cuDNN, FlashAttention or
the memory-efficient kernel, each forced in turn and timed alone). Times are of CUDA-graph replays and of plain calls.
With --backward, a call is a step of training: the forward pass, and the gradients of all parameters. Presets training
(ViT-L at 4,096 and 16,384 tokens) and tiny-training are of steps without being told.
Results go to a JSON file after each row, with a Markdown table beside it. Rows that the file holds already, measured
with the same versions on the same device, are skipped; --fresh forgets them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import cpu_clocks, cuda_clocks
from benchmarks.models.measure import Bench, Row, rows, subjects
from benchmarks.models.present import markdown
from benchmarks.models.problems import PRESETS, Preset
from benchmarks.resumable import machine, opened, write
from monarch_compile.cost.devices import installed
from monarch_compile.tools.timing import one_thread


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where there is no device for it."""
    args = _arguments(argv)
    preset = PRESETS[args.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"preset {args.preset!r} needs a CUDA device; --preset tiny needs none", file=sys.stderr)
        return 1
    bench = _bench(preset.device, args.rep, math.inf if args.every_kernel else 1.0)
    bench = replace(bench, backward=args.backward)
    with one_thread():
        content = run(bench, preset, args.output, only=args.rows, fresh=args.fresh, minutes=args.minutes)
    table = markdown(content)
    print(f"\n{table}")
    args.output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"wrote {args.output} and {args.output.with_suffix('.md')}")
    return 0


def run(
    bench: Bench,
    preset: Preset,
    path: Path,
    *,
    only: Sequence[str] = (),
    fresh: bool = False,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Measure the rows of `preset` that `path` does not hold yet; its content after the last of them.

    A row is named as "vit-l 1x4096 monarch window=1"; `only` those in whose name one of these occurs. After `minutes`
    no further row is begun; a later run goes on from there.
    """
    empty = {"environment": machine(bench.place), "clocks": list(bench.clocks), "pass": bench.timed_pass, "rows": []}
    content = opened(path, empty, fresh=fresh)
    started = time.monotonic()
    for problem in preset.problems:
        names = [subject.name for subject in subjects(bench, problem, preset)]
        asked = [n for n in names if not only or any(part in f"{problem} {n}" for part in only)]
        held = {row["form"] for row in content["rows"] if row["problem"] == asdict(problem)}
        wanted = [name for name in asked if name not in held]
        print(f"[{time.monotonic() - started:.0f} s] {problem}: {len(asked) - len(wanted)} rows held", flush=True)
        for row in rows(bench, problem, preset, wanted) if wanted else ():
            _keep(content, preset, row)
            write(path, content)
            print(f"[{time.monotonic() - started:.0f} s]   {_line(row)}", flush=True)
            if time.monotonic() - started > 60 * minutes:
                print(f"{minutes:g} minutes are over; the same command goes on from here", flush=True)
                return content
    return content


def _keep(content: dict[str, Any], preset: Preset, row: Row) -> None:
    """Put the row in, in the order of the preset."""
    order = [asdict(problem) for problem in preset.problems]
    found = [*content["rows"], row.to_dict()]
    content["rows"] = sorted(found, key=lambda r: order.index(r["problem"]) if r["problem"] in order else len(order))


def _bench(place: str, rep: int, slack: float) -> Bench:
    device = installed(place)
    if place == "cpu":
        clocks = cpu_clocks(rep / 1000)
        return Bench(place, device, clocks, clocks["eager"], slack)
    graph, eager = cuda_clocks(rep // 10)["graph"], cuda_clocks(rep)["eager"]  # a graph is replayed ten times
    return Bench(place, device, {"graph": graph, "eager": eager}, cuda_clocks(5)["graph"], slack)


def _line(row: Row) -> str:
    times = ", ".join(f"{clock} {x.p50:.3f} [{x.p20:.3f}, {x.p80:.3f}]" for clock, x in row.times.items())
    parts = [f"{row.form:<20}", times]
    if row.error is not None:
        parts.append(
            f"{row.lowered} of {row.sites} lowered, error {row.error:.2e}, first call {row.first_call_s:.1f} s"
        )
    return " ".join(part for part in (*parts, *(f"{a}: {b}" for a, b in row.failures.items())) if part)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="monarch-compile bench models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="h200" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--output", type=Path, metavar="PATH", help="results file (default: models_PRESET.json)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT", help="only rows in whose name a TEXT occurs")
    parser.add_argument("--every-kernel", action="store_true", help="run whole models with each exact kernel")
    parser.add_argument("--backward", action="store_true", help="time steps of training instead of forward passes")
    parser.add_argument("--rep", type=int, default=1000, metavar="MS", help="ms that each timing takes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row later; run again to go on")
    parser.add_argument("--fresh", action="store_true", help="forget what the results file holds")
    args = parser.parse_args(argv)
    args.backward = args.backward or PRESETS[args.preset].trains
    args.output = args.output or Path(f"models_{args.preset}{'_step' if args.backward else ''}.json")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
