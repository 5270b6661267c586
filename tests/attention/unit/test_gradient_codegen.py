"""The kernels of the gradients of attention as text, and their schedules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_compile.attention.form import PADS, Form
from monarch_compile.attention.ir import SHARED_PREFIX, MaskKind, MonarchAttention
from monarch_compile.codegen.attention.gradient_schedule import (
    GradientSchedule,
    check_gradient_schedule,
    choose_gradient_schedule,
    shared_bytes,
)
from monarch_compile.codegen.attention.gradients import WITH_LSE
from monarch_compile.codegen.attention.schedule import choose_schedule
from monarch_compile.codegen.attention.specialization import UNKNOWN, Specialization, expected
from monarch_compile.codegen.render import sources
from monarch_compile.codegen.tiling import DTYPE_BYTES, SHARED_LIMITS, Tiling, shared_limit
from monarch_compile.errors import CodegenError
from tests.support.compiled import reports_of
from tests.support.kernels import check_text, emit, emit_backward

BASE = MonarchAttention(1, 12, 12, 4096, 4096, 64, 64, torch.bfloat16, Form(64, window=1), 0.125)
GOLDENS = {
    "backward": BASE,
    "backward_streamed": BASE.changed(
        seq_len_q=20001, seq_len_k=20001, num_heads=24, block_size=150, prefix=4, mask=MaskKind.KEY_BIAS
    ),
    "backward_tiles": BASE.changed(seq_len_q=1370, seq_len_k=1370, grid=(37, 37), block_size=32, tile=(4, 8), prefix=1),
}
CAPABILITIES = (None, *SHARED_LIMITS)

tiles = st.sampled_from((16, 32, 64, 128))
tilings = st.builds(Tiling, tiles, tiles, st.sampled_from((1, 4, 8)), st.integers(1, 3))
specializations = st.builds(Specialization, st.booleans(), st.booleans(), st.booleans(), st.sampled_from((1, 2, 8)))


@st.composite
def irs(draw: st.DrawFn) -> MonarchAttention:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.sampled_from((1, 2, 5)))
    prefix = draw(st.integers(0, SHARED_PREFIX))
    shape, mask = draw(st.sampled_from(("box", "plus"))), draw(st.sampled_from(MaskKind))
    axes = draw(st.integers(0, 3))
    tile = tuple(draw(st.integers(1, 6)) for _ in range(axes)) or None
    grid = None if tile is None else tuple(f"N_{axis}" for axis in range(axes))
    block_size = draw(st.integers(1, 300)) if tile is None else int(torch.tensor(tile).prod())
    window = draw(st.sampled_from((None, 0, 1, 2 if tile else 1 << 40)))
    pad = "post" if tile else draw(st.sampled_from(PADS))
    form = Form(block_size, pad=pad, window=window, prefix=prefix, tile=tile, window_shape=shape)
    seq_len: int | str = "N" if tile else draw(st.one_of(st.just("N"), st.integers(1, 1 << 18)))
    heads, dims = (kv_heads * group, kv_heads), (draw(st.integers(1, 256)), draw(st.integers(1, 256)))
    dtype = draw(st.sampled_from(tuple(DTYPE_BYTES)))
    return MonarchAttention(2, *heads, seq_len, seq_len, *dims, dtype, form, 0.125, mask, grid=grid)


@st.composite
def schedules(draw: st.DrawFn, ir: MonarchAttention) -> GradientSchedule:
    """One that was chosen, or any other that is legal."""
    chosen = choose_gradient_schedule(ir, draw(st.sampled_from(CAPABILITIES)))
    if draw(st.booleans()):
        return chosen
    keys = draw(tilings)
    return dataclasses.replace(
        chosen,
        attend=draw(tilings),
        represent=draw(tilings),
        queries=draw(tilings),
        keys=keys,
        whole=draw(st.booleans()),
        fused=keys.rows >= ir.form.block_size and draw(st.booleans()),
    )


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_sources(name: str, check_golden: Callable[[str, str], None]) -> None:
    ir = GOLDENS[name]
    schedule = choose_gradient_schedule(ir, (9, 0))
    for source in emit_backward(ir, schedule, expected(ir, schedule))[1:]:  # the first is of the forward pass
        check_golden(f"{name}_{source.name}.py.txt", source.text)


@settings(max_examples=60, deadline=None)
@given(irs(), specializations, st.data())
def test_any_source_can_be_read(ir: MonarchAttention, specialization: Specialization, data: st.DataObject) -> None:
    schedule = data.draw(schedules(ir))
    for source in emit_backward(ir, schedule, specialization):
        check_text(source)


@settings(max_examples=20, deadline=None)
@given(irs(), st.integers(1, 99))
def test_text_does_not_depend_on_run_time_sizes(ir: MonarchAttention, count: int) -> None:
    other = ir.changed(batch=count, num_heads=count * ir.group, num_kv_heads=count)
    schedule = choose_gradient_schedule(ir)
    assert emit_backward(ir, schedule) == emit_backward(other, schedule)


@given(irs(), st.sampled_from(CAPABILITIES))
def test_chosen_schedules_fit_the_device(ir: MonarchAttention, capability: tuple[int, int] | None) -> None:
    schedule = choose_gradient_schedule(ir, capability)
    check_gradient_schedule(schedule, ir)
    for name in ("attend", "represent", "queries", "keys"):
        assert shared_bytes(getattr(schedule, name), name, ir) <= shared_limit(capability)
    if schedule.whole:
        assert ir.num_blocks is not None
        assert ir.num_blocks <= schedule.represent.rows == schedule.most_blocks


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ["attend_summaries", "summarize_keys"]),
        ({"block_size": 16}, ["attend_queries", "attend_summaries", "summarize_keys"]),
        ({"block_size": 128}, ["attend_summaries", "summarize_queries", "summarize_keys"]),
        ({"block_size": 128, "window": None}, ["attend_summaries", "summarize_keys"]),
        (
            {"dtype": torch.float32},
            ["attend_queries", "attend_summaries", "summarize_queries", "summarize_keys"],
        ),
    ],
    ids=str,
)
def test_kernels_of_the_gradients(change: dict[str, Any], names: list[str]) -> None:
    """Where a block, or all of them, fit one program, its kernel gives the gradients of the queries too."""
    ir = BASE.changed(**change)
    found = [source.name for source in emit_backward(ir, choose_gradient_schedule(ir, (9, 0)))]
    assert found == ["monarch_summarize", *(f"monarch_{name}_backward" for name in names)]


def test_wrong_schedules_are_refused() -> None:
    chosen = choose_gradient_schedule(BASE, (9, 0))
    with pytest.raises(CodegenError, match="does not fit the rows of keys"):
        emit_backward(BASE, dataclasses.replace(chosen, keys=Tiling(32, 32, 4, 1)))
    with pytest.raises(CodegenError, match="does not tile the gradients"):
        emit_backward(BASE, choose_schedule(BASE))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{}, {"window": None}, {"block_size": 128}, {"mask": MaskKind.KEY_PADDING}], ids=str)
def test_logsumexps_add_a_few_lines_to_the_last_kernel(change: dict[str, Any]) -> None:
    ir = BASE.changed(**change)
    schedule = choose_schedule(ir, (9, 0))
    *before, last = emit(ir, schedule)
    *before_with, last_with = sources(WITH_LSE.program_of(ir, schedule, UNKNOWN))
    assert before == before_with
    check_text(last_with)
    added = set(last_with.text.splitlines()) - set(last.text.splitlines())
    assert any("tl.store(lse" in line for line in added)
    assert len(added) <= 8


COMPILED = """
import dataclasses, json, sys
import torch
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention.gradient_emitter import GRADIENTS
from monarch_compile.codegen.attention.gradient_ir import GradientsOf
from monarch_compile.codegen.tuning.compiler_report import compile_report
reports = []
for change in json.loads(sys.stdin.read()):
    n = change.pop("seq_len", 4096)
    sizes = dict(batch=1, num_heads=12, num_kv_heads=12, seq_len_q=n, seq_len_k=n, head_dim=64, value_dim=64)
    change |= {name: tuple(change[name]) for name in ("grid", "tile") if name in change}
    change["dtype"], change["mask"] = getattr(torch, change["dtype"]), MaskKind(change.get("mask", "none"))
    ir = MonarchAttention(**sizes, dtype=torch.float16, form=Form(64), scale=0.125).changed(**change)
    gradients = GradientsOf(ir)
    schedule = GRADIENTS.choose_schedule(gradients, (9, 0))
    for kernel in GRADIENTS.program_of(gradients, schedule, GRADIENTS.expected(gradients, schedule)).kernels:
        report = dataclasses.asdict(compile_report(kernel, (9, 0)))
        reports.append({**report, "dtype": str(ir.dtype), "ptx": ""})
print(json.dumps(reports))
"""
TO_COMPILE = [
    {"dtype": "bfloat16", "window": 1, "seq_len": 16384},
    {"dtype": "bfloat16", "window": 1, "head_dim": 128, "value_dim": 128},
    {"dtype": "float16", "block_size": 128, "window": 1, "prefix": 3, "mask": "key_bias", "pad": "pre"},
    {"dtype": "float16", "seq_len": 1370, "grid": (37, 37), "tile": (8, 8), "window": 1, "prefix": 1},
    {"dtype": "float32", "mask": "key_padding", "window": 1, "block_size": 39},
    {"dtype": "float16", "head_dim": 256, "value_dim": 256, "num_heads": 24},
    {"dtype": "bfloat16", "head_dim": 25, "value_dim": 80, "block_size": 45, "window": 1},
    {"dtype": "float16", "head_dim": 25, "value_dim": 80, "block_size": 200, "window": 1, "mask": "key_padding"},
]
MOST_SPILLED = 400
"""Bytes a thread, of 16-bit elements: see `gradient_schedule.TABLE`. tf32x3 keeps operands of float32 in two parts."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "problems", [TO_COMPILE[::4], pytest.param(TO_COMPILE, marks=pytest.mark.nightly)], ids=["some", "all"]
)
def test_kernels_compile_within_the_limits_of_the_device(problems: list[Any], tmp_path: Path) -> None:
    for report in reports_of(COMPILED, problems, tmp_path):
        assert report["shared_bytes"] <= 1024 * SHARED_LIMITS[9, 0], report
        most = 512 if report["dtype"] == "torch.float32" else MOST_SPILLED
        assert report["local_bytes"] <= most, f"spills: {report}"
        assert report["has_wgmma"] or report["has_mma"], report
