"""What TORCH_LOGS, TORCH_TRACE and Dynamo's counters say of a compilation, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

def both(q):
    lowered = F.scaled_dot_product_attention(q, q, q)
    return F.scaled_dot_product_attention(lowered, q, q, is_causal=True)

torch.compile(both, backend="monarch", options={"policy": "always"})(torch.randn(1, 2, 64, 8))
print(json.dumps(counters["monarch"]))
"""
COUNTS = {"lowered": 1, "exact": 1, "exact: mask_causal": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """What the script printed, and the folder of its structured trace."""
    folder = tmp_path_factory.mktemp("logs")
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"TORCH_LOGS": "+monarch_compile.passes", "TORCH_TRACE": str(folder / "trace")}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    return done, folder / "trace"


def test_torch_logs_tell_the_story_of_each_site(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    story = [line.split("] ", 1)[-1] for line in run[0].stderr.splitlines() if "pipeline.py" in line]
    text = "\n".join(story)
    assert "match: 2 attention sites found" in text
    assert "choose: 1 attention site to lower" in text
    assert "lower: 1 attention site lowered" in text
    lowered, exact, stopped = (
        next(line for line in story if said in line) for said in ("lowered [lowered]", "exact [mask_causal]", "stopped")
    )
    assert "script.py:8" in lowered
    assert "x against exact attention" in lowered
    assert "script.py:9" in exact
    assert "stopped at mask" in stopped
    assert "would lower with: " in stopped


def test_the_counters_hold_every_code(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    assert json.loads(run[0].stdout.splitlines()[-1]) == COUNTS


def test_the_structured_trace_holds_the_sites(run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    (log,) = run[1].iterdir()
    lines = log.read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if '"monarch_sites"' in line)
    payload = [line[1:] for line in lines[at + 1 :]]
    end = next((i for i, line in enumerate(lines[at + 1 :]) if not line.startswith("\t")), len(payload))
    found = json.loads("".join(payload[:end]))
    assert found["counts"] == COUNTS
    assert [(s["status"], s["stage"], s["code"]) for s in found["sites"]] == [
        ("lowered", "lowered", "lowered"),
        ("exact", "mask", "mask_causal"),
    ]
