"""What a report of a problem should begin with: versions, devices, caches, and whether a small compilation is right."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from monarch_compile.cost.devices import installed
from monarch_compile.family import Trial, families
from monarch_compile.refusal import kernel_refusal
from monarch_compile.tools.timing import environment


@dataclass(frozen=True)
class DeviceFacts:
    """A device: its name and capability, what runs lowered attention there, its description in the cost model.

    ceilings: of the device at its best, where they were measured.
    """

    device: str
    name: str
    capability: str
    kernels: str
    cost_model: str
    ceilings: str = ""

    def __str__(self) -> str:
        model = self.cost_model + (f" ({self.ceilings})" if self.ceilings else "")
        return f"{self.device}: {self.name} ({self.capability}); kernels: {self.kernels}; cost model: {model}"


@dataclass(frozen=True)
class CacheFacts:
    """The folder of emitted kernels: how many files it holds, and their bytes."""

    folder: str
    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.folder}: kernels: {self.files}, {self.bytes / 1024:.0f} KiB"


@dataclass(frozen=True)
class SelfTest:
    """A small problem through the backend against the reference: its relative error (None: it did not run).

    what: of the problem is tried; "" where it goes without saying.
    """

    device: str
    error: float | None
    bound: float
    failure: str = ""
    what: str = ""

    @property
    def passed(self) -> bool:
        """Whether it ran and came near enough; an error of nan is none."""
        return self.error is not None and self.error <= self.bound

    def __str__(self) -> str:
        outcome = "pass" if self.passed else "FAIL"
        found = f"relative error {self.error:.1e} (at most {self.bound:g})" if self.error is not None else self.failure
        return f"{', '.join(filter(None, (self.device, self.what)))}: {outcome}, {found}"


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `diagnose` found; prints as sections."""

    versions: Mapping[str, str]
    devices: tuple[DeviceFacts, ...]
    cache: CacheFacts
    variables: Mapping[str, str]
    self_tests: tuple[SelfTest, ...]

    @property
    def healthy(self) -> bool:
        """Whether every self-test passed."""
        return all(test.passed for test in self.self_tests)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        tests = [asdict(test) | {"passed": test.passed} for test in self.self_tests]
        return asdict(self) | {"self_tests": tests, "healthy": self.healthy}

    def __str__(self) -> str:
        sections = {
            "versions": [f"{name}: {version}" for name, version in self.versions.items()],
            "devices": self.devices,
            "kernel cache": [self.cache],
            "environment variables": [_variable(*item) for item in self.variables.items()] or ["none set"],
            "self-test": self.self_tests,
        }
        return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def diagnose() -> Diagnosis:
    """Look at this machine and compile a small problem of each family on each type of device that can run it."""
    places = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    tested = ["cpu", *(place for place in places[1:2] if kernel_refusal(torch.device(place)) is None)]
    trials = [trial for own in families() for trial in own.trials]
    return Diagnosis(
        versions=_versions(),
        devices=tuple(_device(place) for place in places),
        cache=_cache(),
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith("MONARCH_")},
        self_tests=tuple(self_test(trial, place) for trial in trials for place in tested),
    )


def self_test(trial: Trial, device: str) -> SelfTest:
    """Run the trial of a family on `device`."""
    bound = trial.bounds[torch.device(device).type]
    try:
        return SelfTest(device, trial.error(device), bound, what=trial.what)
    except Exception as error:  # whatever is broken here is what the caller wants to read
        return SelfTest(device, None, bound, f"{type(error).__name__}: {error}".strip(), trial.what)


def _versions() -> dict[str, str]:
    found = environment()
    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError as error:
        triton = f"cannot be imported ({error})"
    return {
        "monarch_compile": found["monarch_compile"],
        "torch": found["torch"],
        "triton": triton,
        "cuda": torch.version.cuda or "none: a build of torch without CUDA",
        "python": found["python"],
        "platform": platform.platform(),
    }


def _device(place: str) -> DeviceFacts:
    described = installed(place)
    cost_model, ceilings = described.name, str(described.ceiling or "")
    if place == "cpu":
        found = environment()
        capability = f"{found['cpu_capability']}, torch threads: {found['threads']}"
        return DeviceFacts(place, found["cpu"], capability, "none; Inductor compiles the reference", cost_model)
    refusal = kernel_refusal(torch.device(place))
    kernels = "Triton" if refusal is None else f"none, all sites stay exact: {refusal}"
    major, minor = torch.cuda.get_device_capability(place)
    return DeviceFacts(place, torch.cuda.get_device_name(place), f"{major}.{minor}", kernels, cost_model, ceilings)


def _cache() -> CacheFacts:
    from monarch_compile.codegen.source import cache_dir

    folder = cache_dir()
    sizes = [path.stat().st_size for path in Path(folder).glob("*.py")]
    return CacheFacts(str(folder), len(sizes), sum(sizes))


def _variable(name: str, value: str) -> str:
    from monarch_compile.codegen.source import CACHE_DIR_VARIABLE
    from monarch_compile.passes.dump import DEBUG_DIR_VARIABLE

    known = name in (CACHE_DIR_VARIABLE, DEBUG_DIR_VARIABLE)
    return f"{name}={value}" + ("" if known else " (not a variable that monarch_compile reads)")
