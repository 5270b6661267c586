"""What kernels compile to, in a process of its own: the tests' may hold Triton's library in interpreted form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def reports_of(program: str, given: Any, folder: Path) -> list[dict[str, Any]]:
    """What a program prints as JSON, given JSON. Its caches lie in `folder`; the test is skipped without Triton."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"MONARCH_CACHE_DIR": str(folder / "kernels"), "TRITON_CACHE_DIR": str(folder / "triton")}
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found: list[dict[str, Any]] = json.loads(run.stdout)
    return found
