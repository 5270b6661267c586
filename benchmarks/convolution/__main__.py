"""The benchmark of long convolutions: ``monarch-compile bench convolution`` (or ``python -m benchmarks.convolution``).

A causal convolution alone, every way to compute it side by side: the plain spelling, irfft(rfft(u) * rfft(k)), by
Inductor (the baseline), as it is, and by backend="monarch", which has to lower it; the operator that it is lowered to,
called directly; and peers of yours, called as f(u, filter) with tensors of (batch, channels, seq_len) and (channels,
seq_len), float32. Results go to a JSON file after each row, with Markdown tables and a plot beside it. Rows that the
file holds already, measured with the same versions on the same device, are skipped; --fresh forgets those that are
asked for (--rows operator inductor: with the baseline, so that both are of one run).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import cpu_clocks, cuda_clocks
from benchmarks.convolution.draw import draw
from benchmarks.convolution.measure import Bench, Prepared, Row, measured
from benchmarks.convolution.present import clock_words, markdown
from benchmarks.convolution.problems import PRESETS, Preset, Problem
from benchmarks.convolution.subjects import peers
from benchmarks.convolution.verdicts import verdicts
from benchmarks.peers import load
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
    clocks = cuda_clocks(args.rep) if preset.device == "cuda" else cpu_clocks(args.rep / 50)
    bench = Bench(preset.device, installed(preset.device), clocks, peers([(name, load(name)) for name in args.peer]))
    with one_thread():
        content = run(bench, preset, args.output, only=args.rows, fresh=args.fresh, minutes=args.minutes)
    _present(content, args.output)
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

    A row is named as "16 x 768 x 1024 bfloat16 gated: operator"; `only` those in whose name one of these occurs. After
    `minutes` no further row is begun; a later run goes on from there.
    """
    empty = {"environment": machine(bench.place), "clocks": list(bench.clocks), "rows": [], "verdicts": []}
    content = opened(path, empty, fresh=fresh and not only)
    names = [subject.name for subject in bench.subjects()]
    started, asked = time.monotonic(), {p: _asked(p, names, only) for p in preset.problems}
    if fresh:
        content["rows"] = [row for row in content["rows"] if row["subject"] not in asked.get(_problem(row), ())]
    for problem, wanted in asked.items():
        held = {row["subject"] for row in content["rows"] if _problem(row) == problem}
        missing = [name for name in wanted if name not in held]
        given, passed = Prepared(problem, bench.place), time.monotonic() - started
        print(f"[{passed:.0f} s] {problem}: {len(wanted) - len(missing)} of {len(wanted)} rows held", flush=True)
        for name in missing:
            if time.monotonic() - started > 60 * minutes:
                print(f"{minutes:g} minutes are over; the same command goes on from here", flush=True)
                return content
            row = measured(bench, given, name)
            _keep(content, preset, names, row.to_dict(bench.device))
            write(path, content)
            print(f"    {_line(row)}", flush=True)
    return content


def _asked(problem: Problem, names: Sequence[str], only: Sequence[str]) -> list[str]:
    return [name for name in names if not only or any(part in f"{problem}: {name}" for part in only)]


def _problem(row: dict[str, Any]) -> Problem:
    return Problem(**row["problem"])


def _keep(content: dict[str, Any], preset: Preset, names: Sequence[str], row: dict[str, Any]) -> None:
    """Put the row in, in the order of the preset and of the subjects, and judge again."""
    problems = [asdict(problem) for problem in preset.problems]

    def place(entry: dict[str, Any]) -> tuple[int, int]:
        found, name = entry["problem"], entry["subject"]
        return (
            problems.index(found) if found in problems else len(problems),
            names.index(name) if name in names else len(names),
        )

    content["rows"] = sorted([*content["rows"], row], key=place)
    content["verdicts"] = verdicts(content["rows"], content["clocks"])


def _present(content: dict[str, Any], path: Path) -> None:
    table = markdown(content)
    print(f"\n{table}")
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    try:
        draw(content, path.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    print(f"wrote {path} and what goes with it")


def _line(row: Row) -> str:
    parts = [f"{clock_words(clock)} {x.p50:.4f} [{x.p20:.4f}, {x.p80:.4f}]" for clock, x in row.times.items()]
    if row.predicted_ms is not None:
        parts.append(f"predicted {row.predicted_ms:.4f}")
    parts += [f"error of {name} {value:.2e}" for name, value in row.errors.items()]
    parts += [f"{where}: {why}" for where, why in row.failures.items()]
    return f"{row.subject:<12} {', '.join(parts)}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="monarch-compile bench convolution",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="h100" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, metavar="PATH", help="results file (default: convolution_PRESET.json)")
    parser.add_argument("--peer", action="append", default=[], metavar="MODULE:FUNCTION", help="f(u, k); repeatable")
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT", help="only rows in whose name a TEXT occurs")
    parser.add_argument("--rep", type=int, default=50, metavar="MS", help="ms a timing takes (CPU: 20 times that)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row later; run again to go on")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds of the rows asked for")
    args = parser.parse_args(argv)
    args.output = args.output or Path(f"convolution_{args.preset}.json")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
