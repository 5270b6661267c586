"""The results file: one row for each task and variant, written as soon as it is there, kept while it is valid."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import monarch_compile
from benchmarks.quality.task import TASKS, package_version
from monarch_compile.tools.timing import environment

PRESENTATION = ("__main__.py", "present.py", "results.py")
"""Sources here on which no number depends."""
PACKAGE = Path(monarch_compile.__file__).parent
ATTENTION = (
    "attention/reference.py",
    "attention/chosen.py",
    "attention/groups.py",
    "attention/op.py",
    "attention/site_call.py",
)
"""Sources of the package that say what a lowered site computes. Which sites those are is in the row itself."""
CALIBRATION = (
    "calibration/search.py",
    "attention/candidates.py",
    "calibration/selection.py",
    "family.py",
    "attention/work.py",
    "cost/prediction.py",
    "cost/devices.py",
    "calibration/instrument.py",
    "calibration/snapshot.py",
)
"""And those that say what a plan chooses."""


@dataclass
class Results:
    """Rows by (task, variant), and the file they are kept in.

    setting: what all rows have in common: device, dtype, threads and the like.
    """

    path: Path
    setting: dict[str, Any]
    rows: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, setting: dict[str, Any], fresh: bool = False) -> Results:
        """What the file at `path` holds, or nothing where there is none or `fresh`.

        Raises:
            ValueError: the file is there and is not a results file.
        """
        results = Results(path, setting)
        if path.is_file() and not fresh:
            try:
                rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
                results.rows = {(row["task"], row["variant"]): row for row in rows}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} holds no results of this benchmark ({error!r}); name another file") from error
        return results

    def finished(self, task: str, variant: str, options: dict[str, Any]) -> bool:
        """Whether the row is there and was made by these versions, sources and options."""
        row = self.rows.get((task, variant))
        return row is not None and row.get("key") == self.key(task, variant, options)

    def add(self, row: dict[str, Any], options: dict[str, Any]) -> None:
        """Take a row in and write the file."""
        machine = environment()
        versions = {name: package_version(name) for name in TASKS[row["task"]].packages}
        stamp = {"key": self.key(row["task"], row["variant"], options), "date": machine["date"], "packages": versions}
        self.rows[row["task"], row["variant"]] = {**row, **stamp}
        self._write({**self.setting, "machine": machine})

    def key(self, task: str, variant: str, options: dict[str, Any]) -> str:
        """A hash of all that a row depends on."""
        machine = {name: value for name, value in environment().items() if name != "date"}
        versions = [package_version(name) for name in ("transformers", "numpy", *TASKS[task].packages)]
        parts = [task, variant, options, self.setting, machine, versions, own_digest(task)]
        if variant != "exact":
            parts.append(package_digest(ATTENTION + CALIBRATION * (variant == "calibrated")))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def ordered(self, variants: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows in the order of the tasks and of `variants` (name -> options); "stale" says which are not `finished`."""
        return [
            {**self.rows[task, name], "stale": not self.finished(task, name, options)}
            for task in TASKS
            for name, options in variants.items()
            if (task, name) in self.rows
        ]

    def _write(self, head: dict[str, Any]) -> None:
        content = {**head, "rows": list(self.rows.values())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
        os.replace(partial, self.path)


def package_digest(names: Sequence[str]) -> str:
    """A hash of some of the package's sources."""
    return hashlib.sha256(b"".join((PACKAGE / name).read_bytes() for name in names)).hexdigest()[:16]


def own_digest(task: str) -> str:
    """A hash of the sources of this benchmark that a task's numbers depend on."""
    others = {f"{entry.module}.py" for entry in TASKS.values()} - {f"{TASKS[task].module}.py"}
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in others and path.name not in PRESENTATION:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
