"""The emitted text of causal queries that follow a cache of keys, and what it compiles to with no GPU at hand."""

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
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention.kernels import SIZES, canonical
from monarch_compile.codegen.attention.launch import bucketed
from monarch_compile.codegen.attention.schedule import choose_schedule, turns_of
from monarch_compile.codegen.attention.specialization import Specialization, expected
from monarch_compile.codegen.tiling import ALL, SHARED_LIMITS, Tiling
from tests.attention.unit.test_codegen import COMPILED
from tests.support.compiled import reports_of
from tests.support.kernels import check_text, emit

PIECE = MonarchAttention(1, 8, 2, 2048, 16384, 128, 128, torch.bfloat16, Form(64), 0.125, is_causal=True)
GOLDENS = {
    "cached": PIECE.changed(window=2, mask=MaskKind.KEY_PADDING, block_size=39, pad="pre", prefix=4),
    "cached_chosen": PIECE.changed(window=1, prefix=64, chosen=8),
}
CACHED = ("cached", "first_block", "num_row_blocks", "num_summaries")


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_sources(name: str, check_golden: Callable[[str, str], None]) -> None:
    ir = GOLDENS[name]
    schedule = choose_schedule(ir, (9, 0))
    for source in emit(ir, schedule, expected(ir, schedule)):
        check_text(source)
        check_golden(f"{name}_{source.name}.py.txt", source.text)


def test_only_kernels_after_a_cache_take_its_sizes() -> None:
    for name, ir in GOLDENS.items():
        whole = ir.changed(seq_len_q=ir.seq_len_k)
        for source in emit(ir, choose_schedule(ir)):
            assert "num_row_blocks" in source.parameters, name
        for source in emit(whole, choose_schedule(whole)):
            assert not any(size in source.text.partition("@triton")[2] for size in CACHED), name


def test_triton_compiles_nothing_anew_for_lengths_that_are_multiples() -> None:
    """By itself it would, for each set of the sizes that are 1, or multiples of 16, at a piece."""
    for name, ir in GOLDENS.items():
        for source in emit(ir, choose_schedule(ir)):
            found = {x.name for x in source.load().params if x.do_not_specialize}
            sizes = {*SIZES} & {*source.parameters}
            assert found == sizes - {"num_heads"} >= {"num_row_blocks"}, name


specializations = st.builds(Specialization, st.booleans(), st.just(True), st.booleans(), st.sampled_from((1, 2, 4, 8)))


@st.composite
def pieces(draw: st.DrawFn) -> MonarchAttention:
    keys = draw(st.one_of(st.just("N"), st.integers(2, 1 << 20)))
    rows = "N_q" if isinstance(keys, str) else draw(st.integers(1, keys - 1))
    heads, group = draw(st.integers(1, 8)), draw(st.sampled_from((1, 2, 5)))
    dims = draw(st.integers(1, 256)), draw(st.integers(1, 256))
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    form = Form(
        draw(st.integers(1, 5000)),
        pad=draw(st.sampled_from(PADS)),
        window=draw(st.sampled_from((None, 0, 1, 1 << 40))),
        prefix=draw(st.sampled_from((0, 3, 70))),
        chosen=draw(st.sampled_from((0, 3))),
    )
    mask = draw(st.sampled_from(MaskKind))
    return MonarchAttention(1, heads * group, heads, rows, keys, *dims, dtype, form, 0.5, mask, is_causal=True)


@settings(max_examples=60, deadline=None)
@given(pieces(), specializations, st.sampled_from((None, (8, 0), (9, 0))))
def test_any_source_parses_and_its_schedule_fits(
    ir: MonarchAttention, specialization: Specialization, capability: tuple[int, int] | None
) -> None:
    schedule = choose_schedule(ir, capability)
    assert schedule.attend.turns == 1
    for source in emit(ir, schedule, specialization):
        check_text(source)
    assert bucketed(bucketed(ir)) == bucketed(ir)
    assert bucketed(ir).follows_cache


@settings(max_examples=30, deadline=None)
@given(pieces(), st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_text_does_not_depend_on_where_queries_begin(ir: MonarchAttention, rows: int, cached: int) -> None:
    schedule, other = choose_schedule(ir), ir.changed(seq_len_q=rows, seq_len_k=rows + cached)
    assert canonical(ir) == canonical(other)
    schedule = dataclasses.replace(schedule, whole=False)
    assert emit(ir, schedule) == emit(other, schedule)


def test_pieces_of_a_prompt_share_schedules() -> None:
    """A launcher serves all pieces whose keys fill up to twice as many blocks, wherever they begin in one."""
    irs = {bucketed(PIECE.changed(seq_len_k=2048 + cached)) for cached in range(14337, 30720, 911)}
    assert len(irs) == 1
    (ir,) = irs
    assert (ir.num_blocks, ir.seq_len_q) == (512, 2048)


def test_stage_2_takes_one_tile_of_blocks() -> None:
    """Its rows are blocks of queries, which begin anywhere: no schedule walks over tiles of them."""
    whole = PIECE.changed(seq_len_q=PIECE.seq_len_k)
    for ir, turns in ((PIECE, (1,)), (whole, (1, ALL, 2, 4))):
        assert turns_of(Tiling(256, 256, 4, 1), "attend", ir, True) == turns
    assert choose_schedule(PIECE.changed(seq_len_q=100), (9, 0)).attend.rows == 16
    assert choose_schedule(PIECE, (9, 0)).attend.rows == 64


DIMS = ("head_dim", "value_dim")
TO_COMPILE: list[Any] = [
    ({"seq_len": 32768, "block_size": 64, "window": 2, "prefix": 64, "chosen": 8, **dict.fromkeys(DIMS, 128)}, 4),
    ({"block_size": 39, "pad": "pre", "mask": "key_padding", "window": 1, **dict.fromkeys(DIMS, 80)}, 12),
    ({"dtype": "float32", "block_size": 64, "window": 1, "chosen": 3, "mask": "key_bias"}, 4),
    ({"seq_len": 16384, "block_size": 64, "chosen": 4, **dict.fromkeys(DIMS, 256)}, 4),
]
"""Changes of an attention, and key heads for 12 heads of queries."""
MOST_SPILLED = {"monarch_attend": 64, "monarch_summarize": 160, "monarch_exact": 160}
"""Bytes a thread, of 16-bit heads of 256 features and of stage 2 that meets chosen blocks."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "problems", [TO_COMPILE[:1], pytest.param(TO_COMPILE[1:], marks=pytest.mark.nightly)], ids=["some", "others"]
)
def test_kernels_compile_within_the_limits_of_the_device(problems: list[Any], tmp_path: Path) -> None:
    changes = [
        {"dtype": "bfloat16", **change, "is_causal": True, "seq_len_q": 2048, "num_kv_heads": heads}
        for change, heads in problems
    ]
    reports = reports_of(COMPILED, [(change, (9, 0)) for change in changes], tmp_path)
    assert {report["name"] for report in reports} >= {"monarch_summarize", "monarch_exact", "monarch_attend"}
    for report in reports:
        assert report["shared_bytes"] <= 1024 * SHARED_LIMITS[9, 0], report
        most = 512 if report["dtype"] == "torch.float32" else MOST_SPILLED.get(report["name"], 0)
        assert report["local_bytes"] <= most, f"spills: {report}"
        assert report["has_wgmma"] or report["has_mma"] or report["name"] == "monarch_choose", report
        assert not report["halves"], report


TRACED = """
import json, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from monarch_compile.codegen.attention.launch import launch
shapes = ShapeEnv()
mode = FakeTensorMode(shape_env=shapes)
dims = [DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]

def fake(heads, rows):
    context = StatelessSymbolicContext(dynamic_sizes=dims)
    sized = mode.from_tensor(torch.empty(1, heads, rows, 64, dtype=torch.bfloat16), symbolic_context=context)
    with mode:
        return torch.empty(sized.shape, dtype=sized.dtype, device="cuda")

options = dict(scale=0.125, block_size=64, window=1, prefix=64, chosen=4, causal=True)
q, k = fake(8, 200), fake(2, 5000)
with mode:
    graph = make_fx(lambda q, k: launch(q, k, k, None, **options))(q, k)
(rows,), (keys,) = ([x for x in shapes.var_to_range if str(x) in str(size)] for size in (q.shape[2], k.shape[2]))
serves = []
for pair in json.loads(sys.stdin.read()):
    values = dict(zip((rows, keys), pair))
    serves.append(all(guard.expr.xreplace(values).doit() == True for guard in shapes.guards))
kernels = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
print(json.dumps([{"serves": serves, "kernels": len(kernels)}]))
"""


@pytest.mark.slow
def test_one_trace_serves_pieces_of_other_lengths_at_other_places(tmp_path: Path) -> None:
    """No length is read on the way; guards say that there are several blocks, and that the prefix is cached."""
    pieces = [[200, 5000], [300, 4300], [513, 60001], [200, 100], [200, 210]]
    (found,) = reports_of(TRACED, pieces, tmp_path)
    assert found == {"serves": [True, True, True, False, False], "kernels": 6}
