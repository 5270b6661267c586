"""The speed benchmark: presets, rows that fail, verdicts, resuming; its clocks are injected, so nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.clocks import cpu_clocks
from benchmarks.speed import __main__ as driver
from benchmarks.speed import measure
from benchmarks.speed.measure import Bench, Row, Verdict
from benchmarks.speed.present import draw, markdown
from benchmarks.speed.problems import PRESETS, AutoForm, Preset, Problem, inputs
from benchmarks.speed.subjects import EXACT, Unsupported, key_padding_blocks, monarch, peers
from monarch_compile.attention.benchmark import compiled_attention
from monarch_compile.attention.reference import reference
from monarch_compile.cost.devices import DEVICES
from monarch_compile.tools import cli
from monarch_compile.tools.timing import Timing

SMALL = Problem(2, 24, num_heads=1, head_dim=16, dtype="float32")
TINY = Preset("cpu", (SMALL, replace(SMALL, seq_len=32)), (AutoForm(1, None), AutoForm(1, 1)))


@pytest.fixture(autouse=True)
def _not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor has nothing to add to what is tested here."""
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("benchmarks.speed.subjects.compiled_attention", lambda options, causal=False: attend)


def ticking() -> Iterator[Timing]:
    ms = 1.0
    while True:
        yield Timing(ms, ms, ms, 1)
        ms += 1.0


def bench(*functions, clocks=("eager",)) -> Bench:
    times = ticking()
    named = peers([(function.__name__, function) for function in functions])
    return Bench("cpu", DEVICES["cpu"], {name: lambda call: next(times) for name in clocks}, named)


def test_the_h200_preset_is_the_table() -> None:
    preset = PRESETS["h200"]
    heads = {(12, 64): [], (16, 128): []}
    for p in preset.problems:
        assert (p.dtype, p.masked) == ("float16", False)
        heads[p.num_heads, p.head_dim].append((p.batch, p.seq_len))
    shapes, wide = heads.values()
    assert wide == [(1, 4096), (1, 16384)]
    expected = "1024x256, 64x1024, 1x1024, 16x4096, 1x4096, 4x16384, 1x16384, 1x32768, 1x65536"
    assert ", ".join(f"{batch}x{seq_len}" for batch, seq_len in shapes) == expected
    assert preset.forms == (AutoForm(1, None), AutoForm(1, 1), AutoForm(2, None))


def test_the_full_preset_covers_every_dimension_once() -> None:
    preset = PRESETS["full"]
    assert len(set(preset.problems)) == len(preset.problems)
    assert sorted({p.seq_len for p in preset.problems if p.batch == 1}) == [256 << i for i in range(10)]
    assert {(p.num_heads, p.head_dim) for p in preset.problems} == {(12, 64), (16, 128)}
    assert {(p.dtype, p.masked) for p in preset.problems} == {
        (dtype, masked) for dtype in ("float16", "bfloat16") for masked in (False, True)
    }
    assert {(form.num_iters, form.window) for form in preset.forms} == {(t, w) for t in (1, 2, 3) for w in (None, 1)}
    assert max(p.batch for p in preset.problems) == 1024


def test_inputs_and_masks_fit_the_problem() -> None:
    x = inputs(replace(SMALL, masked=True), "cpu")
    assert x.q.shape == x.k.shape == x.v.shape == (2, 1, 24, 16)
    assert x.mask is not None
    assert x.mask.sum(1).tolist() == [20, 16]
    assert inputs(SMALL, "cpu").mask is None
    assert torch.equal(inputs(SMALL, "cpu").q, x.q)


@pytest.mark.parametrize("lengths", [[300, 256, 40], [384, 1, 129]])
def test_flex_skips_the_blocks_that_hold_no_visible_key(lengths: list[int]) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    seq_len, visible = 384, torch.tensor(lengths)
    found = key_padding_blocks(visible, seq_len)
    expected = create_block_mask(lambda b, h, q, k: k < visible[b], 3, None, seq_len, seq_len, device="cpu")
    assert torch.equal(found.to_dense(), expected.to_dense())
    assert torch.equal(found.full_kv_num_blocks, expected.full_kv_num_blocks)


def lost(q, k, v):
    raise torch.OutOfMemoryError("tried to allocate everything")


def unwilling(q, k, v):
    raise Unsupported("head_dim 16\nand more")


def fine(q, k, v):
    return v


def test_what_fails_is_a_row_that_says_so() -> None:
    rows = list(measure.rows(bench(lost, unwilling, fine), SMALL, (AutoForm(),)))
    assert [row.subject for row in rows] == ["sdpa", "lost", "unwilling", "fine", "monarch"]
    failures = {row.subject: row.failures for row in rows if row.failures}
    assert failures == {
        "lost": {"call": "OutOfMemoryError: tried to allocate everything"},
        "unwilling": {"call": "Unsupported: head_dim 16"},
    }
    assert [row.ms is None for row in rows] == [False, True, True, False, False]


def test_a_peer_is_not_asked_about_masks() -> None:
    rows = {row.subject: row for row in measure.rows(bench(fine), replace(SMALL, masked=True), ())}
    assert rows["fine"].failures == {"call": "Unsupported: takes no mask"}


def test_a_clock_that_fails_leaves_the_other() -> None:
    def broken(call: object) -> Timing:
        raise RuntimeError("capture failed")

    clocks = {"graph": broken, "eager": lambda call: Timing(1.0, 2.0, 3.0, 9)}
    (row, *_) = measure.rows(replace(bench(), clocks=clocks), SMALL, ())
    assert row.ms == 2.0
    assert row.failures == {"graph": "RuntimeError: capture failed"}


def test_inputs_that_do_not_fit_fail_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(problem: Problem, place: str) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(measure, "inputs", no_room)
    rows = list(measure.rows(bench(fine), SMALL, (AutoForm(),)))
    assert {row.failures["call"] for row in rows} == {"OutOfMemoryError: no room"}


def test_fractions_are_of_the_devices_ceilings() -> None:
    problem = Problem(1, 4096)
    row = Row(problem, "cudnn", True, None, None, 79 * 10**9, 427 * 10**6, 1.0, {"graph": Timing(1, 1, 1, 1)}, {})
    assert row.fractions(DEVICES["h200"]) == pytest.approx({"flops": 0.1, "bytes": 0.1})
    assert row.fractions(DEVICES["cuda"]) == {}
    assert replace(row, problem=replace(problem, dtype="float32")).fractions(DEVICES["h200"]) == {}


@pytest.mark.parametrize(
    ("choice", "exact_ms", "monarch_ms", "right"),
    [
        ("monarch", 1.0, 0.5, True),
        ("monarch", 1.0, 1.09, True),
        ("monarch", 1.0, 1.2, False),
        ("exact", 1.0, 0.95, True),
        ("exact", 1.0, 0.5, False),
        ("exact", 1.0, None, None),
        ("monarch", None, 0.5, None),
    ],
)
def test_a_choice_is_right_where_it_is_measured_faster_or_close(choice, exact_ms, monarch_ms, right) -> None:
    assert Verdict(SMALL, AutoForm(), 4, choice, 1.0, 1.0, exact_ms, monarch_ms).is_right is right


def test_a_verdict_is_against_the_fastest_exact_form_not_a_peer() -> None:
    made = bench(fine)
    rows = list(measure.rows(made, SMALL, (AutoForm(),)))
    (verdict,) = measure.verdicts(made, rows)
    assert (verdict.exact_ms, verdict.monarch_ms) == (rows[0].ms, rows[-1].ms)
    slower = replace(rows[0], subject="other", times={"eager": Timing(9, 9, 9, 1)})
    assert measure.verdicts(made, [slower, *rows])[0].exact_ms == rows[0].ms


def test_results_are_resumed_extended_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    first = driver.run(bench(), TINY, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(first))
    assert len(first["rows"]) == 2 * 3
    assert len(first["verdicts"]) == 4
    driver.run(bench(), TINY, path)
    assert capsys.readouterr().out.count("measured already") == 2
    content = driver.run(bench(lost), TINY, path)
    assert len(content["rows"]) == 2 * 4
    assert len(content["verdicts"]) == 4
    text = markdown(content)
    assert "tried to allocate everything" in text
    assert "| 2 x 24, 1 x 16, float32 |" in text
    driver.run(bench(lost), TINY, path, fresh=True)
    assert "measured already" not in capsys.readouterr().out


def test_a_run_that_is_out_of_time_goes_on_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    assert driver.run(bench(), TINY, path, minutes=-1)["rows"] == []
    assert "the same command goes on from here" in capsys.readouterr().out
    assert markdown(driver.run(bench(), replace(TINY, problems=TINY.problems[:1]), path)).count("2 x 24") == 3
    assert len(driver.run(bench(), TINY, path)["rows"]) == 2 * 3
    assert capsys.readouterr().out.count("measured already") == 1


def test_a_fault_on_the_device_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", faulty)
    monkeypatch.setattr(torch.cuda, "synchronize", faulty)
    times, failures, _ = measure._timed(replace(bench(), place="cuda"), lambda: lambda: torch.zeros(1))
    assert times == {}
    assert failures == {"call": "RuntimeError: CUDA error: an illegal memory access was encountered"}


def test_a_step_takes_the_gradients_of_all_inputs(tmp_path: Path) -> None:
    asked: list[bool] = []

    def attend(q, k, v):
        asked.append(all(x.requires_grad and torch.is_grad_enabled() for x in (q, k, v)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def detached(q, k, v):
        return v.detach()

    trains = replace(bench(attend, detached), backward=True)
    content = driver.run(trains, TINY, tmp_path / "speed.json")
    assert content["pass"] == "step"
    assert asked
    assert all(asked)
    found = {row["subject"]: row for row in content["rows"]}
    assert "does not require grad" in found["detached"]["failures"]["call"]
    assert all(row["failures"] == {} for name, row in found.items() if name != "detached")
    assert all(row["peak_mib"] is None for row in content["rows"])  # a CPU
    assert "Median ms of a step" in markdown(content)
    verdict = next(v for v in content["verdicts"] if v["problem"]["seq_len"] == 24)
    forward = driver.run(bench(), TINY, tmp_path / "forward.json")["verdicts"][0]
    assert verdict["predicted_exact_ms"] > forward["predicted_exact_ms"]
    exact = next(row for row in content["rows"] if row["subject"] == "sdpa")
    assert exact["flops"] == 7 * 4 * 24**2 * 16  # two products forward, five backward


def test_a_file_holds_times_of_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    driver.run(bench(), TINY, path)
    with pytest.raises(SystemExit, match="holds times of another pass"):
        driver.run(replace(bench(), backward=True), TINY, path)


def test_results_of_other_versions_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    content = driver.run(bench(), TINY, path)
    content["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(content))
    driver.run(bench(), TINY, path)
    assert "made anew" in capsys.readouterr().out
    path.write_text("{}")
    with pytest.raises(SystemExit, match="holds no results of this benchmark"):
        driver.run(bench(), TINY, path)


def test_a_picture_has_a_line_for_each_form(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one = replace(TINY, problems=tuple(replace(p, batch=1) for p in TINY.problems))
    draw(driver.run(bench(lost), one, tmp_path / "speed.json"), tmp_path / "speed.svg")
    assert "<svg" in (tmp_path / "speed.svg").read_text()


def test_the_command_line_finds_peers_beside_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_peer.py").write_text("def attend(q, k, v):\n    return v\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(driver, "cpu_clocks", lambda seconds: cpu_clocks(0.001))
    arguments = ["--preset", "cpu", "--shapes", "1x16", "--peer", "my_peer:attend", "--output", "found.json"]
    assert cli.main(["bench", "speed", *arguments]) == 0
    assert "my_peer:attend" in {row["subject"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]}
    assert "| my_peer:attend |" in (tmp_path / "found.md").read_text()
    with pytest.raises(SystemExit, match="cannot load 'nothing:here'"):
        cli.main(["bench", "speed", "--preset", "cpu", "--peer", "nothing:here"])
    with pytest.raises(SystemExit, match="--shapes takes BATCHxN"):
        cli.main(["bench", "speed", "--preset", "cpu", "--shapes", "16"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_preset_for_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "speed", "--preset", "h200"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_names_of_subjects_are_distinct() -> None:
    for subjects in EXACT.values():
        assert len({subject.name for subject in subjects}) == len(subjects)
        assert all(subject.exact for subject in subjects)


def test_the_cuda_backends_are_asked_for_one_at_a_time() -> None:
    """On the CPU only the memory-efficient kernel is missing: SDPA has to refuse it, not to take another."""
    efficient = next(subject for subject in EXACT["cuda"] if subject.name == "efficient")
    x = inputs(SMALL, "cpu")
    with efficient.around(), pytest.raises(RuntimeError, match="kernel"):
        efficient.prepare(x)()


def test_tiles_are_timed_as_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.subjects.compiled_attention", compiled_attention)
    problem = Problem(1, 65, num_heads=1, head_dim=8, dtype="float32")
    given = inputs(problem, "cpu")
    ir = AutoForm(1, 1, tile=(4, 4), window_shape="plus").ir(problem, DEVICES["cpu"])
    expected = reference(given.q, given.k, given.v, **asdict(ir.form), grid=ir.grid, scale=ir.scale)
    torch.testing.assert_close(monarch(ir, given)(), expected)


def test_prefill_is_timed_as_causal_attention_of_shared_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.speed.subjects.compiled_attention", compiled_attention)
    problem = Problem(1, 48, 4, 8, "float32", num_kv_heads=2, causal=True)
    form = AutoForm(1, 1, prefix=4, chosen=100, block_size=4)
    device = DEVICES["cpu"]
    ir = form.ir(problem, device)
    assert (ir.is_causal, ir.group, ir.form.chosen, ir.form.block_size) == (True, 2, 100, 4)
    assert "on 2, float32, causal" in str(problem)
    x = inputs(problem, "cpu")
    assert (x.q.shape, x.k.shape, x.v.shape) == ((1, 4, 48, 8), (1, 2, 48, 8), (1, 2, 48, 8))
    exact = torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)
    with torch.no_grad():
        for call in (monarch(ir, x), *(subject.prepare(x) for subject in EXACT["cpu"])):
            torch.testing.assert_close(call(), exact, rtol=1e-5, atol=1e-5)
    assert {p.causal for p in PRESETS["causal"].problems} == {True}
    assert {p.seq_len for p in PRESETS["causal"].problems} == {8192, 16384, 32768, 65536, 131072}
