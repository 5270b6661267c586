"""Numbered dumps of every pass, under MONARCH_DEBUG_DIR."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.fx import GraphModule

from monarch_compile.decision import Decision

DEBUG_DIR_VARIABLE = "MONARCH_DEBUG_DIR"


@dataclass
class Dump:
    """Writes what it is given into a folder of its own, or nothing at all."""

    folder: Path | None
    _count: itertools.count[int] = field(default_factory=itertools.count)

    @staticmethod
    def from_environment() -> Dump:
        """A new folder `graph_<n>` under MONARCH_DEBUG_DIR, when that is set."""
        root = os.environ.get(DEBUG_DIR_VARIABLE)
        if not root:
            return Dump(None)
        for number in itertools.count():
            folder = Path(root) / f"graph_{number:03d}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return Dump(folder)
        raise AssertionError("unreachable")

    def graph(self, name: str, gm: GraphModule) -> None:
        """One pass's graph, as readable Python."""
        if self.folder is not None:
            self.numbered(f"{name}.py", gm.print_readable(print_output=False))

    def decisions(self, decisions: Sequence[Decision]) -> None:
        """Every decision as a line of JSON."""
        if self.folder is None:
            return
        lines = [json.dumps(d.as_json()) for d in decisions]
        self.text("decisions.jsonl", "\n".join(lines) + "\n")

    def text(self, name: str, text: str) -> None:
        """One file of the dump."""
        if self.folder is not None:
            (self.folder / name).write_text(text, encoding="utf-8")

    def numbered(self, name: str, text: str) -> None:
        """One file of the dump, after those before it."""
        self.text(f"{next(self._count):02d}_{name}", text)
