"""What the benchmark of long convolutions makes of its rows: verdicts, tables, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.convolution.draw import AIM, draw, panels, speedups, times
from benchmarks.convolution.measure import Row
from benchmarks.convolution.present import markdown
from benchmarks.convolution.problems import H100_SHAPES, Problem
from benchmarks.convolution.verdicts import against_next_power, verdicts
from monarch_compile.cost.devices import DEVICES
from monarch_compile.tools.timing import Timing


def recorded(subject: str, ms: float | None, error: float = 1e-3, problem: Problem | None = None) -> dict:
    """A row of JSON content."""
    timed = {} if ms is None else {"graph": Timing(ms, ms, ms, 1)}
    ours = True if subject in ("monarch", "operator") else None
    row = Row(problem or Problem(*H100_SHAPES[0]), subject, ours, timed, {}, {"y": error})
    return json.loads(json.dumps(row.to_dict(DEVICES["h100"])))


@pytest.mark.parametrize(
    ("ms", "error", "verdict"),
    [
        (1.0, 1e-3, "met"),
        (1.01, 1e-3, "missed"),
        (0.5, 1.9e-3, "met"),
        (0.5, 2.1e-3, "wrong"),
        (0.5, float("nan"), "wrong"),
    ],
)
def test_a_target_is_met_by_a_result_that_is_fast_and_right(ms: float, error: float, verdict: str) -> None:
    (entry,) = verdicts([recorded("inductor", 15.0), recorded("operator", ms, error)], ["graph"])
    assert entry["verdict"] == verdict
    assert entry["speedups"] == {"graph": pytest.approx(15.0 / ms)}
    assert entry["target"] == 15.0


def test_without_a_baseline_or_a_target_there_is_no_verdict() -> None:
    ours = recorded("operator", 1.0)
    assert verdicts([ours], ["graph"]) == []
    assert verdicts([recorded("inductor", None), ours], ["graph"]) == []
    assert verdicts([recorded("inductor", 1.0), recorded("operator", None)], ["graph"]) == []
    other = Problem(1, 2, 64)
    assert verdicts([recorded("inductor", 1.0, problem=other), ours], ["graph"]) == []
    (eager,) = verdicts([recorded("inductor", 1.0), recorded("eager", 0.01)], ["graph"])
    assert (eager["target"], eager["verdict"]) == (None, None)
    (aimless,) = verdicts([recorded(name, 1.0, problem=other) for name in ("inductor", "monarch")], ["graph"])
    assert (aimless["target"], aimless["verdict"]) == (None, None)
    unjudged = recorded("operator", 0.1) | {"errors": {}}
    assert verdicts([recorded("inductor", 15.0), unjudged], ["graph"])[0]["verdict"] is None


@pytest.mark.parametrize(("ms", "ratio", "verdict"), [(0.65, 1.3, "met"), (0.66, 1.32, "missed")])
def test_odd_lengths_stand_beside_the_next_power(ms: float, ratio: float, verdict: str) -> None:
    power = recorded("operator", 1.0, problem=Problem(64, 768, 1024))
    odd = recorded("operator", ms, problem=Problem(32, 768, 1000))
    others = [
        recorded("eager", 1.0, problem=Problem(32, 768, 1000)),
        recorded("operator", 9.0, problem=Problem(64, 768, 1024, gated=True)),
        recorded("operator", 9.0, problem=Problem(64, 768, 2048)),
    ]
    (found,) = against_next_power([*others, odd, power], "graph")
    assert (found["ratio"], found["verdict"]) == (pytest.approx(ratio), verdict)
    assert found["power"] == 1024
    assert against_next_power([*others, odd], "graph") == []


def test_targets_are_shown(tmp_path: Path) -> None:
    rows = [recorded("inductor", 15.0), recorded("monarch", 0.5), recorded("operator", 3.0)]
    content = {"environment": {"gpu": "none"}, "clocks": ["graph", "eager"], "rows": rows}
    text = markdown(content | {"verdicts": verdicts(rows, ["graph", "eager"])})
    name = "64 x 768 x 256 bfloat16"
    assert f"| {name} | monarch (kernels) | 15 | 0.5 | 30.00 | 15 | met | 1.00e-03 | 1.00e-03 |" in text
    assert f"| {name} | operator (kernels) | 15 | 3 | 5.00 | 15 | **missed** | 1.00e-03 | 1.00e-03 |" in text


def drawn() -> dict:
    rows = [recorded(name, ms) for name, ms in (("inductor", 15.0), ("operator", 0.5), ("eager", None))]
    other = Problem(64, 768, 512, gated=True)
    rows += [recorded("inductor", 2.0, problem=other), recorded("operator", 1.0, problem=other)]
    return {"environment": {"gpu": "none"}, "clocks": ["graph"], "rows": rows}


def test_lines_of_a_picture_are_subjects_and_targets() -> None:
    found, axis = panels(drawn())
    assert (list(found), axis) == (["bfloat16", "bfloat16 gated"], "seq_len")
    assert times(found["bfloat16"], axis, "graph") == {"inductor": [(256, 15.0)], "operator": [(256, 0.5)]}
    assert speedups(found["bfloat16"], axis, "graph") == {"operator": [(256, 30.0)], AIM: [(256, 15.0)]}
    assert speedups(found["bfloat16 gated"], axis, "graph") == {"operator": [(512, 2.0)]}
    many = [recorded("operator", 1.0, problem=Problem(batch, 4, 64)) for batch in (1, 2, 3)]
    found, axis = panels(drawn() | {"rows": many})
    assert (list(found), axis) == (["bfloat16, length 64"], "batch")
    assert times(found["bfloat16, length 64"], axis, "graph") == {"operator": [(1, 1.0), (2, 1.0), (3, 1.0)]}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(drawn(), tmp_path / "convolution.svg")
    assert "<svg" in (tmp_path / "convolution.svg").read_text()
