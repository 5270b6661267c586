"""The distillation benchmark: rows, controls and resuming, on a small model."""

from __future__ import annotations

import json

import pytest
import torch
from support.distilled import OPTIONS, Transformer, batches

pytest.importorskip("transformers", reason="the benchmark's models need transformers")
pytest.importorskip("safetensors", reason="its packs need safetensors")

from benchmarks.distill import __main__ as driver
from benchmarks.distill import problems
from benchmarks.distill.problems import Data, Limits, Problem, image_metrics, mean_metrics, state_metrics


@pytest.fixture
def small(monkeypatch):
    loads = []

    def load(pack, limits):
        loads.append(limits)
        return Data(Transformer().eval(), batches(limits.number), batches(limits.unseen, seed=1), state_metrics)

    monkeypatch.setitem(driver.PROBLEMS, "whisper", Problem("small", load, {"paper": OPTIONS}))
    return loads


def run(path, *more):
    arguments = ["--tasks", "whisper", "--output", str(path), "--calls", "8", "--unseen", "2", *more]
    return driver.main([*arguments, "--steps", "60", "--lr", "0.03"])


def test_a_model_gains_and_controls_do_not(small, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert run(path) == 0
    learned, frozen, random = json.loads(path.read_text())["rows"]
    assert learned["kind"] == "distilled"
    assert learned["after"]["state_error"] < learned["before"]["state_error"]
    assert learned["after"]["state_error"] == pytest.approx(learned["report"]["held_out"]["after"], rel=0.05)
    assert frozen["after"] == frozen["before"]
    assert random["after"]["state_error"] >= random["before"]["state_error"]
    assert "| small | paper | distilled | 2 of 2 |" in capsys.readouterr().out
    assert small == [Limits(8, 2)]
    assert run(path) == 0
    assert small == [Limits(8, 2)]  # nothing was missing
    assert not list(tmp_path.glob("*.pt"))


def test_no_row_is_begun_after_the_time_is_up(small, tmp_path):
    path = tmp_path / "results.json"
    assert run(path, "--seconds", "0") == 0
    assert not path.exists()
    assert small == []


def test_a_control_that_gains_fails_the_run(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "random_target", lambda call: call.exact())
    assert run(tmp_path / "results.json", "--kinds", driver.RANDOM) == 1
    assert "random targets gains" in capsys.readouterr().out


def test_a_packed_photograph_is_nearly_the_same():
    image = torch.linspace(0, 1, 28)[None, None].expand(3, 28, 28)
    data = problems.encoded(image)
    assert (problems._decoded(data, 28) - image).abs().max() < 0.03
    assert problems._decoded(data, 14).shape == (3, 14, 14)


def test_metrics_tell_features_apart():
    features = torch.randn(1, 5, 4)
    other = features.clone()
    other[:, 0] *= 2
    found = mean_metrics(image_metrics, [(features, features), (features, other)])
    assert found["patch_error"] == 0
    assert found["cosine"] == pytest.approx(1)
    assert found["class_error"] == pytest.approx(0.5)
