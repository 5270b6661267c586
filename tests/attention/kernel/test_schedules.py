"""What a schedule and the facts of a launch may change: speed alone. In Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.attention.reference import reference
from monarch_compile.codegen.attention import launch, specialization
from monarch_compile.codegen.attention.schedule import Schedule, check_schedule, choose_schedule
from monarch_compile.codegen.attention.specialization import (
    UNKNOWN,
    Specialization,
    expected,
    specialization_of,
    specialize,
    stride_multiple_of,
)
from monarch_compile.codegen.launcher import Launcher, build
from monarch_compile.codegen.tiling import ALL, Tiling
from monarch_compile.errors import CodegenError
from tests.attention.kernel.problems import Case, check, tensors
from tests.support.kernels import emit

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")

FORMS = (
    Case(640, 40, 16, 16, batch=1),
    Case(611, 40, 16, 32, pad="pre", mask="blocks"),
    Case(611, 40, 25, 16, num_iters=2, mask="some", batch=1),
    Case(640, 32, 16, 16, init="mean", num_iters=2, pad="pre", batch=1),
    Case(611, 40, 16, 16, window=1, batch=1),
    Case(640, 32, 16, 16, window=2, prefix=5, mask="some", batch=1),
    Case(611, 40, 16, 16, num_iters=2, window=1, prefix=3, pad="pre", batch=1),
    Case(640, 40, 16, 16, mask="bias", batch=1),
)
TURNED = {
    "stage 1": {"summarize": Tiling(16, 64, 1, 2, ALL)},
    "an offset": {"attend": Tiling(16, 32, 1, 2, ALL), "whole": True},
    "two offsets": {"attend": Tiling(32, 32, 1, 2, 2), "whole": True},
    "four offsets": {"attend": Tiling(32, 32, 1, 2, 4), "whole": True},
}


def ir_of(case: Case) -> MonarchAttention:
    form = Form(**{name: case.options[name] for name in FORM_OPTIONS})
    mask = {"none": MaskKind.NONE, "bias": MaskKind.KEY_BIAS}.get(case.mask, MaskKind.KEY_PADDING)
    heads, lengths = (case.num_heads, case.num_heads // case.group), (case.queries or case.seq_len, case.seq_len)
    dims, scale = (case.head_dim, case.value_dim), case.head_dim**-0.5
    return MonarchAttention(case.batch, *heads, *lengths, *dims, torch.float32, form, scale, mask, grid=case.grid)


def run(case: Case, schedule: Schedule) -> torch.Tensor:
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    return launch.run(Launcher(ir_of(case), schedule), q, k, v, mask, case.grid)


def shipped(case: Case) -> Schedule:
    return choose_schedule(ir_of(case))


def quarters() -> Iterator[Any]:
    """Every form with every change; three quarters of the pairs, but none of all forms and changes, run nightly."""
    for (i, case), (j, name) in itertools.product(enumerate(FORMS), enumerate(TURNED)):
        marks = [pytest.mark.nightly] if (i + j) % 4 else []
        yield pytest.param(case, TURNED[name], id=f"{case}-{name}", marks=marks)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("case", "change"), quarters())
def test_tiles_in_turn(case: Case, change: dict[str, object]) -> None:
    schedule = replace(shipped(case), **change)
    if schedule.near is not None and "summarize" in change:
        schedule = replace(schedule, near=replace(schedule.near, rows=16, num_warps=1))
    torch.testing.assert_close(run(case, schedule), run(case, shipped(case)), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", [case for case in FORMS if case.num_iters > 1], ids=str)
def test_one_kernel_between_iterations(case: Case) -> None:
    schedule = shipped(case)
    assert schedule.exchange
    apart = replace(schedule, exchange=False)
    torch.testing.assert_close(run(case, schedule), run(case, apart), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("pad", ["post", pytest.param("pre", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(
    "case",
    [
        Case(64, 4, 16, 16),
        Case(128, 8, 16, 16, num_iters=2, mask="blocks"),
        Case(160, 10, 25, 16, num_iters=2, init="mean", mask="some", batch=1),
        Case(256, 16, 16, 16, window=1, batch=1),
        Case(261, 16, 16, 16, window=1, prefix=5, mask="some", batch=1),
        Case(256, 16, 16, 16, num_iters=2, window=2, batch=1),
        Case(640, 40, 16, 16, mask="bias", window=1, batch=1),
        Case(640, 40, 16, 16, batch=1, num_heads=2, group=2),
        Case(64, 4, 16, 16, init="mean", queries=160),
        Case(64, 4, 20, 44, num_heads=2, layout="packed", mask="some"),
        Case(66, 4, 18, 18, num_iters=2, window=1, prefix=2),
    ],
    ids=str,
)
def test_specialization_changes_nothing(case: Case, pad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: what is known to be whole and near needs neither masks nor 64 bits."""
    case, met = replace(case, pad=pad), []

    def noted(*arguments: object) -> Specialization:
        met.append(specialization_of(*arguments))
        return met[-1]

    monkeypatch.setattr(specialization, "specialization_of", noted)
    build.cache_clear()
    found = check(case, torch.float32, "cpu")
    multiple = {20: 4, 18: 2}.get(case.head_dim, 1)
    assert met == [Specialization(False, False, False, multiple)]
    monkeypatch.setattr(specialization, "specialization_of", lambda *_: UNKNOWN)
    assert torch.equal(found, check(case, torch.float32, "cpu"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-47])
@pytest.mark.parametrize("groups", [{}, {"window": 1}, {"num_iters": 2, "window": 0}], ids=str)
def test_a_scale_that_is_not_positive(scale: float, groups: dict[str, int]) -> None:
    """It does not commute with the largest score; here with nothing to hide."""
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    options = {"scale": scale, "block_size": 16, "num_iters": 1, "init": "identity", "pad": "post", **groups}
    expected = reference(q.double(), k.double(), v.double(), None, **options)
    torch.testing.assert_close(launch.launch(q, k, v, None, **options).double(), expected, rtol=1e-5, atol=1e-6)


SCHEDULE = choose_schedule(ir_of(Case(64, 4, 16, 16)))


@pytest.mark.parametrize(
    ("num_blocks", "queries", "keys", "reaches", "found"),
    [
        (16, (64, 4), (64, 4), (100,), Specialization(False, False, False)),
        (16, (63, 4), (63, 4), (100,), Specialization(True, False, False)),
        (16, (160, 10), (63, 4), (100,), Specialization(True, False, False)),
        (16, (159, 10), (64, 4), (100,), Specialization(True, False, False)),
        (17, (68, 4), (68, 4), (100,), Specialization(False, True, False)),
        (16, (64, 4), (64, 4), (100, 2**31), Specialization(False, False, True)),
        (16, ("s0", 4), ("s0", 4), (100,), Specialization(True, False, False)),
        (None, (64, 4), (64, 4), (100,), Specialization(True, True, False)),
        (0, (0, 4), (0, 4), (100,), Specialization(False, True, False)),
        (16, (64, 4), (64, 4), (None,), Specialization(False, False, True)),
    ],
)
def test_specialization(num_blocks: Any, queries: tuple, keys: tuple, reaches: tuple, found: Specialization) -> None:
    sides = [(tokens, None if num_blocks is None else num_blocks * size) for tokens, size in (queries, keys)]
    assert specialization_of(num_blocks, sides, SCHEDULE, reaches) == found


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype", "strides", "apart"),
    [
        (72, 72, torch.float16, (72, 3456, 0), 8),
        (72, 72, torch.float32, (72, 3456), 4),
        (20, 24, torch.bfloat16, (20, 24), 4),
        (72, 64, torch.float16, (72, 64, 1000), 8),
        (72, 72, torch.float16, (73, 3456), 1),
        (72, 72, torch.float16, (3456, 74), 2),
        (25, 25, torch.float16, (25,), 1),
        (64, 48, torch.float16, (64,), 1),  # seen without it
    ],
)
def test_how_far_apart_rows_are(
    head_dim: int, value_dim: int, dtype: torch.dtype, strides: tuple[int, ...], apart: int
) -> None:
    assert stride_multiple_of(head_dim, value_dim, dtype, strides) == apart


def test_how_far_apart_rows_of_an_unknown_length_are() -> None:
    """Known of a multiple of a symbol, unknown of the symbol, and neither leaves a guard."""
    environment = ShapeEnv()
    length = environment.create_unbacked_symint()
    assert stride_multiple_of(72, 72, torch.float16, (72, 3456 * length)) == 8
    assert stride_multiple_of(72, 72, torch.float16, (72, 12 * length)) == 4
    assert stride_multiple_of(72, 72, torch.float16, (72, length)) == 1
    assert not environment.guards


def test_rows_known_to_be_apart_are_said_to_be() -> None:
    ir = ir_of(Case(4096, 64, 72, 72)).changed(dtype=torch.float16)
    schedule = choose_schedule(ir)
    found = expected(ir, schedule)
    assert found.stride_multiple == 8
    for source in emit(ir, schedule, found):
        assert ("q_head = q_head // STRIDE_MULTIPLE * STRIDE_MULTIPLE" in source.text) == (
            "q_head" in source.parameters
        )
        assert "q_dim = q_dim" not in source.text
        assert "mask_batch" not in source.text
    assert all("STRIDE_MULTIPLE" not in source.text for source in emit(ir, schedule))
    assert expected(ir.changed(head_dim=64, value_dim=64), schedule).stride_multiple == 1


def test_a_sequence_that_32_bits_do_not_span_is_wide() -> None:
    """By any of its tensors' strides, though no element is touched."""
    q = torch.empty((), dtype=torch.float16).expand(1, 2, 4096, 64)
    far = torch.empty_strided((1, 2, 4096, 64), (1, 64, 2**20, 1), device="meta", dtype=torch.float16)
    ir = ir_of(Case(4096, 64, 64, 64))
    schedule = choose_schedule(ir)
    sizes = {"num_heads": 2, "num_blocks": 64, "block_q": 64, "seq_len_q": 4096, "seq_len_k": 4096}
    assert not specialize(ir, schedule, {"q": q, "k": q, "v": q}, sizes).wide_offsets
    for name in ("q", "k", "v"):
        assert specialize(ir, schedule, {"q": q, "k": q, "v": q, name: far}, sizes).wide_offsets
    mask = torch.empty_strided((1, 4096), (1, 2**20), device="meta", dtype=torch.bool)
    assert specialize(ir, schedule, {"q": q, "k": q, "v": q, "key_mask": mask}, sizes).wide_offsets


def test_what_is_known_leaves_no_mask_and_no_64_bits() -> None:
    ir = ir_of(Case(4096, 64, 64, 64)).changed(dtype=torch.float16, num_heads=12, num_kv_heads=12)
    schedule = choose_schedule(ir)
    found = expected(ir, schedule)
    assert found == Specialization(False, False, False)
    for source in emit(ir, schedule, found):
        body = source.text.partition("@triton.jit")[2]
        assert "mask=" not in body
        assert "seq_len -" not in body
        assert "[None, :].to(tl.int64)" not in body
    assert expected(ir.changed(seq_len_q=4095, seq_len_k=4095), schedule).partial_block
    assert expected(ir.changed(num_heads="H", num_kv_heads="H"), schedule).wide_offsets


@pytest.mark.parametrize("changed", ["attend", "represent"])
@pytest.mark.parametrize("sizes", [{"rows": 32}, {"step": 32}], ids=str)
def test_blocks_fill_the_tiles_of_every_kernel_or_leave_a_rest(changed: str, sizes: dict[str, int]) -> None:
    """48 blocks are whole tiles of 16, and no whole tiles of 32."""
    tiling = Tiling(16, 16, 1, 1)
    schedule = replace(SCHEDULE, attend=tiling, represent=tiling)
    assert not specialization_of(48, [(192, 192), (192, 192)], schedule, (100,)).partial_tile
    larger = replace(schedule, **{changed: replace(tiling, **sizes)})
    assert specialization_of(48, [(192, 192), (192, 192)], larger, (100,)).partial_tile


def test_summaries_and_the_output_count_where_inputs_are_one_element() -> None:
    """Expanded tensors reach nowhere; what is laid out for them does."""
    q = torch.empty((), dtype=torch.float16).expand(1, 2, 2**26, 64)
    ir, schedule = ir_of(Case(4096, 64, 64, 64)), SCHEDULE
    sizes = {"num_heads": 2, "num_blocks": 2**20, "block_q": 64, "seq_len_q": 2**26, "seq_len_k": 2**26}
    assert specialize(ir, schedule, {"q": q, "k": q, "v": q}, sizes).wide_offsets
    few = {"num_heads": 2, "num_blocks": 2**10, "block_q": 64, "seq_len_q": 2**16, "seq_len_k": 2**16}
    near = q[:, :, : 2**16]
    assert not specialize(ir, schedule, {"q": near, "k": near, "v": near}, few).wide_offsets
    far = torch.empty_strided((1, 2, 4, 64), (1, 64, 2**30, 1), device="meta", dtype=torch.float16)
    assert specialize(ir, schedule, {"q": near, "k": near, "v": near, "rows": far}, few).wide_offsets
    assert specialize(ir, schedule, {"q": near, "k": near, "v": near}, {**few, "num_heads": 2**9}).wide_offsets


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0)])
@pytest.mark.parametrize("block_size", [5, 64, 100, 128, 256])
def test_unequal_lengths_get_a_schedule_that_their_kernels_have(block_size: int, capability: tuple | None) -> None:
    """Also where the bucket of queries in a block is as large as the block of keys."""
    for rows_key, blocks_key, iters in itertools.product((16, 64, 128), (1, 64, 128, 256, 1024), (1, 2)):
        form = Form(block_size, iters, "mean")
        ir = launch._bucket_ir(64, 64, torch.float16, form, 0.125, MaskKind.NONE, 1, blocks_key, rows_key, False)
        assert ir.is_cross
        assert -(-ir.seq_len_q // blocks_key) in (rows_key, rows_key - (blocks_key == 1))
        assert emit(ir, choose_schedule(ir, capability))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("num_iters", [1, 2])
def test_no_keys_and_no_queries(num_iters: int) -> None:
    q = torch.empty(1, 1, 0, 16)
    options = {"scale": 0.25, "block_size": 4, "num_iters": num_iters, "init": "identity", "pad": "post"}
    assert launch.launch(q, q, q, None, **options).shape == (1, 1, 0, 16)


@pytest.mark.usefixtures("interpreted")
def test_unequal_lengths_in_turn() -> None:
    """Tiles in turn where the number of queries in a block is known at run time only."""
    case = Case(640, 40, 16, 16, init="mean", queries=700, batch=1)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    ir = launch.bucketed(ir_of(case))
    plain = choose_schedule(ir)
    turned = replace(plain, summarize=Tiling(16, 64, 1, 2, ALL), attend=Tiling(16, 32, 1, 2, ALL), whole=True)
    found, expected = (launch.run(Launcher(ir, schedule), q, k, v, None) for schedule in (turned, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("block_size", "turns"), [(39, 2), (42, 4), (39, 4)])
def test_offsets_in_turn_divide_the_block(block_size: int, turns: int) -> None:
    """Else the last of a block's offsets would be met by no program."""
    ir = ir_of(Case(640, block_size, 16, 16))
    schedule = replace(choose_schedule(ir), attend=Tiling(32, 32, 1, 1, turns), whole=True)
    with pytest.raises(CodegenError, match="cannot take tiles in turn"):
        check_schedule(schedule, ir)


@pytest.mark.parametrize(
    "change",
    [
        {"summarize": Tiling(16, 16, 1, 1, ALL)},  # a block of 40 keys is no single step
        {"summarize": Tiling(16, 64, 1, 1, 2)},
        {"attend": Tiling(16, 32, 1, 1, ALL), "whole": False},
        {"attend": Tiling(16, 32, 1, 1, 2), "whole": True},  # an offset has two tiles
        {"attend": Tiling(32, 32, 1, 1, 5), "whole": True},  # no kernel takes 5
        {"represent": Tiling(16, 16, 1, 1, ALL)},
    ],
)
def test_turns_that_no_kernel_has_are_refused(change: dict[str, object]) -> None:
    case = FORMS[0]
    ir = ir_of(case)
    check_schedule(shipped(case), ir)
    schedule = replace(shipped(case), **change)
    with pytest.raises(CodegenError, match="cannot take tiles in turn"):
        check_schedule(schedule, ir)
    with pytest.raises(CodegenError, match="cannot take tiles in turn"):
        emit(ir, schedule)
