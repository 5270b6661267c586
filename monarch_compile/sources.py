"""A hash of source files, for keys of caches that must not outlive them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

SOURCES = frozenset({".py", ".jinja"})
"""Suffixes of the files that decide what is compiled."""


def source_files(root: Path) -> list[Path]:
    """Every source and template under a folder, in subfolders and linked folders too."""
    walk = os.walk(root, followlinks=True)  # in a checkout, passes and codegen are links
    return sorted(Path(folder, name) for folder, _, names in walk for name in names if Path(name).suffix in SOURCES)


def digest_of(root: Path, *others: Path) -> str:
    """A hash of names and contents of every source and template under a folder, and of other files: 16 hexadecimal
    digits."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for path in others:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
