"""The golden outcomes: one JSON file a group, entry -> lines."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tests.corpus import bodies, convolutions, hf_models, negatives, spellings, timm_models, torch_nn, vision
from tests.corpus.entry import Entry

FOLDER = Path(__file__).parent / "golden"
GROUPS = {
    "spellings": spellings.entries,
    "negatives": negatives.entries,
    "bodies": bodies.entries,
    "convolutions": convolutions.entries,
    "torch_nn": torch_nn.entries,
    "transformers": hf_models.entries,
    "timm": timm_models.entries,
    "vision": vision.entries,
}


@cache
def entries_of(group: str) -> dict[str, Entry]:
    """The entries of a group by name."""
    found = GROUPS[group]()
    named = {entry.name: entry for entry in found}
    if len(named) != len(found):
        raise ValueError(f"two entries of {group} share a name")
    return named


def load(group: str) -> dict[str, list[str]]:
    """What the group's file holds; nothing where there is no file."""
    path = FOLDER / f"{group}.json"
    outcomes: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return outcomes


def save(group: str, name: str, lines: list[str]) -> None:
    """Put one outcome into the group's file, and drop those of entries that are no more."""
    outcomes = {**load(group), name: lines}
    kept = {name: outcomes[name] for name in entries_of(group) if name in outcomes}
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
    (FOLDER / f"{group}.json").write_text(text, encoding="utf-8")
