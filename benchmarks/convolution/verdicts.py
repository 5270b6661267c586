"""How rows compare: with Inductor, with the targets, and lengths with the next power of two. Reads the JSON content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.convolution.problems import NEXT_POWER_TARGET, Problem, target
from benchmarks.convolution.subjects import BASELINE, OURS
from benchmarks.tables import median

Row = Mapping[str, Any]

MET, MISSED, WRONG = "met", "missed", "wrong"
MOST_ERROR = 2.0
"""Our error may be so many times Inductor's."""


def error_of(row: Row) -> float | None:
    """The largest of a row's errors; None where there is none."""
    return max(row["errors"].values(), default=None)


def verdicts(rows: Sequence[Row], clocks: Sequence[str]) -> list[dict[str, Any]]:
    """For each timed row but the baseline's: how many times faster than that it is by each clock, and what that means.

    "verdict", only of our rows with a target: "wrong" where the error is not at most `MOST_ERROR` times that of the
    baseline, whatever the time; else whether the target is "met" or "missed" by the first clock.
    """
    baselines = {_key(row): row for row in rows if row["subject"] == BASELINE and row["times"]}
    found = []
    for row in rows:
        baseline = baselines.get(_key(row))
        if row["subject"] == BASELINE or baseline is None or not row["times"]:
            continue
        speedups = {clock: _ratio(median(baseline, clock), median(row, clock)) for clock in clocks}
        aim = target(Problem(**row["problem"])) if row["subject"] in OURS else None
        verdict = None if aim is None else _verdict(row, baseline, speedups[clocks[0]], aim)
        entry = {"problem": row["problem"], "subject": row["subject"], "speedups": speedups}
        found.append(entry | {"target": aim, "verdict": verdict})
    return found


def against_next_power(rows: Sequence[Row], clock: str) -> list[dict[str, Any]]:
    """For each of our rows at a length that is no power of two, its time over that of the next power of two, each
    divided by the number of its sequences: "ratio", and "verdict"."""
    ours = [row for row in rows if row["subject"] in OURS and median(row, clock) is not None]
    found = []
    for row in ours:
        size = row["problem"]["seq_len"]
        power = 1 << (size - 1).bit_length()
        for other in ours if power != size else ():
            ratio = _ratio(_each(row, clock), _each(other, clock))
            if _is_like(row, other) and other["problem"]["seq_len"] == power and ratio is not None:
                verdict = MET if ratio <= NEXT_POWER_TARGET else MISSED
                entry = {"problem": row["problem"], "subject": row["subject"], "power": power}
                found.append(entry | {"ratio": ratio, "verdict": verdict})
                break
    return found


def _verdict(row: Row, baseline: Row, speedup: float | None, aim: float) -> str | None:
    ours, theirs = error_of(row), error_of(baseline)
    if speedup is None or ours is None or theirs is None:
        return None
    if not ours <= MOST_ERROR * theirs:  # not a number is wrong, too
        return WRONG
    return MET if speedup >= aim else MISSED


def _is_like(row: Row, other: Row) -> bool:
    """Whether two rows differ in sizes alone."""
    sizes = ("batch", "channels", "seq_len")
    kinds = [{k: v for k, v in x["problem"].items() if k not in sizes} for x in (row, other)]
    return bool(row["subject"] == other["subject"] and kinds[0] == kinds[1])


def _each(row: Row, clock: str) -> float | None:
    ms = median(row, clock)
    return None if ms is None else ms / (row["problem"]["batch"] * row["problem"]["channels"])


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def _key(row: Row) -> str:
    return json.dumps(row["problem"], sort_keys=True)
