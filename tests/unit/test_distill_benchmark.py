"""The distillation benchmark: rows, controls and resuming, on a small model."""

from __future__ import annotations

import itertools
import json
import signal
import time

import pytest
import torch
from support.distilled import OPTIONS, Transformer, batches

pytest.importorskip("transformers", reason="the benchmark's models need transformers")
pytest.importorskip("safetensors", reason="its packs need safetensors")

from benchmarks.distill import __main__ as driver
from benchmarks.distill import problems
from benchmarks.distill.problems import Data, Limits, Problem, image_metrics, mean_metrics
from monarch_compile import distill
from monarch_compile.distillation.checkpoint import Checkpoint


@pytest.fixture
def small(monkeypatch):
    loads = []

    def as_if_calibrated(model, calls, *, budget, options, progress):
        """The plan of a form: exact attention is faster at this size, and `calibrate` would keep it."""
        assert (budget, options, len(calls)) == (0.2, {"policy": "always"}, 2)
        return distill(model, calls, options=OPTIONS, steps=1, progress=False).plan

    monkeypatch.setattr(driver, "calibrate", as_if_calibrated)

    def state_metrics(place, reference, output):
        assert 0 <= place < 2
        return {"state_error": problems.relative_error(reference, output)}

    def load(pack, limits):
        loads.append(limits)
        torch.manual_seed(0)
        return Data(Transformer().eval(), batches(limits.number), batches(limits.unseen, seed=1), state_metrics)

    own = Problem("small", load, lambda folder, limits: [], {"paper": OPTIONS}, primary="state_error")
    monkeypatch.setitem(driver.PROBLEMS, "whisper", own)
    return loads


def run(path, *more):
    arguments = ["--tasks", "whisper", "--output", str(path), "--calls", "8", "--unseen", "2", *more]
    return driver.main([*arguments, "--steps", "60", "--lr", "0.03", "--joint-steps", "30"])


def test_a_model_gains_and_controls_do_not(small, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert run(path) == 0
    learned, together, frozen, random, calibrated, both = json.loads(path.read_text())["rows"]
    assert learned["kind"] == "distilled"
    assert learned["after"]["state_error"] < learned["before"]["state_error"]
    assert learned["after"]["state_error"] == pytest.approx(learned["report"]["held_out"]["after"], rel=0.05)
    assert together["kind"] == "distilled, then together"
    assert together["after"]["state_error"] < learned["after"]["state_error"]
    assert frozen["after"] == frozen["before"]
    assert random["after"]["state_error"] >= random["before"]["state_error"]
    assert (calibrated["form"], calibrated["kind"]) == ("free", "calibrated")
    assert calibrated["after"] == calibrated["before"]
    assert calibrated["before"] == learned["before"]
    assert both["before"] == calibrated["before"]
    assert both["after"] == learned["after"]
    assert both["options"] == {"policy": "always"}
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| small")]
    assert [line[1:5] for line in table][:4] == [
        ["paper", "distilled", "2 of 2", "2 of 2"],
        ["paper", "distilled, then together", "2 of 2", "2 of 2"],
        ["paper", "control: frozen", "0 of 2", "2 of 2"],
        ["paper", "control: random targets", table[3][3], "2 of 2"],
    ]
    assert [line[1:5] for line in table][4:] == [
        ["free", "calibrated", "0 of 2", "2 of 2"],
        ["free", "calibrated, distilled", "2 of 2", "2 of 2"],
    ]
    assert {line[7] for line in table} == {"state_error"}
    assert small == [Limits(8, 2)]
    assert run(path) == 0
    assert small == [Limits(8, 2)]  # nothing was missing
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"], "no checkpoint and no plan is left"


def test_nothing_is_begun_after_the_time_is_up(small, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    monkeypatch.setattr(driver, "_run_task", lambda *_: time.sleep(20))
    start = time.perf_counter()
    assert run(path, "--seconds", "0") == 0
    assert time.perf_counter() - start < 10
    assert not path.exists()
    signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.mark.parametrize("kind", [driver.LEARNS, driver.BOTH])
def test_a_row_that_is_stopped_goes_on_to_the_same_weights(small, tmp_path, monkeypatch, kind, capsys):
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert run(whole, "--kinds", kind) == 0
    written = []
    write = Checkpoint.write

    def write_and_stop(checkpoint):
        write(checkpoint)
        if checkpoint.path is not None:
            written.append(checkpoint)
        if len(written) == 1:
            signal.setitimer(signal.ITIMER_REAL, 1e-6)
            time.sleep(0.5)

    monkeypatch.setattr(Checkpoint, "write", write_and_stop)
    assert run(stopped, "--kinds", kind, "--seconds", "1000") == 0
    assert not stopped.exists()
    assert "the same command goes on from here" in capsys.readouterr().out
    left = {file.suffix for file in tmp_path.glob("stopped*")}
    assert left == ({".pt", ".json"} if kind == driver.BOTH else {".pt"})
    assert run(stopped, "--kinds", kind) == 0
    (first,), (second,) = (json.loads(path.read_text())["rows"] for path in (whole, stopped))
    assert len(written) > 1
    for name in ("before", "after", "forms"):
        assert first[name] == second[name]
    assert not list(tmp_path.glob("*.pt"))


def test_a_control_that_gains_fails_the_run(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "random_target", lambda call: call.exact())
    assert run(tmp_path / "results.json", "--kinds", driver.RANDOM) == 1
    assert "random targets gains" in capsys.readouterr().out


def test_a_packed_photograph_is_nearly_the_same():
    image = torch.linspace(0, 1, 28)[None, None].expand(3, 28, 28)
    data = problems.encoded(image)
    assert (problems._decoded(data, 28) - image).abs().max() < 0.03
    assert problems._decoded(data, 14).shape == (3, 14, 14)


def test_parts_of_photographs_are_enlarged_and_never_the_same():
    images = [torch.rand(3, 28, 28) for _ in range(2)]
    parts = problems.parts_of(images, 5)
    assert [part.shape for part in parts] == [(3, 28, 28)] * 5
    assert not any(torch.equal(one, other) for one, other in itertools.combinations([*images, *parts], 2))
    assert all(torch.equal(one, other) for one, other in zip(parts, problems.parts_of(images, 5), strict=True))
    assert problems.parts_of(images, 0) == []


def test_metrics_tell_features_apart():
    features = torch.randn(1, 5, 4)
    other = features.clone()
    other[:, 0] *= 2
    found = mean_metrics(image_metrics, [(features, features), (features, other)])
    assert found["patch_error"] == 0
    assert found["cosine"] == pytest.approx(1)
    assert found["class_error"] == pytest.approx(0.5)
