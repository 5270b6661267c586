"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NOTHING = "–"
"""What a cell says where nothing is known."""


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; a bar in a cell does not end it."""
    return [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in (head, ["---"] * len(head), *rows)
    ]


def median(row: Mapping[str, Any], clock: str) -> float | None:
    """A row's median by `clock`; None where it was not taken."""
    timing = row["times"].get(clock)
    return None if timing is None else float(timing["p50"])


def number(value: float | None, style: str) -> str:
    """A number in a style of `format`."""
    return NOTHING if value is None else format(value, style)
