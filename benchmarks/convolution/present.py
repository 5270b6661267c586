"""Results as Markdown tables; everything here reads the JSON content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.convolution.problems import Problem
from benchmarks.convolution.subjects import BASELINE
from benchmarks.convolution.verdicts import against_next_power, error_of
from benchmarks.tables import NOTHING, markdown_table, median, number

Content = Mapping[str, Any]
SHAPE = "batch x channels x length"


def clock_words(clock: str) -> str:
    """A clock in words: "eager" is also the name of a subject."""
    return {"graph": "graph", "eager": "plain calls"}.get(clock, clock)


def markdown(content: Content) -> str:
    """Targets, then every row, then lengths that are no powers of two, then what failed."""
    environment = content["environment"]
    lines = [", ".join(f"{name} {value}" for name, value in environment.items()), ""]
    for title, make in _SECTIONS:
        table = make(content)
        if len(table) > 2:  # more than a head
            lines += [f"### {title}", "", *table, ""]
    return "\n".join(lines)


def _targets(content: Content) -> list[str]:
    by_problem = {str(Problem(**row["problem"])): row for row in content["rows"] if row["subject"] == BASELINE}
    rows = {(str(Problem(**row["problem"])), row["subject"]): row for row in content["rows"]}
    clock = content["clocks"][0]
    table = []
    for entry in content["verdicts"]:
        if entry["target"] is None:
            continue
        name = str(Problem(**entry["problem"]))
        row, baseline = rows[name, entry["subject"]], by_problem[name]
        times = [number(median(x, clock), ".4g") for x in (baseline, row)]
        errors = [number(error_of(x), ".2e") for x in (baseline, row)]
        faster, verdict = number(entry["speedups"][clock], ".2f"), entry["verdict"] or NOTHING
        verdict = verdict if verdict == "met" else f"**{verdict}**"
        table.append([name, _name(row), *times, faster, f"{entry['target']:g}", verdict, *errors])
    head = (SHAPE, "what", f"{BASELINE}, {clock_words(clock)} ms", "ms", "faster", "target", "verdict")
    return markdown_table((*head, f"error of {BASELINE}", "error"), table)


def _rows(content: Content) -> list[str]:
    speedups = {(str(e["problem"]), e["subject"]): e["speedups"] for e in content["verdicts"]}
    table = []
    for row in content["rows"]:
        faster = speedups.get((str(row["problem"]), row["subject"]), {})
        cells = [str(Problem(**row["problem"])), _name(row)]
        for clock in content["clocks"]:
            cells += [_timing(row["times"].get(clock)), number(faster.get(clock), ".2f")]
        fractions = [number(row["fractions"].get(name), ".2f") for name in ("flops", "bytes")]
        cells += [number(row["predicted_ms"], ".4g"), _errors(row), *fractions]
        table.append([*cells, number(row["peak_mib"], ".0f"), number(row["first_call_s"], ".1f")])
    head = [SHAPE, "what"]
    for clock in content["clocks"]:
        head += [f"{clock_words(clock)}, ms [p20, p80]", "faster"]
    head += ["predicted ms", "error", "FLOP", "bytes", "peak MiB", "first call, s"]
    return markdown_table(head, table)


def _powers(content: Content) -> list[str]:
    table = [
        [str(Problem(**x["problem"])), x["subject"], str(x["power"]), f"{x['ratio']:.2f}", x["verdict"]]
        for x in against_next_power(content["rows"], content["clocks"][0])
    ]
    return markdown_table((SHAPE, "what", "next power of two", "times as long", "verdict"), table)


def _failures(content: Content) -> list[str]:
    found = [
        [str(Problem(**row["problem"])), row["subject"], clock_words(where), why]
        for row in content["rows"]
        for where, why in row["failures"].items()
    ]
    return markdown_table((SHAPE, "what", "where", "why"), found)


_SECTIONS = (
    ("Targets", _targets),
    ("Every row: fractions of the device's ceilings are of our FLOP, and of what must be moved", _rows),
    ("Lengths that are no powers of two, each sequence against one of the next power", _powers),
    ("What could not be measured", _failures),
)


def _name(row: Mapping[str, Any]) -> str:
    """The subject; ours with what its forward pass ran on."""
    by = {True: " (kernels)", False: " (FFT)", None: ""}[row["kernels"]]
    return f"{row['subject']}{by if row['times'] else ''}"


def _timing(found: Mapping[str, float] | None) -> str:
    return NOTHING if found is None else f"{found['p50']:.4g} [{found['p20']:.4g}, {found['p80']:.4g}]"


def _errors(row: Mapping[str, Any]) -> str:
    """The error of the result; where there are gradients, also theirs."""
    errors = row["errors"]
    if len(errors) < 2:
        return number(next(iter(errors.values()), None), ".2e")
    return ", ".join(f"{name} {value:.2e}" for name, value in errors.items())
