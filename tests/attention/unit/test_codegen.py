"""Schedules, emitted text, kernel files, and what the kernels compile to; nothing here runs a kernel."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_compile.attention.form import INITS, PADS, Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention.kernels import canonical
from monarch_compile.codegen.attention.roles import roles
from monarch_compile.codegen.attention.schedule import Schedule, check_schedule, choose_schedule, shared_bytes
from monarch_compile.codegen.attention.specialization import Specialization, expected
from monarch_compile.codegen.source import KernelSource, cache_dir
from monarch_compile.codegen.tiling import ALL, SHARED_LIMITS, Tiling
from monarch_compile.errors import CodegenError
from tests.support.compiled import reports_of
from tests.support.kernels import check_text, emit

BASE = MonarchAttention(
    batch=2,
    num_heads=8,
    num_kv_heads=8,
    seq_len_q=1500,
    seq_len_k=1500,
    head_dim=64,
    value_dim=64,
    dtype=torch.float16,
    form=Form(39),
    scale=0.125,
)
GOLDENS = {
    "t1": BASE,
    "t1_long_block": BASE.changed(block_size=500),
    "t2_mean_pre_masked": BASE.changed(
        head_dim=25,
        value_dim=80,
        dtype=torch.float32,
        num_iters=2,
        init="mean",
        pad="pre",
        mask=MaskKind.KEY_PADDING,
    ),
    "t3": BASE.changed(dtype=torch.bfloat16, num_iters=3),
    "window": BASE.changed(window=1),
    "window_prefix_masked": BASE.changed(block_size=200, pad="pre", mask=MaskKind.KEY_PADDING, window=1, prefix=4),
    "prefix": BASE.changed(window=None, prefix=5),
    "shared_keys": BASE.changed(num_kv_heads=2, window=1),
    "t2_window": BASE.changed(num_iters=2, window=2),
    "t1_turns": BASE.changed(block_size=64, seq_len_q=8192, seq_len_k=8192),
    "t1_resident": BASE.changed(block_size=256, seq_len_q=65536, seq_len_k=65536),
    "t2_window_many": BASE.changed(num_iters=2, window=2, seq_len_q=39 * 300, seq_len_k=39 * 300),
    "window_biased": BASE.changed(mask=MaskKind.KEY_BIAS, window=1),
    "tiles": BASE.changed(
        seq_len_q=1 + 37 * 37, seq_len_k=1 + 37 * 37, grid=(37, 37), block_size=32, tile=(4, 8), window=0, prefix=1
    ),
    "tiles_plus_masked": BASE.changed(
        seq_len_q=8 * 16 * 16, seq_len_k=8 * 16 * 16, grid=(8, 16, 16), block_size=64, tile=(4, 4, 4), window=1
    ).changed(window_shape="plus", mask=MaskKind.KEY_PADDING),
    "tiles_text_last": BASE.changed(
        seq_len_q=24 * 24 + 9, seq_len_k=24 * 24 + 9, grid=(24, 24), block_size=64, tile=(8, 8), window=1, prefix=9
    ).changed(window_shape="plus", prefix_at_end=True, mask=MaskKind.KEY_BIAS),
    "tiles_own_frame": BASE.changed(
        seq_len_q=8 * 16 * 18, seq_len_k=8 * 16 * 18, grid=(8, 16, 18), block_size=64, tile=(4, 4, 4), window=(0, 1, 1)
    ),
    "prefix_at_end": BASE.changed(pad="pre", prefix=70, prefix_at_end=True, window=1),
    "causal": BASE.changed(window=2, prefix=4, is_causal=True, mask=MaskKind.KEY_PADDING),
    "causal_chosen": BASE.changed(
        seq_len_q=8192, seq_len_k=8192, block_size=64, num_kv_heads=2, window=2, chosen=8, is_causal=True
    ),
    "chosen_tiles": BASE.changed(
        seq_len_q=8 * 16 * 16, seq_len_k=8 * 16 * 16, grid=(8, 16, 16), block_size=64, tile=(4, 4, 4), chosen=4
    ),
    "cross": BASE.changed(seq_len_q=700, init="mean"),
    "t2_cross_pre_masked": BASE.changed(
        seq_len_q=9000, block_size=200, num_iters=2, pad="pre", mask=MaskKind.KEY_PADDING
    ),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def with_length(ir: MonarchAttention, seq_len: int | str) -> MonarchAttention:
    return ir.changed(seq_len_q=seq_len, seq_len_k=seq_len)


groups = st.builds(
    lambda window, prefix: {"window": window, "prefix": prefix},
    window=st.one_of(st.none(), st.integers(0, 3), st.integers(0, 1 << 40)),
    prefix=st.one_of(st.just(0), st.integers(0, 20), st.integers(0, 1 << 40)),
)


@st.composite
def irs(draw: st.DrawFn) -> MonarchAttention:
    kv_heads, group = draw(st.integers(1, 64)), draw(st.sampled_from((1, 1, 2, 5)))
    seq_len = draw(st.one_of(st.just("s0"), st.integers(1, 1 << 20)))
    seq_len_q = draw(st.one_of(st.just(seq_len), st.just("s1"), st.integers(1, 1 << 20)))
    return MonarchAttention(
        batch=draw(st.integers(1, 1024)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        seq_len_q=seq_len_q,
        seq_len_k=seq_len,
        head_dim=draw(st.integers(1, 256)),
        value_dim=draw(st.integers(1, 256)),
        dtype=draw(st.sampled_from(DTYPES)),
        form=Form(
            block_size=draw(st.integers(1, 5000)),
            num_iters=draw(st.integers(1, 4)),
            init=draw(st.sampled_from(INITS)),
            pad=draw(st.sampled_from(PADS)),
            **(draw(groups) if seq_len_q == seq_len else {}),
        ),
        scale=draw(st.floats(-10, 10, allow_nan=False)),
        mask=draw(st.sampled_from(MaskKind)),
    )


tiles = st.sampled_from((16, 32, 64, 128, 256))
tilings = st.builds(Tiling, tiles, tiles, st.sampled_from((1, 2, 4, 8)), st.integers(1, 4))
precisions = st.sampled_from(("ieee", "tf32x3"))
schedules = st.builds(
    *(Schedule, tilings, tilings, tilings, precisions, st.one_of(st.none(), tilings)),
    *(st.booleans(), st.booleans(), st.booleans()),
)
specializations = st.builds(Specialization, st.booleans(), st.booleans(), st.booleans(), st.sampled_from((1, 2, 4, 8)))


@st.composite
def turned(draw: st.DrawFn, ir: MonarchAttention, schedule: Schedule) -> Schedule:
    """`schedule`, taking tiles in turn where that is legal."""
    for name in ("summarize", "attend"):
        tiling = dataclasses.replace(getattr(schedule, name), turns=draw(st.sampled_from((1, ALL, 2, 4))))
        other = dataclasses.replace(schedule, **{name: tiling})
        with contextlib.suppress(CodegenError):
            check_schedule(other, ir)
            schedule = other
    return schedule


# Schedules


@given(irs(), st.sampled_from((None, *SHARED_LIMITS)))
def test_chosen_schedules_fit_the_device(ir: MonarchAttention, capability: tuple[int, int] | None) -> None:
    schedule = choose_schedule(ir, capability)
    limit = 1024 * SHARED_LIMITS.get(capability or (0, 0), 99)
    for name, tiling in schedule.tilings():
        assert shared_bytes(tiling, ir) <= limit, name
    assert hash(schedule) == hash(choose_schedule(ir, capability))
    assert str(schedule.summarize) in str(schedule)


@given(irs())
def test_whole_means_that_every_block_is_in_one_step(ir: MonarchAttention) -> None:
    schedule = choose_schedule(ir, (9, 0))
    assert schedule.whole == (ir.num_blocks is not None and ir.num_blocks <= schedule.attend.step)


@given(irs())
def test_tiles_are_no_larger_than_what_they_cover(ir: MonarchAttention) -> None:
    schedule = choose_schedule(ir, (9, 0))
    assert ir.block_size_q is None or schedule.summarize.rows < 2 * max(16, ir.block_size_q)
    assert schedule.summarize.step < 2 * max(16, ir.form.block_size)
    assert (schedule.near is None) == (not ir.form.has_exact_keys)
    if ir.num_blocks is not None:
        assert schedule.attend.rows < 2 * max(16, ir.num_blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "falls back to the reference"),
        ({"head_dim": 257}, "head_dim=257"),
        ({"value_dim": 512}, "value_dim=512"),
        ({"seq_len_k": 900, "window": 1}, "window or a prefix where seq_len_q != seq_len_k"),
    ],
)
def test_what_has_no_kernel_is_refused_clearly(change: dict[str, Any], message: str) -> None:
    ir = BASE.changed(**change)
    with pytest.raises(CodegenError, match=message):
        choose_schedule(ir)
    with pytest.raises(CodegenError, match=message):
        emit(ir, choose_schedule(BASE))


@pytest.mark.parametrize("bad", [(24, 32, 4, 1), (8, 32, 4, 1), (32, 32, 3, 1), (32, 32, 4, 0)])
def test_bad_tilings_are_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(CodegenError):
        Tiling(*bad)


def test_wide_heads_take_large_tiles_where_operands_lie_in_shared_memory() -> None:
    wide = BASE.changed(head_dim=160, value_dim=160, dtype=torch.float16, block_size=64)
    hopper = choose_schedule(wide, (9, 0))
    assert str(hopper.summarize) == "64x64/w4/s1"
    for other in ((8, 0), (8, 6), None):
        assert choose_schedule(wide, other).summarize.step < hopper.summarize.step


def test_bad_precision_is_refused() -> None:
    with pytest.raises(CodegenError, match="tf32x3"):
        dataclasses.replace(choose_schedule(BASE), dot_precision="tf32")


# Emitted text


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_sources(name: str, check_golden: Callable[[str, str], None]) -> None:
    ir = GOLDENS[name]
    schedule = choose_schedule(ir, (9, 0))
    for source in emit(ir, schedule, expected(ir, schedule)):
        check_golden(f"{name}_{source.name}.py.txt", source.text)


@settings(max_examples=150, deadline=None)
@given(irs(), schedules, specializations, st.data())
def test_any_source_parses_and_is_deterministic(
    ir: MonarchAttention, schedule: Schedule, specialization: Specialization, data: st.DataObject
) -> None:
    schedule = data.draw(turned(ir, schedule))
    for source, again in zip(emit(ir, schedule, specialization), emit(ir, schedule, specialization), strict=True):
        assert source == again
        check_text(source)


@given(irs(), schedules, st.integers(1, 99), st.integers(1, 1 << 20))
def test_text_does_not_depend_on_run_time_sizes(ir: MonarchAttention, schedule: Schedule, count: int, n: int) -> None:
    heads = {"num_heads": count * ir.group, "num_kv_heads": count}
    other = with_length(ir.changed(batch=count, **heads), n)
    if ir.is_cross:
        other = dataclasses.replace(other, seq_len_q=n + count)
    assert emit(ir, schedule) == emit(other, schedule)
    assert canonical(ir) == canonical(other)


@given(irs(), schedules)
def test_provenance(ir: MonarchAttention, schedule: Schedule) -> None:
    for source in emit(ir, schedule):
        assert "generated by monarch_compile" in source.text
        assert f"# ir: {canonical(ir)}\n" in source.text
        assert f"# schedule: {schedule}\n" in source.text


@pytest.mark.parametrize(
    ("num_iters", "init", "names"),
    [
        (1, "identity", ["summarize", "attend"]),
        (1, "mean", ["mean_query", "summarize_last", "attend"]),
        (2, "identity", ["summarize_first", "exchange", "summarize_last", "attend"]),
        (2, "mean", ["mean_query", "summarize_next", "exchange", "summarize_last", "attend"]),
    ],
)
def test_kernels_of_an_attention(num_iters: int, init: str, names: list[str]) -> None:
    """What is between iterations is two kernels where the blocks do not fit one tile, or where their number is open."""
    ir = BASE.changed(num_iters=num_iters, init=init)
    schedule = choose_schedule(ir)
    assert schedule.near is None
    for many in (with_length(ir, 39 * 300), with_length(ir, "N")):
        apart = [name for x in names for name in (("weigh", "represent") if x == "exchange" else (x,))]
        assert [role.name for role in roles(many, choose_schedule(many))] == [f"monarch_{name}" for name in apart]
    assert [role.name for role in roles(ir, schedule)] == [f"monarch_{name}" for name in names]


@pytest.mark.parametrize("groups", [{"window": 1}, {"prefix": 3}, {"window": 0, "prefix": 3}], ids=str)
def test_where_the_exact_groups_are_computed(groups: dict[str, int]) -> None:
    """In stage 1 where its queries are the sequence's own and the schedule says so; else before all other kernels."""
    ir = BASE.changed(**groups)
    fused = choose_schedule(ir)
    apart = dataclasses.replace(fused, near=Tiling(32, 32, 2, 1), fused=False)
    names = [[role.name.removeprefix("monarch_") for role in roles(ir, s)] for s in (fused, apart)]
    assert names == [["summarize_near", "attend"], ["exact", "summarize", "attend"]]
    assert "TILE_J: tl.constexpr = 32" in emit(ir, apart)[0].text
    for change in ({"num_iters": 2}, {"init": "mean"}):
        other = ir.changed(**change)
        for schedule in (choose_schedule(other), fused):
            assert roles(other, schedule)[0].name == "monarch_exact"


def test_an_own_block_needs_no_loop_over_a_window() -> None:
    """With window=0 the exact group is the block that stage 1 has just been through."""
    ir = BASE.changed(block_size=64, window=0)
    assert "for " not in emit(ir, choose_schedule(ir))[0].text.partition("@triton.jit")[2]


def test_a_block_within_one_tile_has_no_loop() -> None:
    one, several = BASE.changed(block_size=64), BASE.changed(block_size=200)
    assert "for " not in emit(one, choose_schedule(one))[0].text.partition("@triton.jit")[2]
    assert "for tile in tl.range(0, BLOCK, TILE_I)" in emit(several, choose_schedule(several))[0].text


def test_blocks_within_one_tile_have_no_loop() -> None:
    """Up to 64; up to 256 a program walks over tiles, where nothing is added up; beyond, an online softmax."""
    lengths = (64 * 64, 64 * 128, 64 * 256, 64 * 257)
    irs = [BASE.changed(block_size=64, seq_len_q=n, seq_len_k=n) for n in lengths]
    attend = [emit(ir, choose_schedule(ir, (9, 0)))[-1].text.partition("@triton.jit")[2] for ir in irs]
    assert "for " not in attend[0]
    assert "for turn in tl.range(0, TURNS):" in attend[1]
    assert "for turn in tl.range(0, num_blocks, TILE_L):" in attend[2]
    assert all("rescale" not in text for text in attend[:3])
    assert "for tile in tl.range(0, num_blocks, TILE_B)" in attend[3]
    assert "rescale" in attend[3]


def test_masks_only_where_needed() -> None:
    whole = emit(BASE.changed(block_size=64), choose_schedule(BASE))
    assert not any("is_head" in source.text or "in_block" in source.text for source in whole)
    odd = emit(BASE.changed(head_dim=25), choose_schedule(BASE))
    assert all("is_head" in source.text for source in odd)


def test_scale_is_a_literal_in_base_two() -> None:
    text = emit(BASE, choose_schedule(BASE))[0].text
    line = next(line for line in text.splitlines() if "SCALE: tl.constexpr" in line)
    assert float(line.partition("=")[2]) == pytest.approx(0.125 * math.log2(math.e), rel=1e-15)


# Kernel files


def test_written_only_when_different(tmp_path: Path) -> None:
    source = KernelSource("kernel", "x = 1\n")
    path = source.write(tmp_path)
    os.utime(path, (1, 1))
    assert source.write(tmp_path) == path
    assert path.stat().st_mtime == 1
    path.write_text("x = 2\n")
    source.write(tmp_path)
    assert path.read_text() == "x = 1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == [source.file_name]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        KernelSource("kernel", "x = 1\n").write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_key_is_of_the_text() -> None:
    assert KernelSource("a", "x").key == KernelSource("b", "x").key != KernelSource("a", "y").key


def test_cache_directory_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONARCH_CACHE_DIR", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MONARCH_CACHE_DIR")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    assert cache_dir() == tmp_path / "inductor" / "monarch_compile"


# What the kernels compile to, with no GPU at hand

COMPILED = """
import dataclasses, json, sys
import torch
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.tuning.compiler_report import compile_report
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
reports = []
for change, capability in json.loads(sys.stdin.read()):
    n = change.pop("seq_len", 4096)
    sizes = dict(batch=1, num_heads=12, num_kv_heads=12, seq_len_q=n, seq_len_k=n, head_dim=64, value_dim=64)
    change |= {name: tuple(x) for name, x in change.items() if isinstance(x, list)}
    change["dtype"], change["mask"] = getattr(torch, change["dtype"]), MaskKind(change.get("mask", "none"))
    ir = MonarchAttention(**sizes, dtype=torch.float16, form=Form(64), scale=0.125).changed(**change)
    schedule = EMITTER.choose_schedule(ir, tuple(capability))
    for kernel in dict.fromkeys(EMITTER.program_of(ir, schedule, EMITTER.expected(ir, schedule)).kernels):
        report = dataclasses.asdict(compile_report(kernel, tuple(capability)))
        has_bools = any(buffer.dtype is torch.bool for buffer in kernel.reads)  # two of which load as 16 bits
        halves = 0 if has_bools else report["ptx"].count("ld.global.b16")
        place = {"capability": capability, "dtype": str(ir.dtype), "text": str(schedule)}
        reports.append({**report, **place, "ptx": "", "halves": halves})
print(json.dumps(reports))
"""
TILED = {"window": 1, "window_shape": "plus", "prefix": 1, "mask": "key_padding"}
TEXT_LAST = {"window": 1, "window_shape": "plus", "prefix": 333, "prefix_at_end": True}
TO_COMPILE = [
    ({"dtype": "float16"}, (9, 0)),
    ({"dtype": "bfloat16", "num_iters": 2, "init": "mean", "pad": "pre", "mask": "key_padding"}, (9, 0)),
    ({"dtype": "float16", "block_size": 39, "head_dim": 256, "value_dim": 256}, (8, 0)),
    ({"dtype": "float32", "block_size": 39, "head_dim": 80, "value_dim": 25}, (9, 0)),
    ({"dtype": "float16", "block_size": 39, "window": 1 << 40, "prefix": 1000}, (9, 0)),
    ({"dtype": "float16", "block_size": 128, "seq_len": 16384, "num_iters": 2}, (9, 0)),
    ({"dtype": "bfloat16", "block_size": 256, "seq_len": 65536}, (9, 0)),
    ({"dtype": "bfloat16", "block_size": 256, "seq_len": 65535}, (8, 6)),
    ({"dtype": "float16", "block_size": 128, "seq_len": 16384, "head_dim": 128, "value_dim": 128}, (9, 0)),
    ({"dtype": "bfloat16", "block_size": 256, "pad": "pre", "mask": "key_padding", "window": 1, "prefix": 4}, (9, 0)),
    ({"dtype": "bfloat16", "init": "mean", "window": 0, "prefix": 4, "head_dim": 128, "value_dim": 128}, (9, 0)),
    ({"dtype": "float16", "num_iters": 2, "head_dim": 40, "value_dim": 40}, (9, 0)),
    ({"dtype": "float16", "head_dim": 160, "value_dim": 160}, (9, 0)),
    ({"dtype": "float16", "mask": "key_bias"}, (9, 0)),
    ({"dtype": "float16", "seq_len": 1370, "grid": (37, 37), "tile": (8, 8), **TILED}, (9, 0)),
    ({"dtype": "bfloat16", "grid": (64, 64), "tile": (4, 8), "block_size": 32, "window": 0}, (8, 0)),
    ({"dtype": "float32", "grid": (64, 64), "tile": (8, 8), "num_iters": 2, "window": 1}, (9, 0)),
    ({"dtype": "bfloat16", "grid": (16, 16, 16), "tile": (4, 4, 4), "window": 1, "window_shape": "plus"}, (9, 0)),
    ({"dtype": "bfloat16", "grid": (16, 16, 16), "tile": (4, 4, 4), "window": (0, 1, 1)}, (9, 0)),
    ({"dtype": "bfloat16", "seq_len": 4429, "grid": (64, 64), "tile": (8, 8), **TEXT_LAST}, (9, 0)),
    ({"dtype": "float16", "seq_len": 4105, "grid": (64, 64), "tile": (8, 8), **TEXT_LAST, "prefix": 9}, (9, 0)),
    (
        {"dtype": "bfloat16", "window": 1, "head_dim": 72, "value_dim": 72, "num_heads": 16, "num_kv_heads": 16},
        (9, 0),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "problems", [TO_COMPILE[::4], pytest.param(TO_COMPILE, marks=pytest.mark.nightly)], ids=["some", "all"]
)
def test_kernels_compile_within_the_limits_of_the_device(problems: list[Any], tmp_path: Path) -> None:
    for report in reports_of(COMPILED, problems, tmp_path):
        capability = tuple(report["capability"])
        assert report["shared_bytes"] <= 1024 * SHARED_LIMITS[capability], report
        assert report["registers"] <= 255, report
        # tf32x3 keeps every operand in two parts: wide float32 rows spill, up to half a KiB a thread.
        allowed = 512 if report["dtype"] == "torch.float32" else 16
        assert report["local_bytes"] <= allowed, f"spills: {report}"
        assert not report["halves"], f"16-bit numbers load one by one, not as vectors: {report}"
        if report["name"] != "monarch_mean_query":
            assert report["has_wgmma"] or report["has_mma"], report
        if (
            report["name"].startswith(("monarch_summarize", "monarch_exact"))
            and capability == (9, 0)
            and "16" in report["dtype"]
        ):
            assert report["has_wgmma"], f"64 rows and 4 warps fill Hopper's own instructions: {report}"


AHEAD = """
import sys, torch
from monarch_compile.codegen.tuning.search import compile_ahead, tasks
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
ir = MonarchAttention(1, 12, 12, 256, 256, 64, 64, torch.float16, Form(64), 0.125)
first = tasks(ir, (9, 0), "cpu")[0]
compile_ahead(first)
"""


@pytest.mark.slow
def test_compiling_ahead_fills_the_disk_cache_of_triton(tmp_path: Path) -> None:
    """Even where nothing can be launched; in a process of its own, as workers are."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"MONARCH_CACHE_DIR": str(tmp_path / "kernels"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    subprocess.run([sys.executable, "-c", AHEAD], check=True, env=environment)
    compiled = {path.stem for path in (tmp_path / "triton").rglob("*.cubin")}
    assert compiled == {"monarch_summarize", "monarch_attend"}
