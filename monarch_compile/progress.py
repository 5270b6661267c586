"""One line on stderr that says what is being done."""

from __future__ import annotations

import sys
from dataclasses import dataclass

WIDTH = 100


@dataclass(frozen=True)
class Progress:
    """Shows what `name` does, each time in place of what it showed before; nothing where it is not `shown`."""

    name: str
    shown: bool

    def __call__(self, what: str) -> None:
        """Show it."""
        self._write(f"\r{self.name}: {what}".ljust(WIDTH)[:WIDTH])

    def end(self) -> None:
        """Leave the line empty."""
        self._write("\r".ljust(WIDTH + 1) + "\r")

    def _write(self, text: str) -> None:
        if self.shown:
            print(text, end="", file=sys.stderr)
            sys.stderr.flush()
