"""Results as Markdown tables and as a picture; everything here reads the JSON content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.resumable import FORWARD
from benchmarks.speed.problems import AutoForm
from benchmarks.tables import NOTHING, markdown_table, median, number

Content = Mapping[str, Any]
PROBLEM = ("batch", "seq_len", "num_heads", "head_dim", "dtype", "masked")


def markdown(content: Content) -> str:
    """Times, then choices of policy "auto", then fractions of the device's ceilings, then what failed."""
    environment = content["environment"]
    head = ", ".join(f"{name} {value}" for name, value in environment.items())
    what = "Median ms" if content.get("pass", FORWARD) == FORWARD else "Median ms of a step: forward and backward pass"
    sections = ((what, _times), ('Choices of policy "auto"', _choices), *_more(content))
    lines = [head, ""]
    for title, table in sections:
        lines += [f"### {title}", "", *table(content), ""]
    return "\n".join(lines)


def _more(content: Content) -> Iterator[tuple[str, Any]]:
    if any(row.get("peak_mib") is not None for row in content["rows"]):
        yield "Peak MiB of a call, beyond its inputs", _peaks
    if any(row["fractions"] for row in content["rows"]):
        yield "Fractions of the device's ceilings: FLOP / bytes", _fractions
    if any(row["failures"] for row in content["rows"]):
        yield "What could not be measured", _failures


def name_of(row: Mapping[str, Any]) -> str:
    """The subject, with its form where it has one."""
    form = row["form"]
    return str(row["subject"]) if form is None else f"monarch {AutoForm(**form)}"


def problem_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What identifies a problem."""
    problem = row["problem"]
    return (*(problem[name] for name in PROBLEM), problem.get("num_kv_heads"), problem.get("causal", False))


def problem_words(problem: Sequence[Any]) -> str:
    """A problem as tables name it."""
    batch, seq_len, heads, dim, dtype, masked, shared, causal = problem
    on = "" if shared is None else f" on {shared}"
    return f"{batch} x {seq_len}, {heads} x {dim}{on}, {dtype}{', padded keys' * masked}{', causal' * causal}"


def _by_problem(content: Content, cell: Any) -> list[str]:
    names = list(dict.fromkeys(name_of(row) for row in content["rows"]))
    table = []
    for problem, group in groupby(content["rows"], key=problem_of):
        cells = {name_of(row): cell(row) for row in group}
        table.append([problem_words(problem), *(cells.get(name, NOTHING) for name in names)])
    return markdown_table(["batch x N, heads x D", *names], table)


def _times(content: Content) -> list[str]:
    clocks = content["clocks"]
    title = " / ".join(clocks)

    def cell(row: Mapping[str, Any]) -> str:
        found = (median(row, clock) for clock in clocks)
        return " / ".join(NOTHING if ms is None else f"{ms:.4g}" for ms in found)

    return [f"({title})", "", *_by_problem(content, cell)]


def _peaks(content: Content) -> list[str]:
    return _by_problem(content, lambda row: number(row.get("peak_mib"), ".0f"))


def _fractions(content: Content) -> list[str]:
    def cell(row: Mapping[str, Any]) -> str:
        found = row["fractions"]
        return f"{found['flops']:.2f} / {found['bytes']:.2f}" if found else NOTHING

    return _by_problem(content, cell)


def _choices(content: Content) -> list[str]:
    head = ["batch x N, heads x D", "T", "window", "prefix", "block", "exact: predicted", "measured"]
    head += ["Monarch: predicted", "measured", "choice", "right"]
    table = []
    for verdict in content["verdicts"]:
        form = AutoForm(**verdict["form"])
        pairs = [verdict[f"{kind}_ms"] for kind in ("predicted_exact", "exact", "predicted_monarch", "monarch")]
        times = [NOTHING if ms is None else f"{ms:.4g}" for ms in pairs]
        right = {True: "yes", False: "**no**", None: NOTHING}[verdict["is_right"]]
        sizes = [str(x) for x in (form.num_iters, form.window, form.prefix, verdict["block_size"])]
        table.append([problem_words(problem_of(verdict)), *sizes, *times, verdict["choice"], right])
    return markdown_table(head, table)


def _failures(content: Content) -> list[str]:
    found = (
        [problem_words(problem_of(row)), name_of(row), clock, words]
        for row in content["rows"]
        for clock, words in row["failures"].items()
    )
    return markdown_table(["batch x N, heads x D", "form", "where", "why"], list(found))


def draw(content: Content, path: Path) -> None:
    """Time against length at batch 1 (SVG), a panel for each number and size of heads, dtype and mask.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "monarch-compile"  # the same picture has the same bytes
    import matplotlib.pyplot as plt

    rows = [row for row in content["rows"] if row["problem"]["batch"] == 1]
    panels = list(dict.fromkeys(problem_of(row)[2:] for row in rows))
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), figsize=(6.8, 4.2 * len(panels)), squeeze=False)
    for place, panel in zip(axes[:, 0], panels, strict=True):
        _draw_panel(place, [row for row in rows if problem_of(row)[2:] == panel], content["clocks"][0])
        heads, dim, dtype, masked, shared, causal = panel
        on, order = "" if shared is None else f" on {shared}", ", causal" * causal
        title = f"{heads} heads of {dim}{on}, {dtype}{', padded keys' * masked}{order}, {content['clocks'][0]}"
        place.set_title(title, fontsize=9)
    figure.suptitle(content["environment"].get("gpu") or content["environment"]["cpu"], fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_panel(axes: Any, rows: Sequence[Mapping[str, Any]], clock: str) -> None:
    for name in dict.fromkeys(name_of(row) for row in rows):
        points = [(row["problem"]["seq_len"], median(row, clock)) for row in rows if name_of(row) == name]
        points = sorted((seq_len, ms) for seq_len, ms in points if ms is not None)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="sequence length", ylabel="ms", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
