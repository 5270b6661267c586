"""Stand-ins for modules that a package imports but that the part of it used here never calls."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Stub(ModuleType):
    """A module of which every attribute is an empty class: good for annotations and base classes, and nothing else."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "A stand-in: the real module is not installed.")
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []  # it may have submodules

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"stub {self.__name__} has no {name}")
        return type(name, (), {"__module__": self.__name__})


@contextmanager
def stubbed(names: Sequence[str]) -> Iterator[None]:
    """Let the modules `names` ("package", "package.module") be imported inside the body; real ones are left alone.

    Afterwards they are gone again. What was imported in the body keeps the stand-ins that it saw, and stays
    importable, for torch.compile looks modules up by their names.
    """
    absent = [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in absent:
        stub = sys.modules[name] = Stub(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, stub)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
