"""Results as a Markdown table and as a picture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

DIGITS = 4
STALE = " (*)"
LINEAR_PART = 300
TEN = 10


def markdown(content: Mapping[str, Any]) -> str:
    """A table for each task: every variant's numbers, lowered sites, and measured and predicted time in ms."""
    lines = [_setting(content), ""]
    for _, group in groupby(content["rows"], key=lambda row: row["task"]):
        rows = list(group)
        names = list(rows[0]["metrics"])
        lines += [f"### {rows[0]['task_title']}", ""]
        lines += _table(["variant", *names, "sites lowered", "measured ms", "exact ms", "predicted ms"], [
            [
                row["title"] + STALE * row["stale"],
                *(f"{row['metrics'][name]:.{DIGITS}f}" for name in names),
                f"{row['lowered']} of {row['sites']}",
                *_times(row),
            ]
            for row in rows
        ])  # fmt: skip
        lines.append("")
    if any(row["stale"] for row in content["rows"]):
        lines += [f"{STALE.strip()} made by other versions, sources or options than those of now", ""]
    return "\n".join(lines)


def doubts(content: Mapping[str, Any]) -> list[str]:
    """A sentence for each control that is no worse than some other variant of its task: such a task tells nothing."""
    found = []
    for _, group in groupby(content["rows"], key=lambda row: row["task"]):
        rows = list(group)
        for control, other in itertools.product(rows, rows):
            if control["control"] and not other["control"] and _badness(control) <= _badness(other):
                found.append(f"{control['task']}: '{control['title']}' should be worse than '{other['title']}'")
    return found


def _badness(row: Mapping[str, Any]) -> float:
    value: float = row["metrics"][row["primary"]]
    return value if row["better"] == "lower" else -value


def draw(content: Mapping[str, Any], path: Path) -> None:
    """A picture at `path` (SVG): for each task its primary number against the time relative to the exact model.

    Filled: measured; hollow: predicted. Dashed: the controls, which have no time.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "monarch-compile"  # the same picture has the same bytes
    import matplotlib.pyplot as plt

    groups = [list(rows) for _, rows in groupby(content["rows"], key=lambda row: row["task"])]
    titles = dict.fromkeys(row["title"] for row in content["rows"])
    palette = mpl.color_sequences["tab10" if len(titles) <= TEN else "tab20"]
    colours = dict(zip(titles, itertools.cycle(palette), strict=False))
    figure, all_axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.8), squeeze=False)
    for axes, rows in zip(all_axes[0], groups, strict=True):
        _draw_task(axes, rows, colours)
    handles = {
        label: handle for axes in all_axes[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_task(axes: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, Any]) -> None:
    for row in rows:
        value, colour = row["metrics"][row["primary"]], colours[row["title"]]
        if row["measured"] is None:
            axes.axhline(value, color=colour, linestyle="--", linewidth=1, label=row["title"])
            continue
        base = row["measured"]["exact"]["p50"]
        axes.plot(row["measured"]["variant"]["p50"] / base, value, "o", color=colour, label=row["title"], clip_on=False)
        if row["predicted_s"] is not None:
            axes.plot(row["predicted_s"] * 1e3 / base, value, "o", markerfacecolor="none", color=colour, clip_on=False)
    if rows[0]["better"] == "lower":  # from nearly nothing to the controls' failure: no linear axis shows both
        largest = max(row["metrics"][row["primary"]] for row in rows)
        axes.set_yscale("symlog", linthresh=largest / LINEAR_PART if largest > 0 else 1)
        axes.set_ylim(0, 2 * largest or None)
    axes.set_title(rows[0]["task_title"], fontsize=9)
    axes.set_xlabel("time of the model / exact (hollow: predicted)", fontsize=8)
    axes.set_ylabel(f"{rows[0]['primary']} ({rows[0]['better']} is better)", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _setting(content: Mapping[str, Any]) -> str:
    machine = content["machine"]
    where = content.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    return f"{where}; {content['dtype']}; torch {machine['torch']}, monarch_compile {machine['monarch_compile']}"


def _times(row: Mapping[str, Any]) -> list[str]:
    if row["measured"] is None:
        return ["-"] * 3
    predicted = "-" if row["predicted_s"] is None else f"{row['predicted_s'] * 1e3:.3g}"
    return [f"{row['measured'][name]['p50']:.3g}" for name in ("variant", "exact")] + [predicted]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
