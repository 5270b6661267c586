"""The benchmark of long convolutions: presets, rows that fail, resuming; nothing is timed or compiled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.clocks import cpu_clocks, reason
from benchmarks.convolution import __main__ as driver
from benchmarks.convolution import measure
from benchmarks.convolution.measure import Bench, Prepared, Row, measured
from benchmarks.convolution.present import markdown
from benchmarks.convolution.problems import ELEMENTS, H100_SHAPES, PRESETS, Preset, Problem, inputs, target
from benchmarks.convolution.subjects import SUBJECTS, compiled, peers, plain
from monarch_compile.convolution.reference import reference
from monarch_compile.cost.devices import DEVICES
from monarch_compile.errors import LoweringError
from monarch_compile.report.explainer import explain
from monarch_compile.tools import cli
from monarch_compile.tools.timing import Timing

SMALL = Problem(2, 3, 24, "float32")
FULL = Problem(3, 2, 20, "float32", gated=True, skip=True, backward=True)
TINY = Preset("cpu", (SMALL, FULL))
NAMES = ["inductor", "eager", "monarch", "operator"]


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor has nothing to add to what is tested here; the backend lowers what it is given."""

    def as_it_is(function, **options):
        if "backend" in options:
            monkeypatch.setitem(counters["monarch"], "lowered", 1)
        return function

    monkeypatch.setattr("benchmarks.convolution.subjects.compiled", as_it_is)


def ticking() -> Iterator[Timing]:
    ms = 1.0
    while True:
        yield Timing(ms, ms, ms, 1)
        ms += 1.0


def bench(*functions, clocks=("eager",)) -> Bench:
    found = ticking()
    named = peers([(function.__name__, function) for function in functions])
    return Bench("cpu", DEVICES["cpu"], {name: lambda call: next(found) for name in clocks}, named)


def rows_of(made: Bench, problem: Problem) -> dict[str, Row]:
    given = Prepared(problem, made.place)
    return {subject.name: measured(made, given, subject.name) for subject in made.subjects()}


def lost(u, filter):
    raise torch.OutOfMemoryError("tried to allocate everything")


def wrong(u, filter):
    return u * filter


def short(u, filter):
    return u[..., 1:]


def right(u, filter):
    length = u.shape[-1]
    return torch.stack([(u[..., : t + 1] * filter[:, : t + 1].flip(-1)).sum(-1) for t in range(length)], -1)


def test_the_h100_preset_is_the_table_of_targets() -> None:
    problems = PRESETS["h100"].problems
    forward = [p for p in problems if not p.backward]
    for gated in (False, True):
        assert [(p.batch, p.channels, p.seq_len) for p in forward if p.gated is gated] == list(H100_SHAPES)
    aims = [target(p) for p in forward if p.gated]
    assert aims == [target(p) for p in forward if not p.gated] == [15, 12, 12, 10, 8, 6, 4, 3.5, 3]
    backward = [p for p in problems if p.backward]
    assert {(p.seq_len, target(p)) for p in backward} == {(n, 4.0) for n in (1024, 2048, 4096, 8192)}
    assert {(p.dtype, p.skip) for p in problems} == {("bfloat16", False)}
    assert len(set(problems)) == len(problems) == 28


@pytest.mark.parametrize(
    "change", [{"batch": 63}, {"channels": 512}, {"seq_len": 512}, {"dtype": "float16"}, {"backward": True}]
)
def test_targets_are_of_the_table_alone(change) -> None:
    problem = Problem(64, 768, 256)
    assert target(problem) == 15.0
    assert target(replace(problem, **change)) is None


def test_lengths_have_about_as_many_elements() -> None:
    problems = PRESETS["lengths"].problems
    assert [p.seq_len for p in problems][:6] == [128, 256, 512, 1000, 1024, 2048]
    assert {1000, 3000, 6000, 1 << 20} <= {p.seq_len for p in problems}
    for p in problems:
        assert 0.99 <= p.batch * p.channels * p.seq_len / ELEMENTS <= 1.01


def test_presets_of_the_cpu_are_small() -> None:
    for preset in PRESETS.values():
        assert len(set(preset.problems)) == len(preset.problems)
        if preset.device == "cpu":
            assert max(p.batch * p.channels * p.seq_len for p in preset.problems) <= 1 << 16


def test_inputs_fit_the_problem() -> None:
    x = inputs(SMALL, "cpu")
    assert (x.u.shape, x.filter.shape) == ((2, 3, 24), (3, 24))
    assert x.tensors[2:] == (None, None, None)
    assert x.grad is None
    assert not x.u.requires_grad
    full = inputs(replace(FULL, dtype="bfloat16"), "cpu")
    assert full.filter.dtype is full.skip.dtype is torch.float32
    assert {full.u.dtype, full.pre_gate.dtype, full.post_gate.dtype, full.grad.dtype} == {torch.bfloat16}
    assert all(t.requires_grad and t.is_leaf for t in full.tensors)
    assert torch.equal(inputs(SMALL, "cpu").u, x.u)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_plain_spelling_is_what_the_ir_means(gated: bool, skip: bool) -> None:
    problem = replace(SMALL, gated=gated, skip=skip)
    x, ir = inputs(problem, "cpu"), problem.ir()
    assert (ir.pre_gate, ir.post_gate, ir.skip, ir.wraps) == (gated, gated, skip, False)
    options = {"transform_len": ir.transform_len, "out_len": ir.out_len, "lag": ir.lag, "scale": ir.scale}
    torch.testing.assert_close(plain(*x.tensors), reference(*x.tensors, **options))
    half = inputs(replace(problem, dtype="bfloat16"), "cpu")
    assert plain(*half.tensors).dtype is torch.bfloat16


@pytest.mark.parametrize(("gated", "skip"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_backend_lowers_the_plain_spelling_to_that_ir(gated: bool, skip: bool, dtype: str) -> None:
    """Casts and gates included: what rows say of kernels, predictions and FLOP is read off the problem's IR."""
    problem = replace(SMALL, gated=gated, skip=skip, dtype=dtype)
    report = explain(plain, *inputs(problem, "cpu").tensors, options={"policy": "always", "strict": True})
    assert [(site.status, site.ir) for site in report.sites] == [("lowered", problem.ir())]


def test_bytes_are_those_of_what_must_be_moved() -> None:
    problem = Problem(2, 3, 24)
    assert problem.floor_bytes == 2 * (2 * 3 * 24) * 2
    assert replace(problem, gated=True).floor_bytes == 2 * problem.floor_bytes
    assert replace(problem, backward=True).floor_bytes == 5 * (2 * 3 * 24) * 2  # u twice, y, and gradients of both


def test_every_subject_is_right_forward_and_backward() -> None:
    for problem, names in (
        (SMALL, {"y"}),
        (FULL, {"y", "u", "filter", "skip", "pre_gate", "post_gate"}),
        (replace(SMALL, backward=True), {"y", "u", "filter"}),
    ):
        for row in rows_of(bench(), problem).values():
            assert row.failures == {}, row.subject
            assert row.errors.keys() == names
            assert max(row.errors.values()) < 1e-6, row.subject


def test_a_wrong_peer_has_its_error() -> None:
    rows = rows_of(bench(right, wrong, short), SMALL)
    assert rows["right"].errors["y"] < 1e-6
    assert rows["wrong"].errors["y"] > 0.1
    assert rows["short"].errors == {}
    assert rows["short"].failures["error"].startswith("InputError: outputs must hold")


def test_what_fails_is_a_row_that_says_so() -> None:
    rows = rows_of(bench(lost, right), FULL)
    assert list(rows) == [*NAMES, "lost", "right"]
    refused = {"call": "Unsupported: takes neither gates nor a skip term"}
    assert [row.failures for row in rows.values()] == [{}] * 4 + [refused] * 2
    failed = rows_of(bench(lost), SMALL)["lost"]
    assert failed.failures == {"call": "OutOfMemoryError: tried to allocate everything"}
    assert (failed.times, failed.errors, failed.first_call_s) == ({}, {}, None)


def test_a_backend_that_lowers_nothing_is_a_row_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(function, **options):
        monkeypatch.setitem(counters["monarch"], "lowered", 0)
        return function

    monkeypatch.setattr("benchmarks.convolution.subjects.compiled", forgetful)
    rows = rows_of(bench(), SMALL)
    assert rows["monarch"].failures == {"call": "Unsupported: the backend found no convolution to lower"}
    assert rows["monarch"].times == {}
    assert rows["operator"].times


def test_the_backend_is_asked_for_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def strict(function, **options):
        asked.append(options)
        if "backend" in options:
            raise LoweringError("strict=True and 1 site cannot be lowered:\n  conv: [why] no kernels\nmore")
        return function

    monkeypatch.setattr("benchmarks.convolution.subjects.compiled", strict)
    rows = rows_of(bench(), SMALL)
    assert [o.get("options") for o in asked] == [None, {"policy": "always", "strict": True}, None]
    words = "LoweringError: strict=True and 1 site cannot be lowered: conv: [why] no kernels"
    assert rows["monarch"].failures == {"call": words}


def test_compiled_functions_are_those_given(monkeypatch: pytest.MonkeyPatch) -> None:
    x = inputs(SMALL, "cpu")
    seen = []

    def backend(graph, given):
        seen.append(graph)
        return graph

    for _ in range(2):  # Dynamo has forgotten the first
        torch.testing.assert_close(compiled(plain, backend=backend)(*x.tensors), plain(*x.tensors))
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError("one:\n  two:\nthree\nfour"), "ValueError: one: two: three"),
        (ValueError("one:"), "ValueError: one:"),
        (ValueError(""), "ValueError: "),
    ],
)
def test_a_reason_is_the_first_line_and_what_it_announces(error: ValueError, words: str) -> None:
    assert reason(error) == words


def test_a_clock_that_fails_leaves_the_other() -> None:
    def broken(call: object) -> Timing:
        raise RuntimeError("capture failed")

    made = replace(bench(), clocks={"graph": broken, "eager": lambda call: Timing(1.0, 2.0, 3.0, 9)})
    row = measured(made, Prepared(SMALL, "cpu"), "inductor")
    assert {clock: timing.p50 for clock, timing in row.times.items()} == {"eager": 2.0}
    assert row.failures == {"graph": "RuntimeError: capture failed"}


def test_inputs_that_do_not_fit_fail_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(problem: Problem, place: str) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(measure, "inputs", no_room)
    assert {row.failures["call"] for row in rows_of(bench(right), SMALL).values()} == {"OutOfMemoryError: no room"}


def test_fractions_are_of_the_devices_ceilings() -> None:
    problem, h100 = Problem(16, 768, 1024), DEVICES["h100"]
    row = Row(problem, "operator", True, {"graph": Timing(1, 1, 1, 1)}, {}, {})
    moved = 2 * 16 * 768 * 1024 * 2 / 1e-3 / 3.01e12
    flops = 16 * 768 * 1024 * 8 * (32 + 2 * 32) / 1e-3 / 762e12
    assert row.fractions(h100) == pytest.approx({"bytes": moved, "flops": flops})
    assert row.fractions(DEVICES["cuda"]) == {}
    assert replace(row, times={}).fractions(h100) == {}
    assert replace(row, problem=replace(problem, dtype="float32")).fractions(h100) == {}
    assert replace(row, kernels=False).fractions(h100) == pytest.approx({"bytes": moved})
    assert replace(row, problem=replace(problem, backward=True)).fractions(h100).keys() == {"bytes"}


def test_predictions_are_of_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = replace(bench(right), device=DEVICES["h100"])
    rows = rows_of(made, SMALL)
    assert rows["operator"].kernels is rows["monarch"].kernels is False  # on the CPU
    assert rows["operator"].predicted_ms == rows["inductor"].predicted_ms > 0
    assert rows["eager"].predicted_ms is rows["right"].predicted_ms is rows["right"].kernels is None
    monkeypatch.setattr(measure, "runs_kernels", lambda *arguments: True)
    assert rows_of(made, SMALL)["operator"].predicted_ms not in (0, rows["inductor"].predicted_ms)
    assert rows_of(made, FULL)["operator"].predicted_ms is None


def test_results_are_resumed_extended_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "convolution.json"
    first = driver.run(bench(), TINY, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(first))
    assert [row["subject"] for row in first["rows"]] == NAMES * 2
    assert len(first["verdicts"]) == 2 * 3
    driver.run(bench(), TINY, path)
    assert capsys.readouterr().out.count("4 of 4 rows held") == 2
    content = driver.run(bench(lost), TINY, path)
    assert [row["subject"] for row in content["rows"]] == [*NAMES, "lost"] * 2
    text = markdown(content)
    assert "| 2 x 3 x 24 float32 | lost | call | OutOfMemoryError: tried to allocate everything |" in text
    assert "| 3 x 2 x 20 float32 gated skip backward | operator (FFT) |" in text
    assert "### Targets" not in text


def test_rows_are_asked_for_by_name_and_forgotten_by_name(tmp_path: Path) -> None:
    path = tmp_path / "convolution.json"
    some = driver.run(bench(), TINY, path, only=["24 float32: eager", "gated skip backward: monarch"])
    assert [(row["problem"], row["subject"]) for row in some["rows"]] == [
        (asdict(SMALL), "eager"),
        (asdict(FULL), "monarch"),
    ]
    every = driver.run(bench(), TINY, path)["rows"]
    assert len(every) == 8
    again = driver.run(bench(), TINY, path, only=["operator"], fresh=True)["rows"]
    assert [row["subject"] for row in again] == NAMES * 2
    assert [row for row in again if row["subject"] != "operator"] == [r for r in every if r["subject"] != "operator"]
    assert [row["times"] for row in again] != [row["times"] for row in every]


def test_a_run_that_is_out_of_time_goes_on_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "convolution.json"
    assert driver.run(bench(), TINY, path, minutes=-1)["rows"] == []
    assert "the same command goes on from here" in capsys.readouterr().out
    assert len(driver.run(bench(), TINY, path)["rows"]) == 8


def test_the_command_line_finds_peers_beside_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_convolution.py").write_text("def convolve(u, filter):\n    return u\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "cpu_clocks", lambda seconds: cpu_clocks(0.001))
    arguments = [
        "--preset",
        "tiny",
        "--peer",
        "my_convolution:convolve",
        "--rows",
        "24 float32: ",
        "--output",
        "x.json",
    ]
    assert cli.main(["bench", "convolution", *arguments]) == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["subject"] for row in rows] == [*NAMES, "my_convolution:convolve"]
    assert rows[-1]["errors"]["y"] > 0.1
    assert "| my_convolution:convolve |" in (tmp_path / "x.md").read_text()
    with pytest.raises(SystemExit, match="cannot load 'nothing:here'"):
        cli.main(["bench", "convolution", "--preset", "tiny", "--peer", "nothing:here"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_preset_for_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "convolution", "--preset", "h100"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_names_of_subjects_are_distinct() -> None:
    assert [subject.name for subject in SUBJECTS] == NAMES
