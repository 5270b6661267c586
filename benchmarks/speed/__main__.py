"""The speed benchmark: ``monarch-compile bench speed`` (or ``python -m benchmarks.speed``).

Attention alone, every form side by side: Monarch, exact attention by cuDNN, FlashAttention, the memory-efficient
kernel and FlexAttention, and peers of yours, called as f(q, k, v) with (batch, heads, seq_len, head_dim) tensors. With
--backward, a call is a step of training: the forward pass, and the gradients of q, k and v.
Results go to a JSON file after each problem, with a Markdown table and a plot beside it. Problems that the file holds
already, measured with the same versions on the same device, are skipped; --fresh forgets them.
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
from benchmarks.peers import load
from benchmarks.resumable import machine, opened, write
from benchmarks.speed.measure import Bench, Row, rows, verdicts
from benchmarks.speed.present import draw, markdown
from benchmarks.speed.problems import PRESETS, Preset, Problem
from benchmarks.speed.subjects import peers
from monarch_compile.cost.devices import installed
from monarch_compile.tools.timing import one_thread


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where there is no device for it."""
    args = _arguments(argv)
    preset = PRESETS[args.preset]
    if args.batch_and_length:
        preset = replace(preset, problems=_chosen(preset, args.batch_and_length))
    if preset.device == "cuda" and not torch.cuda.is_available():
        print(f"preset {args.preset!r} needs a CUDA device; --preset cpu needs none", file=sys.stderr)
        return 1
    clocks = cuda_clocks(args.rep) if preset.device == "cuda" else cpu_clocks(args.rep / 50)
    others = peers([(name, load(name)) for name in args.peer])
    bench = Bench(preset.device, installed(preset.device), clocks, others, args.backward)
    with one_thread():
        content = run(bench, preset, args.output, fresh=args.fresh, minutes=args.minutes)
    _present(content, args.output)
    return 0


def run(bench: Bench, preset: Preset, path: Path, *, fresh: bool = False, minutes: float = math.inf) -> dict[str, Any]:
    """Measure the problems of `preset` that `path` does not hold yet; its content after the last of them.

    After `minutes` no further problem is begun; a later run goes on from there.
    """
    empty = {"environment": machine(bench.place), "clocks": list(bench.clocks), "pass": bench.timed_pass}
    empty |= {"rows": [], "verdicts": []}
    content = opened(path, empty, fresh=fresh)
    names = [subject.name for subject in bench.subjects()]
    total, started = len(preset.problems), time.monotonic()
    for place, problem in enumerate(preset.problems, 1):
        held = [(row["subject"], row["form"]) for row in content["rows"] if row["problem"] == asdict(problem)]
        if all(x in held for x in [*((name, None) for name in names), *(("monarch", asdict(f)) for f in preset.forms)]):
            print(f"[{place}/{total}] {problem}: measured already", flush=True)
            continue
        if time.monotonic() - started > 60 * minutes:
            print(f"[{place}/{total}] {minutes:g} minutes are over; the same command goes on from here", flush=True)
            break
        print(f"[{place}/{total}] {problem} ({time.monotonic() - started:.0f} s)", flush=True)
        measured = []
        for row in rows(bench, problem, preset.forms):
            measured.append(row)
            print(f"    {_line(row)}", flush=True)
        _keep(content, bench, problem, measured)
        write(path, content)
    return content


def _keep(content: dict[str, Any], bench: Bench, problem: Problem, measured: Sequence[Row]) -> None:
    mine = asdict(problem)
    for name, found in (
        ("rows", [row.to_dict(bench.device) for row in measured]),
        ("verdicts", [verdict.to_dict() for verdict in verdicts(bench, measured)]),
    ):
        content[name] = [entry for entry in content[name] if entry["problem"] != mine] + found


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
    form = "" if row.form is None else f" {row.form} block={row.block_size}"
    times = ", ".join(f"{clock} {x.p50:.4f} [{x.p20:.4f}, {x.p80:.4f}]" for clock, x in row.times.items())
    failures = "; ".join(f"{clock}: {words}" for clock, words in row.failures.items())
    predicted = "" if row.predicted_ms is None else f"(predicted {row.predicted_ms:.4f})"
    return f"{row.subject + form:<47} " + " ".join(part for part in (times, predicted, failures) if part)


def _chosen(preset: Preset, shapes: Sequence[str]) -> tuple[Problem, ...]:
    """The preset's problems at these shapes, or its first problem at a shape that it does not have."""
    found: list[Problem] = []
    for shape in shapes:
        try:
            batch, seq_len = (int(size) for size in shape.split("x"))
        except ValueError:
            raise SystemExit(f"--shapes takes BATCHxN, such as 16x4096; found {shape!r}") from None
        matching = [p for p in preset.problems if (p.batch, p.seq_len) == (batch, seq_len)]
        found += matching or [replace(preset.problems[0], batch=batch, seq_len=seq_len)]
    return tuple(found)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="monarch-compile bench speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="h200" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--causal", dest="preset", action="store_const", const="causal", help="prefill: --preset causal"
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="results file (default: speed_PRESET.json)")
    parser.add_argument("--peer", action="append", default=[], metavar="MODULE:FUNCTION", help="f(q, k, v); repeatable")
    parser.add_argument(
        "--shapes", dest="batch_and_length", nargs="+", metavar="BATCHxN", help="only these shapes of the preset"
    )
    parser.add_argument("--backward", action="store_true", help="time steps of training instead of forward passes")
    parser.add_argument("--rep", type=int, default=50, metavar="MS", help="ms a timing takes (CPU: 20 times that)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no problem later; run again to go on")
    parser.add_argument("--fresh", action="store_true", help="forget what the results file holds")
    args = parser.parse_args(argv)
    args.output = args.output or Path(f"speed_{args.preset}{'_step' if args.backward else ''}.json")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
