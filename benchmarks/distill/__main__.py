"""Distil trained models layer by layer, and judge them by data that they have not learned from:

    python -m benchmarks.distill [--tasks dinov2 whisper] [--device cuda] [--output results.json]

Each row is a form of a model's attention: its sites and its output before and after. Beside them stand, of the first
form of each model, two controls, which must not gain: weights that cannot move ("frozen"), and random targets
("random"); sites that learn together after each has learned by itself; and what `calibrate` gives, which is free to
choose forms and to keep sites exact under a budget, without and with distillation under its plan. All are rows of one
table, with the model's own metric: the error of patches, the KL of Whisper's decoder.

Results go to a JSON file after each row. After --seconds a row is stopped where it is; the next run goes on from its
checkpoint, beside that file. `python -m benchmarks.distill.pack` makes files for a machine without the packages
(`--packs`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.distill.problems import SIDE, Data, Limits, mean_metrics
from benchmarks.distill.tasks import PROBLEMS
from benchmarks.resumable import machine, opened, write
from benchmarks.tables import markdown_table, number
from examples.progress import step
from monarch_compile.calibration.instrument import Behaviour, exact, monarch, with_attention
from monarch_compile.calibration.plan import Plan
from monarch_compile.calibration.search import calibrate
from monarch_compile.config import parse_options
from monarch_compile.distillation.descent import Schedule
from monarch_compile.distillation.distill import distilled
from monarch_compile.distillation.run import Settings
from monarch_compile.family import SiteCall

RESULTS = Path(__file__).parents[1] / "results"
LEARNS, FROZEN, RANDOM = "distilled", "control: frozen", "control: random targets"
CALIBRATED, BOTH = "calibrated", "calibrated, distilled"
TOGETHER = "distilled, then together"
KINDS = (LEARNS, TOGETHER, FROZEN, RANDOM, CALIBRATED, BOTH)
CONTROLS = (FROZEN, RANDOM)
FREE = "free"
"""The form of a row whose forms `calibrate` chose."""
FROZEN_STEPS = 10
"""As good as more, where a step moves nothing."""


class TimeIsUp(BaseException):
    """Not an error: the row is to be stopped where it is."""


def random_target(call: SiteCall) -> Tensor:
    """Noise of the scale of the exact output."""
    output = call.exact()
    return torch.randn_like(output) * output.std()


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 where every control fails to gain."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    limits = Limits(args.calls, args.unseen, args.side)
    names = ("steps", "lr", "joint_steps", "joint_lr", "seed", "calls", "unseen", "side", "budget", "calibration_calls")
    empty = {"environment": machine(args.device), "clocks": {n: getattr(args, n) for n in names}, "rows": []}
    content = opened(args.output, empty, fresh=args.fresh)
    with contextlib.suppress(TimeIsUp), stopped_after(args.seconds):
        for task in args.tasks:
            _run_task(task, limits, content, args)
    print("\n".join(_table(content["rows"])))
    doubts = [row for row in content["rows"] if row["kind"] in CONTROLS and gains(row)]
    for row in doubts:
        print(f"{row['task']}, {row['form']}: the {row['kind']} gains")
    return 1 if doubts else 0


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises `TimeIsUp` in the main thread after so many seconds."""

    def stop(*_: object) -> None:
        print(" time is up: the same command goes on from here", flush=True)
        raise TimeIsUp

    if math.isinf(seconds):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def gains(row: Mapping[str, Any]) -> bool:
    """Whether the model's output is nearer to the exact model's than before, on what it has not seen."""
    errors = row["report"]["held_out"]
    return bool(errors["after"] < errors["before"])


def _run_task(task: str, limits: Limits, content: dict[str, Any], args: argparse.Namespace) -> None:
    """Make the task's missing rows."""
    problem = PROBLEMS[task]
    done = {(row["task"], row["form"], row["kind"]) for row in content["rows"]}
    forms = tuple(form for form in problem.forms if args.forms is None or form in args.forms)
    rows = [(form, kind) for kind in args.kinds for form in _forms(kind, forms)]
    wanted = [(form, kind) for form, kind in rows if (task, form, kind) not in done]
    if not wanted:
        return
    with step(f"{problem.title}: loading"):
        data = problem.load(args.packs, limits)
        data.model.to(args.device).requires_grad_(True)
    for form, kind in wanted:
        stem = args.output.with_name(f"{args.output.stem}.{task}.{form}.{KINDS.index(kind)}")
        options = {"policy": "always", **problem.forms.get(form, {})}
        with step(f"{problem.title}, {form}, {kind}"):
            row = measure(data, options, kind, stem, args)
        labels = {"task": task, "title": problem.title, "form": form, "kind": kind, "primary": problem.primary}
        content["rows"].append({**labels, **row})
        write(args.output, content)
        for file in _files_of(stem):
            file.unlink(missing_ok=True)


def _forms(kind: str, forms: Sequence[str]) -> Sequence[str]:
    """The forms of which there is a row of a kind."""
    if kind in (CALIBRATED, BOTH):
        return (FREE,)
    return forms if kind in (LEARNS, TOGETHER) else forms[:1]


def _files_of(stem: Path) -> tuple[Path, Path]:
    """The checkpoint of a row, and its plan: what a stopped row goes on from."""
    return stem.with_name(f"{stem.name}.pt"), stem.with_name(f"{stem.name}.plan.json")


def measure(data: Data, options: Mapping[str, Any], kind: str, stem: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the report, and the metrics of the lowered model on unseen data before and after."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    calls, unseen = ([x.to(args.device) for x in inputs] for inputs in (data.calls, data.unseen))
    checkpoint, plan_file = _files_of(stem)
    if kind in (CALIBRATED, BOTH):
        options = {**options, "plan": _plan(data.model, calls[: args.calibration_calls], options, plan_file, args)}
    schedule = {
        FROZEN: Schedule(min(args.steps, FROZEN_STEPS), 0.0, args.seed),
        CALIBRATED: Schedule(1, 0.0, args.seed),  # the report of a plan: nothing moves
    }.get(kind, Schedule(args.steps, args.lr, args.seed))
    target: Behaviour = random_target if kind == RANDOM else exact
    joint = Schedule(args.joint_steps, args.joint_lr, args.seed) if kind == TOGETHER else None
    config, _ = parse_options(options)
    settings = Settings(config, schedule, checkpoint=checkpoint, progress=False, target=target, joint=joint)
    report = distilled(copy.deepcopy(data.model), calls, unseen, settings)
    references = _outputs(data.model, unseen)
    before, after = (
        mean_metrics(data.metrics, list(zip(references, _outputs(_lowered(model, options), unseen), strict=True)))
        for model in (data.model, report.model)
    )
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else None
    told = {name: value for name, value in options.items() if name != "plan"}
    forms = dict(Counter(str(site.form) for site in report.plan.sites))
    found = {"options": told, "forms": forms, "before": before, "after": after, "peak_mib": peak}
    return {**found, "report": report.to_dict()}


def _plan(
    model: nn.Module, calls: Sequence[Tensor], options: Mapping[str, Any], file: Path, args: argparse.Namespace
) -> Plan:
    """What `calibrate` chooses for the model, from the calls; read where a run before has written it."""
    if file.exists():
        return Plan.load(file)
    plan = calibrate(model, [(call,) for call in calls], budget=args.budget, options=options, progress=False)
    plan.save(file)
    return plan


def _lowered(model: nn.Module, options: Mapping[str, Any]) -> Any:
    return with_attention(model, monarch, options)


def _outputs(model: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x).float().cpu() for x in inputs]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ("model", "form", "", "learned", "lowered", "mean error of a site, unseen", "error of the output, unseen",
            "metric, unseen", "before -> after", "s")  # fmt: skip
    return markdown_table(head, [_cells(row) for row in rows])


def _cells(row: Mapping[str, Any]) -> list[str]:
    report, metric = row["report"], row["primary"]
    sites = [site for site in report["sites"] if site["held_out"]["before"] is not None]
    means = [sum(site["held_out"][when] for site in sites) / max(1, len(sites)) for when in ("before", "after")]
    outputs = [report["held_out"][when] for when in ("before", "after")]
    numbers = [row[when][metric] for when in ("before", "after")]
    learned = sum(site["code"] == "distilled" for site in report["sites"])
    lowered = sum(count for form, count in row["forms"].items() if form != "None")
    spans = [" -> ".join(number(value, ".4f") for value in pair) for pair in (means, outputs, numbers)]
    counts = [f"{count} of {len(report['sites'])}" for count in (learned, lowered)]
    return [row["title"], row["form"], row["kind"], *counts, *spans[:2], metric, spans[2], f"{report['seconds']:.0f}"]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="TASK")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--forms", nargs="+", metavar="FORM", help="tiles, rows, paper: only these of a task's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--packs", type=Path, metavar="DIR", help="read models and data from the files of a folder")
    parser.add_argument("--output", type=Path, metavar="PATH", help="results file (JSON)")
    parser.add_argument("--fresh", action="store_true", help="forget the results that the file holds")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--joint-steps", type=int, default=1000)
    parser.add_argument("--joint-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=16, help="inputs to learn from")
    parser.add_argument("--unseen", type=int, default=6, help="inputs to be judged by")
    parser.add_argument("--side", type=int, default=SIDE, help="patches along a side of a photograph")
    parser.add_argument("--budget", type=float, default=0.2, help="of calibration: relative error of the output")
    parser.add_argument("--calibration-calls", type=int, default=2, help="inputs that calibration sees")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so many; run again to go on")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    args.output = args.output or RESULTS / f"distill_{args.device}.json"
    return args


if __name__ == "__main__":
    raise SystemExit(main())
