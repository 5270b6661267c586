"""The benchmark of whole models on a CUDA device: every form runs, by both clocks, and is as wrong as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.models import __main__ as driver
from benchmarks.models.problems import PRESETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_tiny_preset_runs_in_every_form(tmp_path: Path) -> None:
    content = driver.run(driver._bench("cuda", 50, 1.0), PRESETS["tiny-cuda"], tmp_path / "models.json")
    ran = [row for row in content["rows"] if row["times"]]
    assert all(set(row["times"]) == {"graph", "eager"} and row["peak_mib"] > 0 for row in ran)
    for problem in ("vit-tiny", "dit-tiny"):
        rows = [row for row in ran if row["problem"]["architecture"]["name"] == problem]
        exact = [row for row in rows if row["form"].startswith("exact")]
        assert len(exact) == 1
        assert exact[0]["error"] < 0.02
        assert [(row["lowered"], row["sites"]) for row in rows if row not in exact] == [(2, 2)] * 2
        assert all(row["error"] < 0.3 for row in rows)
