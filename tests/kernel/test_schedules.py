"""What a schedule and the facts of a launch may change: speed alone. In Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel.problems import Case, check, tensors
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from monarch_compile.codegen import launch as launching
from monarch_compile.codegen.emit import emit
from monarch_compile.codegen.facts import UNKNOWN, Facts, apart_of, expected_facts, facts_of
from monarch_compile.codegen.launch import Launcher, Problem
from monarch_compile.codegen.schedule import ALL, Schedule, Tiling, check_schedule, choose_schedule
from monarch_compile.errors import CodegenError
from monarch_compile.form import Form
from monarch_compile.reference import reference

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


def problem_of(case: Case) -> Problem:
    form = Form(case.block_size, case.num_iters, case.init, case.pad, case.window, case.prefix)
    masked, biased, scale = case.mask != "none", case.mask == "bias", case.head_dim**-0.5
    return Problem(case.head_dim, case.value_dim, torch.float32, form, scale, masked, case.group, 0, biased)


def run(case: Case, schedule: Schedule) -> torch.Tensor:
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    return Launcher(problem_of(case), schedule)(q, k, v, mask, -(-case.seq_len // case.block_size))


def shipped(case: Case) -> Schedule:
    return choose_schedule(problem_of(case).ir(case.seq_len))


def halves() -> Iterator[Any]:
    """Every form with every change; half of the pairs, in which each form and each change still occurs, run nightly."""
    for (i, case), (j, name) in itertools.product(enumerate(FORMS), enumerate(TURNED)):
        marks = [pytest.mark.nightly] if (i + j) % 2 else []
        yield pytest.param(case, TURNED[name], id=f"{case}-{name}", marks=marks)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("case", "change"), halves())
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
def test_facts_change_nothing(case: Case, pad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: what is known to be whole and near needs neither masks nor 64 bits."""
    case, met = replace(case, pad=pad), []

    def noted(*arguments: object) -> Facts:
        met.append(facts_of(*arguments))
        return met[-1]

    monkeypatch.setattr(launching, "facts_of", noted)
    launching.build.cache_clear()
    found = check(case, torch.float32, "cpu")
    apart = {20: 4, 18: 2}.get(case.head_dim, 1)
    assert met == [Facts(cut=False, rest=False, wide=False, apart=apart)]
    monkeypatch.setattr(launching, "facts_of", lambda *_: UNKNOWN)
    assert torch.equal(found, check(case, torch.float32, "cpu"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-47])
@pytest.mark.parametrize("groups", [{}, {"window": 1}, {"num_iters": 2, "window": 0}], ids=str)
def test_a_scale_that_is_not_positive(scale: float, groups: dict[str, int]) -> None:
    """It does not commute with the largest score; here with nothing to hide."""
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    options = {"scale": scale, "block_size": 16, "num_iters": 1, "init": "identity", "pad": "post", **groups}
    expected = reference(q.double(), k.double(), v.double(), None, **options)
    torch.testing.assert_close(launching.launch(q, k, v, None, **options).double(), expected, rtol=1e-5, atol=1e-6)


SCHEDULE = choose_schedule(Problem(16, 16, torch.float32, Form(4), 0.25).ir(64))


@pytest.mark.parametrize(
    ("num_blocks", "queries", "keys", "reaches", "facts"),
    [
        (16, (64, 4), (64, 4), (100,), Facts(False, False, False)),
        (16, (63, 4), (63, 4), (100,), Facts(True, False, False)),
        (16, (160, 10), (63, 4), (100,), Facts(True, False, False)),
        (16, (159, 10), (64, 4), (100,), Facts(True, False, False)),
        (17, (68, 4), (68, 4), (100,), Facts(False, True, False)),
        (16, (64, 4), (64, 4), (100, 2**31), Facts(False, False, True)),
        (16, ("s0", 4), ("s0", 4), (100,), Facts(True, False, False)),
        (None, (64, 4), (64, 4), (100,), Facts(True, True, False)),
        (0, (0, 4), (0, 4), (100,), Facts(False, True, False)),
        (16, (64, 4), (64, 4), (None,), Facts(False, False, True)),
    ],
)
def test_facts(num_blocks: object, queries: tuple, keys: tuple, reaches: tuple, facts: Facts) -> None:
    assert facts_of(num_blocks, queries, keys, SCHEDULE, reaches) == facts


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
    assert apart_of(head_dim, value_dim, dtype, strides) == apart


def test_how_far_apart_rows_of_an_unknown_length_are() -> None:
    """Known of a multiple of a symbol, unknown of the symbol, and neither leaves a guard."""
    environment = ShapeEnv()
    length = environment.create_unbacked_symint()
    assert apart_of(72, 72, torch.float16, (72, 3456 * length)) == 8
    assert apart_of(72, 72, torch.float16, (72, 12 * length)) == 4
    assert apart_of(72, 72, torch.float16, (72, length)) == 1
    assert not environment.guards


def test_rows_known_to_be_apart_are_said_to_be() -> None:
    ir = problem_of(Case(4096, 64, 72, 72)).ir(4096).changed(dtype=torch.float16)
    schedule = choose_schedule(ir)
    facts = expected_facts(ir, schedule)
    assert facts.apart == 8
    for source in emit(ir, schedule, facts):
        assert ("q_head = q_head // APART * APART" in source.text) == ("q_head" in source.parameters)
        assert "q_dim = q_dim" not in source.text
        assert "mask_batch" not in source.text
    assert all("APART" not in source.text for source in emit(ir, schedule))
    assert expected_facts(ir.changed(head_dim=64, value_dim=64), schedule).apart == 1


def test_a_sequence_that_32_bits_do_not_span_is_wide() -> None:
    """By any of its tensors' strides, though no element is touched."""
    q = torch.empty((), dtype=torch.float16).expand(1, 2, 4096, 64)
    far = torch.empty_strided((1, 2, 4096, 64), (1, 64, 2**20, 1), device="meta", dtype=torch.float16)
    ir = problem_of(Case(4096, 64, 64, 64)).ir(4096)
    launcher = Launcher(problem_of(Case(4096, 64, 64, 64)), choose_schedule(ir))
    sizes = {"num_heads": 2, "num_blocks": 64, "block_q": 64, "seq_len_q": 4096, "seq_len_k": 4096}
    assert not launcher._facts({**sizes, "q": q, "k": q, "v": q}).wide
    for name in ("q", "k", "v"):
        assert launcher._facts({**sizes, "q": q, "k": q, "v": q, name: far}).wide
    mask = torch.empty_strided((1, 4096), (1, 2**20), device="meta", dtype=torch.bool)
    assert launcher._facts({**sizes, "q": q, "k": q, "v": q, "key_mask": mask}).wide


def test_known_facts_leave_no_mask_and_no_long_place() -> None:
    ir = problem_of(Case(4096, 64, 64, 64)).ir(4096).changed(dtype=torch.float16, num_heads=12, num_kv_heads=12)
    schedule = choose_schedule(ir)
    facts = expected_facts(ir, schedule)
    assert facts == Facts(False, False, False)
    for source in emit(ir, schedule, facts):
        body = source.text.partition("@triton.jit")[2]
        assert "mask=" not in body
        assert "seq_len -" not in body
        assert "[None, :].to(tl.int64)" not in body
    assert expected_facts(ir.changed(seq_len_q=4095, seq_len_k=4095), schedule).cut
    assert expected_facts(ir.changed(num_heads="H", num_kv_heads="H"), schedule).wide


@pytest.mark.parametrize("changed", ["attend", "represent"])
@pytest.mark.parametrize("sizes", [{"rows": 32}, {"step": 32}], ids=str)
def test_blocks_fill_the_tiles_of_every_kernel_or_leave_a_rest(changed: str, sizes: dict[str, int]) -> None:
    """48 blocks are whole tiles of 16, and no whole tiles of 32."""
    tiling = Tiling(16, 16, 1, 1)
    schedule = replace(SCHEDULE, attend=tiling, represent=tiling)
    assert not facts_of(48, (192, 4), (192, 4), schedule, (100,)).rest
    assert facts_of(48, (192, 4), (192, 4), replace(schedule, **{changed: replace(tiling, **sizes)}), (100,)).rest


def test_summaries_and_the_output_count_where_inputs_are_one_element() -> None:
    """Expanded tensors reach nowhere; what is laid out for them does."""
    q = torch.empty((), dtype=torch.float16).expand(1, 2, 2**26, 64)
    launcher = Launcher(problem_of(Case(4096, 64, 64, 64)), SCHEDULE)
    sizes = {"num_heads": 2, "num_blocks": 2**20, "block_q": 64, "seq_len_q": 2**26, "seq_len_k": 2**26}
    assert launcher._facts({**sizes, "q": q, "k": q, "v": q}).wide
    few = {"num_heads": 2, "num_blocks": 2**10, "block_q": 64, "seq_len_q": 2**16, "seq_len_k": 2**16}
    near = q[:, :, : 2**16]
    assert not launcher._facts({**few, "q": near, "k": near, "v": near}).wide
    far = torch.empty_strided((1, 2, 4, 64), (1, 64, 2**30, 1), device="meta", dtype=torch.float16)
    assert launcher._facts({**few, "q": near, "k": near, "v": near, "rows": far}).wide
    assert launcher._facts({**few, "num_heads": 2**9, "q": near, "k": near, "v": near}).wide


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0)])
@pytest.mark.parametrize("block_size", [5, 64, 100, 128, 256])
def test_unequal_lengths_get_a_schedule_that_their_kernels_have(block_size: int, capability: tuple | None) -> None:
    """Also where the bucket of queries in a block is as large as the block of keys."""
    for rows_key, blocks_key, iters in itertools.product((16, 64, 128), (1, 64, 128, 256, 1024), (1, 2)):
        problem = Problem(64, 64, torch.float16, Form(block_size, iters, "mean"), 0.125, rows_key=rows_key)
        ir = problem.ir(blocks_key * block_size)
        assert ir.is_cross
        assert -(-ir.seq_len_q // blocks_key) in (rows_key, rows_key - (blocks_key == 1))
        assert emit(problem.ir("N"), choose_schedule(ir, capability))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("num_iters", [1, 2])
def test_no_keys_and_no_queries(num_iters: int) -> None:
    q = torch.empty(1, 1, 0, 16)
    options = {"scale": 0.25, "block_size": 4, "num_iters": num_iters, "init": "identity", "pad": "post"}
    assert launching.launch(q, q, q, None, **options).shape == (1, 1, 0, 16)


@pytest.mark.usefixtures("interpreted")
def test_unequal_lengths_in_turn() -> None:
    """Tiles in turn where the number of queries in a block is known at run time only."""
    case = Case(640, 40, 16, 16, init="mean", queries=700, batch=1)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    problem = replace(problem_of(case), rows_key=64)
    plain = choose_schedule(problem.ir(640))
    turned = replace(plain, summarize=Tiling(16, 64, 1, 2, ALL), attend=Tiling(16, 32, 1, 2, ALL), whole=True)
    found, expected = (Launcher(problem, schedule)(q, k, v, None, 16) for schedule in (turned, plain))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("block_size", "turns"), [(39, 2), (42, 4), (39, 4)])
def test_offsets_in_turn_divide_the_block(block_size: int, turns: int) -> None:
    """Else the last of a block's offsets would be met by no program."""
    ir = problem_of(Case(640, block_size, 16, 16)).ir(640)
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
    ir = problem_of(case).ir(case.seq_len)
    check_schedule(shipped(case), ir)
    schedule = replace(shipped(case), **change)
    with pytest.raises(CodegenError, match="cannot take tiles in turn"):
        check_schedule(schedule, ir)
    with pytest.raises(CodegenError, match="cannot take tiles in turn"):
        emit(ir, schedule)
