"""A lowered program as a package of AOTInductor: built on the device, loaded without this library, right.

Each step is a process of its own, so that a crash is a failure with an exit code. Where torch cannot load the package
of a plain nn.Linear, that of attention is not expected to load either.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Step = Callable[[str, str], subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "packages.py"
TIMEOUT_S = 600
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture(scope="module", params=DEVICES)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    """Runs "build" or "run" for "linear" or "attention" on a device."""
    folder = tmp_path_factory.mktemp(request.param)
    done: dict[tuple[str, str], subprocess.CompletedProcess[str]] = {}

    def take(what: str, kind: str) -> subprocess.CompletedProcess[str]:
        if (what, kind) not in done:
            command = [sys.executable, str(SCRIPT), what, kind, request.param, str(folder)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            done[what, kind] = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        return done[what, kind]

    return take


def story(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended, with the last that it said; a negative code is a signal."""
    return f"exit code {done.returncode}: {done.stderr.strip()[-1500:]}"


@pytest.mark.timeout(4 * TIMEOUT_S)
def test_a_package_is_built_and_is_loaded_without_this_library(step: Step) -> None:
    for what in ("build", "run"):
        done = step(what, "attention")
        if done.returncode != 0:
            plain = [step(earlier, "linear") for earlier in dict.fromkeys(("build", what))][-1]
            if plain.returncode != 0:
                pytest.xfail(f"torch cannot {what} a package of nn.Linear here: {story(plain)}")
        assert done.returncode == 0, story(done)


def test_a_crash_is_an_exit_code(step: Step) -> None:
    done = step("run", "nothing")
    assert done.returncode not in (0, None)
    assert "nothing.pt" in story(done)
