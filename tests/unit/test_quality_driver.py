"""The quality benchmark's driver: requirements, resuming, failing and missing tasks, the table and the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the benchmark's tasks need transformers")

from benchmarks.quality import __main__ as driver
from benchmarks.quality import metrics, present
from benchmarks.quality.results import Results
from benchmarks.quality.task import TASKS, Task
from benchmarks.quality.variants import VARIANTS, Variant


def test_requirements_pin_every_package_of_every_task():
    folder = Path(driver.__file__).parents[1]
    files = (*folder.glob("requirements-*.txt"), folder.parent / "examples" / "requirements-demo.txt")
    text = "".join(path.read_text() for path in files)
    pinned = {line.split("==")[0] for line in text.splitlines() if "==" in line and not line.startswith("#")}
    assert {name for entry in TASKS.values() for name in entry.packages} <= pinned
    assert text.count("--hash=sha256:") >= len(pinned)


class Halves(nn.Module):
    def forward(self, x):
        return x / 2


def small_task(calls: list[str]) -> Task:
    def evaluate(model):
        calls.append("evaluated")
        return {"error": metrics.relative_error(torch.ones(2) / 2, model(torch.ones(2)))}

    return Task(
        name="whisper", title="Halves", sites=0, model=Halves(), calibration_inputs=(((torch.ones(2),), {}),),
        metric=metrics.relative_error, metric_unit="", budget=0.1, evaluate=evaluate, primary="error", better="lower",
        block_size=2,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*arguments) -> (exit status, what was evaluated); the only task is `small_task`, uncompiled."""
    calls: list[str] = []
    monkeypatch.setattr(driver, "_load", lambda name, args: small_task(calls))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(driver, "draw", lambda *_: None)
    monkeypatch.setattr("benchmarks.quality.measure.sites", lambda *_: {"lowered": 0, "sites": 0, "saved_s": 0.0})

    def run(*arguments: str):
        calls.clear()
        common = ["--tasks", "whisper", "--output", str(tmp_path / "r.json"), "--seconds", "0"]
        return driver.main([*common, *arguments]), len(calls)

    return run


def test_rows_that_are_there_are_not_made_again(run, tmp_path):
    assert run("--variants", "exact") == (0, 1)
    assert run("--variants", "exact", "paper") == (0, 1)
    assert run("--variants", "exact", "paper") == (0, 0)
    assert run("--variants", "paper", "--fresh") == (0, 1)
    content = json.loads((tmp_path / "r.json").read_text())
    assert [row["variant"] for row in content["rows"]] == ["paper"]
    assert content["machine"]["torch"] == torch.__version__
    assert content["rows"][0]["measured"]["variant"]["runs"] > 0


def test_a_row_of_another_version_is_made_again(run, monkeypatch):
    assert run("--variants", "exact", "paper") == (0, 2)
    monkeypatch.setattr("benchmarks.quality.results.package_digest", lambda names: "another")
    assert run("--variants", "exact", "paper") == (0, 1)  # the exact model does not depend on our sources
    monkeypatch.setattr("benchmarks.quality.results.own_digest", lambda task: "another")
    assert run("--variants", "exact", "paper") == (0, 2)


def test_a_stale_row_that_is_not_made_again_is_marked(run, monkeypatch, capsys):
    run("--variants", "exact", "paper")
    monkeypatch.setattr("benchmarks.quality.results.package_digest", lambda names: "another")
    capsys.readouterr()
    run("--variants", "exact")
    assert "| paper's form (*) |" in capsys.readouterr().out


def test_one_failing_row_does_not_take_the_others_with_it(run, monkeypatch, tmp_path):
    def broken(task, options):
        raise RuntimeError("no such form")

    monkeypatch.setattr(driver, "VARIANTS", (Variant("paper", "broken", broken), VARIANTS[0]))
    status, evaluated = run("--variants", "exact", "paper")
    assert (status, evaluated) == (1, 1)
    assert [row["variant"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]] == ["exact"]


def test_an_unavailable_task_is_skipped_and_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("benchmarks.quality.task.Entry.missing", lambda self: ("some-package",))
    assert driver.main(["--tasks", "minilm", "--output", str(tmp_path / "r.json")]) == 1
    assert "minilm: skipped: some-package not installed: pip install" in capsys.readouterr().err


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no results"):
        Results.open(tmp_path / "r.json", {})


ROW = {
    "task": "minilm", "variant": "paper", "title": "paper's form", "task_title": "Retrieval", "primary": "mrr",
    "better": "higher", "stale": False, "control": False,
    "metrics": {"mrr": 0.75}, "lowered": 5, "sites": 6, "predicted_s": 0.002,
    "measured": {"variant": {"p50": 3.0}, "exact": {"p50": 4.0}},
}  # fmt: skip
CONTENT = {
    "machine": {"cpu": "a CPU", "threads": 1, "torch": "2.13", "monarch_compile": "0.1"}, "dtype": "float32",
    "rows": [ROW, {**ROW, "title": "control", "measured": None, "predicted_s": None, "stale": True}],
}  # fmt: skip


def test_the_table_shows_numbers_sites_and_times():
    table = present.markdown(CONTENT)
    assert "a CPU, 1 thread; float32; torch 2.13" in table
    assert "| paper's form | 0.7500 | 5 of 6 | 3 | 4 | 2 |" in table
    assert "| control (*) | 0.7500 | 5 of 6 | - | - | - |" in table
    assert "(*) made by other versions" in table


@pytest.mark.parametrize(("better", "value", "doubtful"), [("higher", 0.7, 0), ("higher", 0.75, 1), ("lower", 0.7, 1)])
def test_a_control_that_does_not_fail_is_told(better, value, doubtful):
    rows = [{**ROW, "better": better}, {**ROW, "better": better, "control": True, "metrics": {"mrr": value}}]
    found = present.doubts({"rows": rows})
    assert len(found) == doubtful
    assert all("should be worse than 'paper's form'" in sentence for sentence in found)


def test_the_plot_is_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        present.draw(CONTENT, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert "<svg" in text
