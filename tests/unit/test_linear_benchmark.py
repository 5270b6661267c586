"""The benchmark of block linears: presets, rows that fail, resuming, verdicts; nothing is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.linear import __main__ as driver
from benchmarks.linear import measure
from benchmarks.linear.measure import CHECKED, Bench, error_of, measured
from benchmarks.linear.present import markdown, verdicts
from benchmarks.linear.problems import LLAMA, PRESETS, TARGETS, Preset, Problem, inputs, rank_of
from benchmarks.linear.subjects import ALWAYS, FORMED, subjects
from monarch_compile.cost.devices import DEVICES
from monarch_compile.linear.ir import BLAST, FUSED
from monarch_compile.tools.timing import Timing

SMALL, TRAINED = PRESETS["tiny"].problems


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.linear.subjects.compiled", lambda function: function)


def bench() -> Bench:
    def ticking() -> Iterator[Timing]:
        ms = 1.0
        while True:
            yield Timing(ms, ms, ms, 1)
            ms += 1.0

    found = ticking()
    return Bench("cpu", DEVICES["cpu"], {"eager": lambda call: next(found)})


@pytest.mark.parametrize("problem", [SMALL, TRAINED], ids=str)
@pytest.mark.parametrize("subject", ALWAYS, ids=lambda subject: subject.name)
def test_every_subject_is_right(problem: Problem, subject: Any) -> None:
    row = measured(bench(), problem, subject)
    assert row.failures == {}
    assert row.error is not None
    assert row.error < 1e-6
    assert row.form == ("products" if subject.form else "")
    assert (row.predicted_ms is None) == problem.backward


def test_what_is_wrong_shows_and_what_fails_is_reported() -> None:
    assert error_of("cpu", SMALL, ALWAYS[1], lambda given: given.x.new_zeros(5, 36)) == 1
    row = measured(bench(), SMALL, FORMED[FUSED])
    assert row.times == {}
    assert "kernels run on NVIDIA devices" in row.failures["call"]


def test_results_are_checked_on_fresh_inputs() -> None:
    timed, checked = (inputs(SMALL, "cpu", seed) for seed in (measure.TIMED, CHECKED))
    assert not torch.equal(timed.x, checked.x)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "machine", lambda place: {"date": "today", "gpu": "none"})
    preset, path = Preset("cpu", (SMALL, TRAINED)), tmp_path / "linear.json"
    first = driver.run(bench(), preset, path, only=["dense"])
    assert [row["subject"] for row in first["rows"]] == ["dense", "dense"]
    whole = driver.run(bench(), preset, path)
    assert [row["subject"] for row in whole["rows"]] == ["dense", "inductor", "operator"] * 2
    assert driver.run(bench(), preset, path, minutes=0)["rows"] == whole["rows"]
    again = driver.run(bench(), preset, path, fresh=True, only=["operator"], minutes=0)
    assert [row["subject"] for row in again["rows"]] == ["dense", "inductor"] * 2
    table = markdown(whole)
    assert "toy 24 -> 36, blast 32% x 5 backward" in table


def test_the_preset_begins_with_what_has_targets() -> None:
    problems = PRESETS["h100"].problems
    assert problems[: len(TARGETS)] == tuple(TARGETS)
    assert len(set(problems)) == len(problems)
    assert LLAMA.share == 0.5
    assert rank_of(4096, 4096, 16, 0.25) == 32
    assert {p.model for p in problems} == {"Llama-7B", "GPT-2", "ViT-B", "DiT-XL"}
    assert {p.tokens for p in problems} >= {1, 16, 256, 8192, 16384}
    for problem in problems:
        assert problem.ir().parameters > 0


def test_forms_are_timed_where_they_have_kernels() -> None:
    def named(problem: Problem) -> list[str]:
        return [subject.name for subject in subjects(problem, "cuda")]

    always = ["dense", "inductor", "operator"]
    assert named(LLAMA) == [*always, "as split", "as fused", "as staged"]
    assert named(replace(LLAMA, tokens=8192)) == [*always, "as fused", "as staged", "as dense"]
    assert named(replace(LLAMA, kind=BLAST, rank=64)) == [*always, "as staged"]
    assert [subject.name for subject in subjects(LLAMA, "cpu")] == always


@pytest.mark.parametrize(
    ("ours", "error", "verdict"), [(2.0, 1e-4, "met"), (4.0, 1e-4, "missed"), (2.0, 1.0, "wrong"), (2.0, None, "wrong")]
)
def test_verdicts(ours: float, error: float | None, verdict: str) -> None:
    times = {"dense": 4.0, "inductor": 5.0, "operator": ours}
    errors = {"dense": 1e-4, "inductor": 1e-4, "operator": error}
    rows = [
        {
            "problem": asdict(LLAMA),
            "subject": name,
            "form": "split",
            "times": {"graph": {"p50": ms, "p20": ms, "p80": ms}},
            "error": errors[name],
        }
        for name, ms in times.items()
    ]
    (found,) = verdicts(rows, "graph")
    assert (found["against"], found["speedup"], found["verdict"]) == ("dense", 4.0 / ours, verdict)
