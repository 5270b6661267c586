"""Distil trained models layer by layer, and judge them by data that they have not learned from:

    python -m benchmarks.distill [--tasks dinov2 whisper] [--device cuda] [--output results.json]

Each row is a form of a model's attention: its sites and its output before and after, and two controls, which must not
gain: weights that cannot move ("frozen"), and random targets ("random"). Results go to a JSON file after each row, and
a row that is interrupted goes on where its checkpoint, beside that file, is. `python -m benchmarks.distill.pack` makes
files for a machine without the packages (`--packs`).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distill.problems import PROBLEMS, SIDE, Data, Limits, mean_metrics
from benchmarks.resumable import machine, opened, write
from benchmarks.tables import markdown_table, number
from examples.progress import step
from monarch_compile.calibration.instrument import Behaviour, exact, monarch, with_attention
from monarch_compile.config import parse_options
from monarch_compile.distillation.distill import distilled
from monarch_compile.distillation.run import Settings
from monarch_compile.distillation.training import Schedule
from monarch_compile.family import SiteCall

RESULTS = Path(__file__).parents[1] / "results"
LEARNS, FROZEN, RANDOM = "distilled", "control: frozen", "control: random targets"
KINDS = (LEARNS, FROZEN, RANDOM)
FROZEN_STEPS = 10
"""As good as more, where a step moves nothing."""


def random_target(call: SiteCall) -> Tensor:
    """Noise of the scale of the exact output."""
    output = call.exact()
    return torch.randn_like(output) * output.std()


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 where every control fails to gain."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    limits = Limits(args.calls, args.unseen, args.side)
    names = ("steps", "lr", "seed", "calls", "unseen", "side")
    empty = {"environment": machine(args.device), "clocks": {n: getattr(args, n) for n in names}, "rows": []}
    content = opened(args.output, empty, fresh=args.fresh)
    deadline = time.perf_counter() + args.seconds
    for task in args.tasks:
        _run_task(task, limits, content, args, deadline)
    print("\n".join(_table(content["rows"])))
    doubts = [row for row in content["rows"] if row["kind"] != LEARNS and gains(row)]
    for row in doubts:
        print(f"{row['task']}, {row['form']}: the {row['kind']} gains")
    return 1 if doubts else 0


def gains(row: Mapping[str, Any]) -> bool:
    """Whether the model's output is nearer to the exact model's than before, on what it has not seen."""
    errors = row["report"]["held_out"]
    return bool(errors["after"] < errors["before"])


def _run_task(task: str, limits: Limits, content: dict[str, Any], args: argparse.Namespace, deadline: float) -> None:
    """Make the task's missing rows; none is begun after the deadline, a reading of `time.perf_counter`."""
    problem = PROBLEMS[task]
    done = {(row["task"], row["form"], row["kind"]) for row in content["rows"]}
    first = next(iter(problem.forms))
    wanted = [(form, kind) for kind in args.kinds for form in problem.forms if kind == LEARNS or form == first]
    wanted = [(form, kind) for form, kind in wanted if (task, form, kind) not in done]
    if not wanted or time.perf_counter() > deadline:
        return
    pack = None if args.packs is None else args.packs / f"{task}.safetensors"
    with step(f"{problem.title}: loading"):
        data = problem.load(pack, limits)
        data.model.to(args.device).requires_grad_(True)
    for form, kind in wanted:
        if time.perf_counter() > deadline:
            print(f"{problem.title}, {form}, {kind}: left to the next run")
            continue
        with step(f"{problem.title}, {form}, {kind}"):
            checkpoint = args.output.with_name(f"{args.output.stem}.{task}.{form}.{KINDS.index(kind)}.pt")
            row = measure(data, problem.forms[form], kind, checkpoint, args)
        content["rows"].append({"task": task, "title": problem.title, "form": form, "kind": kind, **row})
        write(args.output, content)
        checkpoint.unlink(missing_ok=True)


def measure(
    data: Data, options: Mapping[str, Any], kind: str, checkpoint: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: the report, and the metrics of the lowered model on unseen data before and after."""
    options = {"policy": "always", **options}
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    calls, unseen = ([x.to(args.device) for x in inputs] for inputs in (data.calls, data.unseen))
    frozen = Schedule(min(args.steps, FROZEN_STEPS), 0.0, args.seed)
    schedule = frozen if kind == FROZEN else Schedule(args.steps, args.lr, args.seed)
    target: Behaviour = random_target if kind == RANDOM else exact
    settings = Settings(parse_options(options)[0], schedule, checkpoint=checkpoint, progress=False, target=target)
    report = distilled(copy.deepcopy(data.model), calls, unseen, settings)
    references = _outputs(data.model, unseen)
    before, after = (
        mean_metrics(data.metrics, list(zip(references, _outputs(_lowered(model, options), unseen), strict=True)))
        for model in (data.model, report.model)
    )
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
    return {"options": options, "before": before, "after": after, "peak_mib": peak, "report": report.to_dict()}


def _lowered(model: nn.Module, options: Mapping[str, Any]) -> Any:
    return with_attention(model, monarch, options)


def _outputs(model: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x).float().cpu() for x in inputs]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ("model", "form", "", "sites", "mean error of a site, unseen", "error of the output, unseen", "s")
    return markdown_table(head, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    report = row["report"]
    sites = [site for site in report["sites"] if site["held_out"]["before"] is not None]
    means = [sum(site["held_out"][when] for site in sites) / max(1, len(sites)) for when in ("before", "after")]
    outputs = [report["held_out"][when] for when in ("before", "after")]
    learned = sum(site["code"] == "distilled" for site in report["sites"])
    spans = [" -> ".join(number(value, ".4f") for value in pair) for pair in (means, outputs)]
    return [row["title"], row["form"], row["kind"], f"{learned} of {len(report['sites'])}", *spans,
            f"{report['seconds']:.0f}"]  # fmt: skip


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="TASK")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--packs", type=Path, metavar="DIR", help="read models and data from the files of a folder")
    parser.add_argument("--output", type=Path, metavar="PATH", help="results file (JSON)")
    parser.add_argument("--fresh", action="store_true", help="forget the results that the file holds")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=16, help="inputs to learn from")
    parser.add_argument("--unseen", type=int, default=6, help="inputs to be judged by")
    parser.add_argument("--side", type=int, default=SIDE, help="patches along a side of a photograph")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no row after so many")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    args.output = args.output or RESULTS / f"distill_{args.device}.json"
    return args


if __name__ == "__main__":
    raise SystemExit(main())
