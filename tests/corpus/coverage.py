"""Bidirectional attention without a bias is lowered, all of it, but for the exceptions that are named here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EXCEPTIONS: dict[str, tuple[str, str]] = {}
"""Program -> the code of what stays exact in it, and why."""


@dataclass(frozen=True)
class Coverage:
    """Of the programs with bidirectional, unbiased attention alone: how many there are, and those not lowered in full.

    missed: program -> the codes of its exact sites; none where no attention was found.
    """

    wanted: int
    missed: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, outcomes: Mapping[str, Sequence[str]]) -> Coverage:
        """From the outcome lines of those programs."""
        codes = {name: _codes(lines) for name, lines in outcomes.items()}
        return cls(len(codes), {name: found for name, found in codes.items() if found is not None})

    @property
    def unnamed(self) -> dict[str, tuple[str, ...]]:
        """What is missed and no exception: nothing, or a test fails."""
        named = {name: (code,) for name, (code, _) in EXCEPTIONS.items()}
        return {name: codes for name, codes in self.missed.items() if codes != named.get(name)}

    def __str__(self) -> str:
        exceptions = [name for name in self.missed if name not in self.unnamed]
        lowered, rest = self.wanted - len(self.missed), self.wanted - len(exceptions)
        share = f"{lowered / max(rest, 1):.0%}"
        lines = [
            f"bidirectional and unbiased: {lowered} of {rest} programs lowered in full ({share}), beside exceptions:"
        ]
        lines += [f"  {name}: {EXCEPTIONS[name][1]} ({EXCEPTIONS[name][0]})" for name in exceptions] or ["  none"]
        for name, codes in self.unnamed.items():
            lines.append(f"  missed, and no exception: {name}: {', '.join(codes) or 'no attention found'}")
        return "\n".join(lines)


def _codes(lines: Sequence[str]) -> tuple[str, ...] | None:
    """Codes of what was not lowered, and failures; None where all of some attention was lowered."""
    lowered = [line for line in lines if " x lowered [" in line]
    codes = [line.split("[")[1].split("]")[0] for line in lines if " x exact [" in line]
    codes += [line for line in lines if line.startswith("failed")]
    return None if lowered and not codes else tuple(codes)
