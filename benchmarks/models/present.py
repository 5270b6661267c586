"""Results as Markdown tables; everything here reads the JSON content."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from benchmarks.models.found import in_words
from benchmarks.models.measure import EXACT_WORD
from benchmarks.resumable import FORWARD
from benchmarks.tables import NOTHING, markdown_table, number

Content = Mapping[str, Any]


def markdown(content: Content) -> str:
    """A table of every row, ratios against the best exact row of its problem, what was found, and what failed."""
    head = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    if content.get("pass", FORWARD) != FORWARD:
        head += "; a call is a step: forward and backward pass"
    return "\n".join([head, "", *markdown_table(_HEAD, _body(content)), *_found(content), *_failures(content), ""])


_HEAD = ("model, batch x tokens", "attention", "graph ms [p20, p80]", "faster", "plain calls, ms [p20, p80]", "faster")
_HEAD += ("of it attention", "lowered", "error", "peak MiB", "first call, s")


def name_of(problem: Mapping[str, Any]) -> str:
    """A problem as rows name it."""
    return f"{problem['architecture']['name']} {problem['batch']}x{problem['tokens']}"


def _body(content: Content) -> list[list[str]]:
    found = []
    for _, group in groupby(content["rows"], key=lambda row: name_of(row["problem"])):
        rows = [row for row in group if row["times"]]
        best = {
            clock: min((_median(r, clock) for r in rows if _is_exact(r) and clock in r["times"]), default=None)
            for clock in ("graph", "eager")
        }
        found += [_cells(row, best) for row in rows]
    return found


def _cells(row: Mapping[str, Any], best: Mapping[str, float | None]) -> list[str]:
    cells = [name_of(row["problem"]), row["form"]]
    for clock in ("graph", "eager"):
        baseline = best[clock]
        cells.append(_timing(row["times"].get(clock)))
        known = baseline is not None and clock in row["times"]
        cells.append(f"{baseline / _median(row, clock):.2f}" if known else NOTHING)  # type: ignore[operator]
    lowered = NOTHING if _is_exact(row) else f"{row['lowered']} of {row['sites']}"
    return [*cells, share(row), lowered, *(number(row[x], d) for x, d in _LAST)]


_LAST = (("error", ".2e"), ("peak_mib", ".0f"), ("first_call_s", ".1f"))


def share(row: Mapping[str, Any]) -> str:
    """Time of attention, alone, in all blocks, over the model's by the first clock: an estimate."""
    depth = row["problem"]["architecture"]["depth"]
    runs_it = _is_exact(row) or row["lowered"] == depth
    if not runs_it or row["attention_ms"] is None:
        return NOTHING
    return f"{depth * row['attention_ms'] / next(iter(row['times'].values()))['p50']:.0%}"


def _is_exact(row: Mapping[str, Any]) -> bool:
    return bool(row["form"].startswith(EXACT_WORD))


def _median(row: Mapping[str, Any], clock: str) -> float:
    return float(row["times"][clock]["p50"])


def _timing(found: Mapping[str, float] | None) -> str:
    return NOTHING if found is None else f"{found['p50']:.2f} [{found['p20']:.2f}, {found['p80']:.2f}]"


def _found(content: Content) -> list[str]:
    """The sites of each row; files of before have none."""
    found = [
        [name_of(row["problem"]), row["form"], in_words(group)]
        for row in content["rows"]
        for group in row.get("found", ())
    ]
    head = ("model, batch x tokens", "attention", "sites")
    return ["", "### What the compiler found", "", *markdown_table(head, found)] if found else []


def _failures(content: Content) -> list[str]:
    found = [
        [name_of(row["problem"]), row["form"], number(row["attention_ms"], ".4g"), where, why]
        for row in content["rows"]
        for where, why in row["failures"].items()
    ]
    head = ("model, batch x tokens", "attention", "alone, ms", "where", "why")
    return ["", "### What was not measured", "", *markdown_table(head, found)] if found else []
