"""Results as a picture; reads the JSON content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convolution.present import clock_words
from benchmarks.convolution.problems import Problem, target
from benchmarks.convolution.subjects import BASELINE
from benchmarks.tables import median

Content = Mapping[str, Any]
Points = dict[str, list[tuple[int, float]]]
"""By name of a line: places on the horizontal axis, and values."""
AIM = "target"


def draw(content: Content, path: Path) -> None:
    """For each kind of problem, times and times over Inductor's, with the targets (SVG), against the length; against
    the batch, with a panel for each length, where there are more batches than lengths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "monarch-compile"  # the same picture has the same bytes
    import matplotlib.pyplot as plt

    made, axis = panels(content)
    if not made:
        return
    figure, axes = plt.subplots(len(made), 2, figsize=(11, 3.8 * len(made)), squeeze=False)
    names = dict.fromkeys(row["subject"] for row in content["rows"])
    styles = {name: {"color": f"C{place}"} for place, name in enumerate(names)}
    styles[AIM] = {"color": "black", "linestyle": "--"}
    clock = content["clocks"][0]
    for (title, rows), (left, right) in zip(made.items(), axes, strict=True):
        _lines(left, times(rows, axis, clock), axis, f"ms, {clock_words(clock)}", styles)
        _lines(right, speedups(rows, axis, clock), axis, "times as fast as Inductor", styles)
        left.set_title(title, fontsize=9)
    figure.suptitle(content["environment"].get("gpu") or content["environment"]["cpu"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def panels(content: Content) -> tuple[dict[str, list[Mapping[str, Any]]], str]:
    """Timed rows by the titles of their panels, and the field of a problem that the panels' axis is."""
    rows = [row for row in content["rows"] if row["times"]]
    lengths, batches = ({row["problem"][name] for row in rows} for name in ("seq_len", "batch"))
    axis = "batch" if len(batches) > len(lengths) else "seq_len"
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        problem = Problem(**row["problem"])
        title = problem.kind if axis == "seq_len" else f"{problem.kind}, length {problem.seq_len}"
        found.setdefault(title, []).append(row)
    return found, axis


def times(rows: Sequence[Mapping[str, Any]], axis: str, clock: str) -> Points:
    """Milliseconds of each subject."""
    found: Points = {}
    for row in rows:
        ms = median(row, clock)
        if ms is not None:
            found.setdefault(row["subject"], []).append((row["problem"][axis], ms))
    return found


def speedups(rows: Sequence[Mapping[str, Any]], axis: str, clock: str) -> Points:
    """Times as fast as the baseline, of each other subject, and the targets."""
    problems = [Problem(**row["problem"]) for row in rows]
    baselines = {
        problem: median(row, clock) for problem, row in zip(problems, rows, strict=True) if row["subject"] == BASELINE
    }
    found: Points = {}
    for problem, row in zip(problems, rows, strict=True):
        ms, baseline = median(row, clock), baselines.get(problem)
        if row["subject"] != BASELINE and ms and baseline:
            found.setdefault(row["subject"], []).append((row["problem"][axis], baseline / ms))
    aims = {(row["problem"][axis], aim) for p, row in zip(problems, rows, strict=True) if (aim := target(p))}
    return found | {AIM: sorted(aims)} if aims else found


def _lines(axes: Any, points: Points, axis: str, label: str, styles: Mapping[str, Mapping[str, str]]) -> None:
    for name, line in points.items():
        axes.plot(*zip(*sorted(line), strict=True), marker="o", markersize=3, label=name, **styles[name])
    axes.set(xlabel={"seq_len": "sequence length", "batch": "batch"}[axis], ylabel=label, yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
