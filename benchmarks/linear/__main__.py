"""The benchmark of block linears: ``monarch-compile bench linear`` (or ``python -m benchmarks.linear``).

Layers of models at 1 to 16,384 tokens: dense, the plain spelling by batched products under Inductor, the operator in
the form that it chooses, and in each form that has kernels. Results are checked against float64 on inputs of their own,
in buffers that start as NaN. They go to a JSON file after each row, with Markdown tables beside it. Rows that the file
holds already, measured with the same versions on the same device, are skipped; --fresh forgets those asked for.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import cpu_clocks, cuda_clocks
from benchmarks.linear.measure import Bench, Row, measured
from benchmarks.linear.present import markdown
from benchmarks.linear.problems import PRESETS, Preset, Problem
from benchmarks.linear.subjects import subjects
from benchmarks.resumable import machine, opened, write
from monarch_compile.cost.devices import installed
from monarch_compile.tools.timing import one_thread


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where there is no device for it."""
    args = _arguments(argv)
    preset = PRESETS[args.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"preset {args.preset!r} needs a CUDA device; --preset cpu needs none", file=sys.stderr)
        return 1
    clocks = {"graph": cuda_clocks(args.rep)["graph"]} if preset.device == "cuda" else cpu_clocks(args.rep / 50)
    bench = Bench(preset.device, installed(preset.device), clocks)
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

    A row is named as "Llama-7B 4096 -> 4096, monarch 50% x 16: operator"; `only` those in whose name one of these
    occurs. After `minutes` no further row is begun; a later run goes on from there.
    """
    empty = {"environment": machine(bench.place), "clocks": list(bench.clocks), "rows": []}
    content = opened(path, empty, fresh=fresh and not only)
    started = time.monotonic()
    asked = [(p, s) for p in preset.problems for s in subjects(p, bench.place) if _is_asked(f"{p}: {s.name}", only)]
    places = {(p, s.name): place for place, (p, s) in enumerate(asked)}
    if fresh:
        content["rows"] = [row for row in content["rows"] if _place(row) not in places]
    held = {_place(row) for row in content["rows"]}
    for problem, subject in asked:
        if (problem, subject.name) in held:
            continue
        passed = time.monotonic() - started
        if passed > 60 * minutes:
            print(f"{minutes:g} minutes are over; the same command goes on from here", flush=True)
            break
        row = measured(bench, problem, subject)
        content["rows"] = sorted([*content["rows"], row.to_dict()], key=lambda r: places.get(_place(r), len(places)))
        write(path, content)
        print(f"[{passed:.0f} s] {problem}: {_line(row)}", flush=True)
    return content


def _is_asked(name: str, only: Sequence[str]) -> bool:
    return not only or any(part in name for part in only)


def _place(row: dict[str, Any]) -> tuple[Problem, str]:
    return Problem(**row["problem"]), row["subject"]


def _line(row: Row) -> str:
    parts = [f"{clock} {x.p50:.4f} ms [{x.p20:.4f}, {x.p80:.4f}]" for clock, x in row.times.items()]
    if row.error is not None:
        parts.append(f"error {row.error:.1e}")
    parts += [f"{where}: {why}" for where, why in row.failures.items()]
    return f"{row.subject} {row.form}: {', '.join(parts)}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="monarch-compile bench linear", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="h100" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="PATH", help="results file (default: linear_PRESET.json)")
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT", help="only rows in whose name a TEXT occurs")
    parser.add_argument("--rep", type=int, default=50, metavar="MS", help="ms a timing takes (CPU: 20 times that)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row later; run again to go on")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds of the rows asked for")
    args = parser.parse_args(argv)
    args.output = args.output or Path(f"linear_{args.preset}.json")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
