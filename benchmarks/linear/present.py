"""Results as Markdown tables, and what they say of the targets; everything here reads the JSON content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.linear.problems import TARGETS, Problem
from benchmarks.linear.subjects import DENSE_LAYER, INDUCTOR, OURS
from benchmarks.tables import NOTHING, markdown_table, median, number

Row = Mapping[str, Any]
MET, MISSED, WRONG = "met", "missed", "wrong"
MOST_ERROR = 2.0
"""The operator's error may be so many times that of Inductor's products."""


def verdicts(rows: Sequence[Row], clock: str) -> list[dict[str, Any]]:
    """For each target whose rows were timed: times as fast, and whether it is "met", "missed" or the result "wrong"."""
    found = []
    by_place = {(Problem(**row["problem"]), row["subject"]): row for row in rows}
    for problem, targets in TARGETS.items():
        ours, baseline = by_place.get((problem, OURS)), by_place.get((problem, INDUCTOR))
        for target in targets:
            other = by_place.get((problem, target.against))
            gain = speedup(other, ours, clock)
            if gain is None or ours is None:
                continue
            verdict = MET if gain >= target.factor else MISSED
            if not _is_right(ours, baseline):
                verdict = WRONG
            entry = {"problem": str(problem), "against": target.against, "factor": target.factor}
            found.append(entry | {"form": ours["form"], "speedup": gain, "verdict": verdict})
    return found


def speedup(other: Row | None, row: Row | None, clock: str) -> float | None:
    """How many times as fast as `other` a row is."""
    if other is None or row is None:
        return None
    theirs, own = median(other, clock), median(row, clock)
    return theirs / own if theirs is not None and own else None


def markdown(content: Mapping[str, Any]) -> str:
    """Targets, then every row, then what failed."""
    clock = content["clocks"][0]
    lines = [", ".join(f"{name} {value}" for name, value in content["environment"].items()), ""]
    for title, table in (
        (f"Targets, {clock}", _targets(content, clock)),
        (f"Every row, {clock}", _rows(content, clock)),
        ("What could not be measured", _failures(content)),
    ):
        if len(table) > 2:
            lines += [f"### {title}", "", *table, ""]
    return "\n".join(lines)


def _is_right(ours: Row, baseline: Row | None) -> bool:
    error, other = ours["error"], None if baseline is None else baseline["error"]
    return error is not None and other is not None and bool(error <= MOST_ERROR * other)


def _targets(content: Mapping[str, Any], clock: str) -> list[str]:
    table = []
    for entry in verdicts(content["rows"], clock):
        verdict = entry["verdict"] if entry["verdict"] == MET else f"**{entry['verdict']}**"
        gain, factor = f"{entry['speedup']:.2f}", f"{entry['factor']:.2f}"
        table.append([entry["problem"], entry["form"], entry["against"], gain, factor, verdict])
    return markdown_table(("layer x tokens", "form", "against", "times as fast", "target", "verdict"), table)


def _rows(content: Mapping[str, Any], clock: str) -> list[str]:
    by_place = {(str(row["problem"]), row["subject"]): row for row in content["rows"]}
    table = []
    for row in content["rows"]:
        cells = [str(Problem(**row["problem"])), _name(row), _timing(row["times"].get(clock))]
        for other in (DENSE_LAYER, INDUCTOR):
            cells.append(number(speedup(by_place.get((str(row["problem"]), other)), row, clock), ".2f"))
        cells += [number(row["predicted_ms"], ".4f"), number(row["error"], ".1e"), number(row["peak_mib"], ".0f")]
        table.append(cells)
    head = ("layer x tokens", "what", "ms [p20, p80]", "against dense", "against Inductor", "predicted ms", "error")
    return markdown_table((*head, "peak MiB"), table)


def _failures(content: Mapping[str, Any]) -> list[str]:
    found = [
        [str(Problem(**row["problem"])), row["subject"], where, why]
        for row in content["rows"]
        for where, why in row["failures"].items()
    ]
    return markdown_table(("layer x tokens", "what", "where", "why"), found)


def _name(row: Row) -> str:
    return f"{row['subject']} ({row['form']})" if row["subject"] == OURS else str(row["subject"])


def _timing(found: Mapping[str, float] | None) -> str:
    return NOTHING if found is None else f"{found['p50']:.4f} [{found['p20']:.4f}, {found['p80']:.4f}]"
