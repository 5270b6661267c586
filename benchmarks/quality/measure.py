"""One row of the benchmark: a variant of a task's model, judged and timed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import monarch_compile
from benchmarks.quality.task import Model, Task
from benchmarks.quality.variants import Built, Variant, exact
from examples.progress import step
from monarch_compile.report.report import Report
from monarch_compile.tools.timing import Timing, time_interleaved


def measure(task: Task, variant: Variant, seconds: float | None) -> dict[str, Any]:
    """Metrics, sites and times of a variant, as a row of the results; prints what it is doing.

    seconds: how long to time, the exact model's turns included; None: not at all. Times are of one
        call, the first to calibrate on.
    """
    torch._dynamo.reset()
    gc.collect()
    with step(f"{task.name}, {variant.name}: preparing"):
        built = variant.build(task, variant.options)
    row: dict[str, Any] = {"task": task.name, "variant": variant.name, "title": variant.title}
    row |= {"task_title": task.title, "primary": task.primary, "better": task.better, "control": variant.must_fail}
    row["options"] = {name: value for name, value in (built.options or {}).items() if name != "plan"}
    row["plan"] = None if built.plan is None else str(built.plan).splitlines()
    with step(f"{task.name}, {variant.name}: evaluating"):
        row["metrics"] = task.evaluate(built.model)
    with step(f"{task.name}, {variant.name}: sites and times"):
        row |= sites(task, built) | _times(task, built, seconds)
        row["predicted_s"] = predicted_seconds(row)
    return row


def sites(task: Task, built: Built) -> dict[str, Any]:
    """How many sites are lowered, of how many, and the predicted seconds of attention in both forms."""
    if built.options is None:
        return {"lowered": 0, "sites": task.sites, "saved_s": 0.0}
    args, kwargs = task.calibration_inputs[0]
    with torch.no_grad():
        report: Report = monarch_compile.explain(task.model, *args, options=built.options, **kwargs)
    lowered = [site for site in report.sites if site.lowered]
    known = [(site.exact_s, site.monarch_s) for site in lowered if site.exact_s and site.monarch_s]
    saved = sum(e - m for e, m in known) if len(known) == len(lowered) else None
    return {"lowered": len(lowered), "sites": task.sites, "saved_s": saved}


def _times(task: Task, built: Built, seconds: float | None) -> dict[str, Any]:
    return {"measured": None} if seconds is None or not built.timed else times(task, built, seconds)


def times(task: Task, built: Built, seconds: float) -> dict[str, Any]:
    """Timings in ms of one call, in turns with the exact model, which is compiled by stock Inductor."""
    args, kwargs = task.calibration_inputs[0]
    calls = {"exact": _caller(exact(task, {}).model, args, kwargs)}
    if built.options is not None:
        calls["variant"] = _caller(built.model, args, kwargs)
    found: dict[str, Timing] = time_interleaved(calls, seconds, task.min_runs)
    timings = {name: asdict(timing) for name, timing in found.items()}
    return {"measured": {"variant": timings.get("variant", timings["exact"]), "exact": timings["exact"]}}


def predicted_seconds(row: dict[str, Any]) -> float | None:
    """The exact model's measured time less what the cost model says that its attention saves."""
    if row["measured"] is None or row["saved_s"] is None:
        return None
    return float(row["measured"]["exact"]["p50"] / 1e3 - row["saved_s"])


def _caller(model: Model, args: Any, kwargs: Any) -> Callable[[], None]:
    on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in args)

    def call() -> None:
        with torch.no_grad():
            model(*args, **kwargs)
        if on_gpu:
            torch.cuda.synchronize()

    return call
