"""The cache of tuned schedules: readable, shared by processes, never trusted blindly."""

from __future__ import annotations

import json
import logging
import multiprocessing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention.schedule import Schedule, choose_schedule
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.codegen.tuning import store
from monarch_compile.codegen.tuning.store import Tuned, is_legal, key_of, read, write

TILING = Tiling(64, 32, 4, 2)
RESULT = Tuned(Schedule(TILING, TILING, TILING, near=TILING, fused=False), 0.5, 1.0, 1e-4, 7)
IR = MonarchAttention(1, 12, 12, 4096, 4096, 64, 64, torch.float16, Form(64), 0.125)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    store._warn.cache_clear()
    return tmp_path / "deep" / "tuned.json"


def test_results_come_back_as_they_were_written(path: Path) -> None:
    plain = replace(RESULT, schedule=Schedule(TILING, TILING, TILING, whole=True))
    write({"a": RESULT}, path)
    write({"b": plain}, path)
    assert read(path) == {"a": RESULT, "b": plain}
    assert RESULT.speedup == 2.0
    content = json.loads(path.read_text())
    assert content["entries"]["a"]["schedule"]["near"] == asdict(TILING)


def test_a_later_result_replaces_an_earlier_one(path: Path) -> None:
    write({"a": RESULT, "b": RESULT}, path)
    write({"a": replace(RESULT, ms=0.1)}, path)
    assert {name: result.ms for name, result in read(path).items()} == {"a": 0.1, "b": 0.5}


def _add_many(path: Path, name: str) -> None:
    for place in range(30):
        write({f"{name}-{place}": RESULT}, path)


def test_two_processes_that_tune_at_once_lose_nothing(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_many, args=(path, name)) for name in ("left", "right")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert set(read(path)) == {f"{name}-{place}" for name in ("left", "right") for place in range(30)}
    assert not list(path.parent.glob("*.tmp"))


def test_no_file_is_an_empty_cache(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(path) == {}
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 99, "entries": {}}', '{"format": 1}', '{"format": 1, "entries": []}', "\xff"],
)
def test_a_corrupt_or_foreign_file_is_ignored_with_one_warning(
    text: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_text(text, encoding="latin-1")
    with caplog.at_level(logging.WARNING):
        assert read(path) == read(path) == {}
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    write({"a": RESULT}, path)
    assert read(path) == {"a": RESULT}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        3,
        {},
        {**RESULT.to_dict(), "schedule": {}},
        {**RESULT.to_dict(), "ms": "fast"},
        {**RESULT.to_dict(), "schedule": {**RESULT.to_dict()["schedule"], "colour": "red"}},
        {**RESULT.to_dict(), "schedule": {**RESULT.to_dict()["schedule"], "attend": {"rows": 3}}},
        {**RESULT.to_dict(), "schedule": {**RESULT.to_dict()["schedule"], "dot_precision": "tf32"}},
    ],
)
def test_a_bad_entry_is_passed_over_and_the_others_are_kept(
    entry: object, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write({"good": RESULT}, path)
    content = json.loads(path.read_text())
    content["entries"]["bad"] = entry
    path.write_text(json.dumps(content))
    with caplog.at_level(logging.WARNING):
        assert read(path) == read(path) == {"good": RESULT}
    assert len(caplog.records) == 1


def with_blocks(count: int) -> MonarchAttention:
    return IR.changed(seq_len_q=64 * count, seq_len_k=64 * count)


def test_the_key_holds_all_that_a_result_depends_on() -> None:
    base = key_of(IR, "NVIDIA H200", "3.6.0")
    assert base.startswith("NVIDIA H200 | triton 3.6.0 | attention f16 dims 64/64 group 1 | Form(block_size=64, ")
    assert " mask none, at most 64 blocks | " in base
    changes = (
        {"dtype": torch.bfloat16},
        {"head_dim": 80},
        {"value_dim": 80},
        {"num_kv_heads": 6},
        {"block_size": 32, "seq_len_q": 64 * 32, "seq_len_k": 64 * 32},
        {"num_iters": 2},
        {"init": "mean"},
        {"pad": "pre"},
        {"mask": MaskKind.KEY_PADDING},
        {"window": 1},
        {"window": None, "prefix": 1},
    )
    others = [key_of(IR.changed(**change), "NVIDIA H200", "3.6.0") for change in changes]
    others += [key_of(with_blocks(128), "NVIDIA H200", "3.6.0"), key_of(IR, "NVIDIA A100", "3.6.0")]
    others += [key_of(IR, "NVIDIA H200", "3.7.0")]
    assert len({base, *others}) == 1 + len(others)
    assert key_of(IR.changed(scale=1.0, batch=3, num_heads=4, num_kv_heads=4), "NVIDIA H200", "3.6.0") == base


def test_the_key_changes_with_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(IR, "g", "t")
    monkeypatch.setattr(store, "emitter_digest", lambda family: "other")
    assert key_of(IR, "g", "t") != before


def test_a_schedule_for_another_problem_is_not_legal() -> None:
    windowed = IR.changed(window=1)
    shipped = choose_schedule(IR, (9, 0))
    assert is_legal(shipped, IR, (9, 0))
    assert is_legal(choose_schedule(windowed, (9, 0)), windowed, (9, 0))
    assert not is_legal(shipped, windowed, (9, 0))
    assert not is_legal(choose_schedule(windowed, (9, 0)), IR, (9, 0))
    assert not is_legal(choose_schedule(windowed, (9, 0)), windowed.changed(num_iters=2), (9, 0))
    assert not is_legal(replace(shipped, whole=True, attend=Tiling(64, 32, 4, 1)), IR, (9, 0))
    assert not is_legal(replace(shipped, summarize=Tiling(128, 128, 4, 8)), IR, (9, 0))
