"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import monarch_compile.codegen.launcher as launching
from tests.support.interpreter import interpreted, poisoned

__all__ = ["interpreted", "own_cache", "poisoned"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of this test's own, and no schedule left in use after it."""
    monkeypatch.setenv("MONARCH_CACHE_DIR", str(tmp_path))
    yield
    launching._CHOSEN.clear()
    launching.build.cache_clear()
