"""The examples of long convolutions and their measurements, on tiny models that are not compiled."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import mixer
from examples import monarch_mixer, train_recall
from examples.curves import svg
from examples.mixer.models import SIZES, MonarchMixerEncoder
from examples.train_recall import IGNORED, NUM_KEYS, Run, Task
from monarch_compile.report.explainer import explain
from monarch_compile.tools.timing import Timing

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives back the model as it is."""
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)


@pytest.mark.usefixtures("_not_compiled")
def test_the_example_shows_what_was_rewritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert monarch_mixer.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for name in ("MonarchMixerEncoder", "HyenaLM"):
        assert f"{name}, 2 x 512 tokens" in out
    assert out.count("largest difference: 0.00e+00") == 2
    assert out.count("long convolution") >= 2
    assert "tokens/s" not in out


def test_a_model_without_long_convolutions_has_none_rewritten() -> None:
    report = explain(torch.nn.Linear(4, 4), torch.zeros(2, 4))
    assert monarch_mixer.verdict(report).startswith("No long convolution was rewritten")


@pytest.mark.slow
def test_both_backends_agree_on_a_small_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        monarch_mixer.compare(MonarchMixerEncoder(replace(SIZES["tiny"], depth=1)).eval(), "cpu")
    difference = capsys.readouterr().out.split("largest difference: ")[1].split(",")[0]
    assert float(difference) < 1e-4


@pytest.fixture
def _no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first call timed takes 10 ms, the next 20, then 30."""
    tens = count(10, 10)

    def clock(call) -> Timing:
        call()
        ms = float(next(tens))
        return Timing(ms, ms, ms, 1)

    monkeypatch.setattr(mixer, "cpu_clocks", lambda: {"eager": clock})


@pytest.mark.usefixtures("_not_compiled", "_no_clocks")
def test_throughput_is_measured_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mixer.json"
    command = ["--size", "tiny", "--device", "cpu", "--batch", "2", "--lengths", "64", "--json", str(path)]
    assert mixer.main(command) == 0
    out = capsys.readouterr().out
    assert "tiny, 2 x 64, bfloat16" in out
    lines = [line.split() for line in out.splitlines() if line.startswith(("mixer,", "bert,"))]
    assert [line[4:6] for line in lines] == [["10.00", "2.00x"], ["20.00", "1.00x"], ["30.00", "0.67x"]]
    content = json.loads(path.read_text())
    assert [row["subject"] for row in content["rows"]] == [subject.name for subject in mixer.SUBJECTS]
    for row, ms in zip(content["rows"], (10, 20, 30), strict=True):
        assert row["failures"] == {}
        assert row["tokens_per_s"]["eager"] == pytest.approx(2 * 64 / ms * 1e3)
        assert 0 < row["error"] < 0.05
    assert mixer.main(command) == 0
    assert json.loads(path.read_text()) == content


@pytest.mark.usefixtures("_not_compiled", "_no_clocks")
def test_a_model_that_fails_leaves_the_others_standing(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(size):
        model = MonarchMixerEncoder(size)
        model.norm = torch.nn.LayerNorm(3)
        return model

    subjects = (mixer.Subject("broken", broken), *mixer.SUBJECTS[1:])
    monkeypatch.setattr(mixer, "SUBJECTS", subjects)
    assert mixer.main(["--size", "tiny", "--device", "cpu", "--batch", "1", "--lengths", "32"]) == 0
    out = capsys.readouterr().out
    assert "broken, model: RuntimeError" in out
    assert "1.00x" in out


@pytest.mark.gpu
def test_throughput_on_a_gpu_has_both_clocks(tmp_path: Path) -> None:
    path = tmp_path / "mixer.json"
    assert (
        mixer.main(["--size", "tiny", "--device", "cuda", "--batch", "2", "--lengths", "256", "--json", str(path)]) == 0
    )
    for row in json.loads(path.read_text())["rows"]:
        assert row["failures"] == {}
        assert set(row["ms"]) == {"graph", "eager"}
        assert row["error"] < 0.05


def test_arguments_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert not monarch_mixer.parse_arguments(["--device", "cpu"]).measured
    on_gpu = monarch_mixer.parse_arguments(["--device", "cuda", "--size", "341m"])
    assert on_gpu.measured
    assert on_gpu.lengths == mixer.LENGTHS
    assert monarch_mixer.parse_arguments(["--device", "cpu", "--lengths", "64"]).measured
    with pytest.raises(SystemExit):
        monarch_mixer.parse_arguments(["--size", "7b"])
    assert "invalid choice: '7b'" in capsys.readouterr().err


def test_recall_asks_for_values_of_keys_seen_before() -> None:
    tokens, targets = Task(batch=3, length=64, dtype="float32", device="cpu").batches(0).next()
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        known: dict[int, int] = {}
        for at in range(0, 64, 2):
            key, value = row[at : at + 2]
            assert key < NUM_KEYS <= value < 2 * NUM_KEYS
            assert wanted[at] == known.get(key, IGNORED)
            assert known.setdefault(key, value) == value
            assert wanted[at + 1] == IGNORED
    assert not torch.equal(tokens[0], tokens[1])


def test_streams_of_a_seed_are_the_same() -> None:
    task = Task(batch=2, length=32, dtype="float32", device="cpu")
    first, again, other = (task.batches(seed).next()[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


SMALL = ["--device", "cpu", "--length", "32", "--batch", "4", "--width", "64", "--depth", "1"]


@pytest.mark.usefixtures("_not_compiled")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_writes_the_losses_of_both_backends(tmp_path: Path, capsys, dtype: str) -> None:
    path = tmp_path / "recall.json"
    assert train_recall.main([*SMALL, "--steps", "5", "--dtype", dtype, "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "long convolution" in out
    assert "losses differ by 0.00e+00 in the first step, by 0.00e+00 at most" in out
    content = json.loads(path.read_text())
    assert [run["backend"] for run in content["runs"]] == ["inductor", "monarch"]
    assert content["runs"][0]["losses"] == content["runs"][1]["losses"]
    assert len(content["runs"][0]["losses"]) == 5
    assert len(set(content["runs"][0]["losses"])) == 5
    lines = ElementTree.parse(path.with_suffix(".svg")).iter(f"{SVG}polyline")
    assert [len(line.get("points", "").split()) for line in lines] == [5, 5]


def test_training_lowers_the_loss() -> None:
    task = Task(batch=8, length=32, dtype="float32", device="cpu")
    model = train_recall.new_model(task, replace(SIZES["tiny"], vocab_size=2 * NUM_KEYS, max_length=32))
    run = train_recall.train("eager", model, model, task, 40, 2e-3)
    assert run.losses[-1] < run.losses[0] - 0.5
    assert run.accuracy > 1.2 / NUM_KEYS


def test_accuracy_counts_what_is_asked() -> None:
    task = Task(batch=2, length=64, dtype="float32", device="cpu")

    def knows_everything(tokens):
        """The value that follows: what a causal model cannot see."""
        return torch.nn.functional.one_hot(tokens.roll(-1, 1), 2 * NUM_KEYS).float()

    assert train_recall.accuracy(knows_everything, task) == 1
    assert train_recall.accuracy(lambda tokens: knows_everything(tokens).roll(1, -1), task) == 0


def test_the_summary_says_how_far_losses_are_apart() -> None:
    runs = [Run("a", (2.0, 1.0, 0.5), 1.0, 3.0, 4.0), Run("b", (2.0, 1.25, 0.5), 1.0, 3.0, 4.0)]
    assert "losses differ by 0.00e+00 in the first step, by 2.50e-01 at most" in train_recall.summary(runs)
    assert asdict(runs[1])["losses"] == (2.0, 1.25, 0.5)


def test_curves_are_drawn_to_scale() -> None:
    tree = ElementTree.fromstring(svg({"a < b": [0.0, 2.0], "c": [1.0, 1.0, 1.0]}, "t", "x", "y"))
    first, second = (
        [[float(v) for v in p.split(",")] for p in line.get("points", "").split()]
        for line in tree.iter(f"{SVG}polyline")
    )
    assert first[1][0] == second[1][0] < second[2][0]
    assert second[0][1] == pytest.approx((first[0][1] + first[1][1]) / 2)
    assert "a < b" in [text.text for text in tree.iter(f"{SVG}text")]


@pytest.mark.parametrize("curves", [{}, {"a": []}])
def test_nothing_to_draw_is_refused(curves) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        svg(curves, "t", "x", "y")
