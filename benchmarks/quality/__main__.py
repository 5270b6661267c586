"""The quality benchmark: ``python -m benchmarks.quality`` runs every task with every variant.

Results go to a JSON file after each of them; one that is there already, made by the same versions, sources and
options, is skipped, so an interrupted run goes on where it stopped. A Markdown table and a plot are put beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.quality.measure import measure
from benchmarks.quality.present import doubts, draw, markdown
from benchmarks.quality.results import Results
from benchmarks.quality.task import TASKS, Task, TaskUnavailable, how_to_install
from benchmarks.quality.variants import VARIANTS, Variant
from examples.progress import step

RESULTS = Path(__file__).parents[1] / "results"
ON_GPU = tuple(name for name, entry in TASKS.items() if entry.on_gpu)
CHECKPOINTS = "whisper"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 where every row could be made and every control fails."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    path = args.output or RESULTS / f"quality_{args.device}.json"
    results = Results.open(path, _setting(args), args.fresh)
    variants = tuple(variant for variant in VARIANTS if variant.name in args.variants)
    failed = [name for name in args.tasks if not _run_task(name, variants, results, args)]
    problems = [*_present(results), *(f"{name} is not complete" for name in failed)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _run_task(name: str, variants: Sequence[Variant], results: Results, args: argparse.Namespace) -> bool:
    """Make the task's missing rows; whether all are there."""
    variants = [variant for variant in variants if variant.fits(TASKS[name])]
    wanted = [variant for variant in variants if not results.finished(name, variant.name, dict(variant.options))]
    for variant in variants:
        if variant not in wanted:
            print(f"{name}, {variant.name}: done already")
    if not wanted:
        return True
    try:
        task = _load(name, args)
    except TaskUnavailable as error:
        print(f"{name}: skipped: {error}", file=sys.stderr)
        return False
    made = [_run_variant(task, variant, results, args) for variant in wanted]
    return all(made)


def _run_variant(task: Task, variant: Variant, results: Results, args: argparse.Namespace) -> bool:
    """Make and keep one row; whether it could be made."""
    try:
        row = measure(task, variant, None if args.untimed else args.seconds)
    except Exception:  # one that fails must not take the others with it
        traceback.print_exc()
        return False
    print("   ", ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items()), flush=True)
    results.add(row, dict(variant.options))
    return True


def _load(name: str, args: argparse.Namespace) -> Task:
    arguments: dict[str, Any] = {}
    if name in ON_GPU:
        arguments = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    if name == CHECKPOINTS:
        arguments["weights"] = args.weights
    missing = () if arguments.get("weights") else TASKS[name].missing()
    if missing:
        raise TaskUnavailable(f"{', '.join(missing)} not installed: {how_to_install(TASKS[name].requirements)}")
    with step(f"{name}: loading"):
        return TASKS[name].load(**arguments)


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    setting = {"device": args.device, "dtype": args.dtype, "weights": args.weights}
    return setting | ({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {})


def _present(results: Results) -> list[str]:
    """Print the table, write it and the plot beside the results; what is wrong with the controls."""
    rows = results.ordered({variant.name: dict(variant.options) for variant in VARIANTS})
    if not rows:
        return []
    content = json.loads(results.path.read_text(encoding="utf-8")) | {"rows": rows}
    table = markdown(content)
    print(f"\n{table}")
    results.path.with_suffix(".md").write_text(table, encoding="utf-8")
    try:
        draw(content, results.path.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    print(f"wrote {results.path} and what goes with it")
    return doubts(content)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument(
        "--variants", nargs="+", choices=names, default=names, metavar="VARIANT", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--output", type=Path, metavar="PATH", help="results file (JSON)")
    parser.add_argument("--fresh", action="store_true", help="forget the results that the file holds")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to spend on timing each row")
    parser.add_argument("--untimed", action="store_true", help="judge alone: a busy machine has no times to tell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument(
        "--weights", metavar="PATH", help="whisper: a checkpoint's folder, or a file of benchmarks.quality.pack_whisper"
    )
    args = parser.parse_args(argv)
    special = (args.device, args.dtype) != ("cpu", "float32")
    args.tasks = args.tasks or [name for name in (ON_GPU if special else TASKS) if TASKS[name].default]
    if special and not set(args.tasks) <= set(ON_GPU):
        parser.error(f"--device and --dtype are for the tasks {', '.join(ON_GPU)}")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
