"""What a family adds to the command line."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from monarch_compile.registry import FAMILIES


@dataclass(frozen=True)
class Commands:
    """A family's part of the commands, as plain functions. No two families may have an argument of one name.

    add_tune_arguments: what `tune` is told of the family's problems. problems: their IRs, on a type of device.
    add_bench_arguments: what `bench cpu` is told. bench: times the family there, and prints.
    """

    add_tune_arguments: Callable[[ArgumentParser], None]
    problems: Callable[[Namespace, str], list[Any]]
    add_bench_arguments: Callable[[ArgumentParser], None]
    bench: Callable[[Namespace], object]


def all_commands() -> tuple[Commands, ...]:
    """Those of all families that have any."""
    modules = [family.commands for family in FAMILIES.values() if family.commands]
    return tuple(importlib.import_module(module).COMMANDS for module in modules)
