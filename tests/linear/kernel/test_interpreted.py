"""The kernel of Monarch linears in Triton's interpreter, over buffers that start as NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_compile.codegen.launcher import Launcher
from monarch_compile.codegen.linear.launch import bucketed, canonical, launch, run
from monarch_compile.codegen.linear.schedule import Schedule, check_schedule, choose_schedule
from monarch_compile.codegen.linear.search import bound, expected, inputs, small, variants
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.errors import CodegenError
from monarch_compile.linear.ir import ACTIVATIONS, BLAST, INTERLEAVED, MONARCH, ORDERS, BlockLinear

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
HALF = torch.float16
CPU = torch.device("cpu")


def ir_of(**changes: Any) -> BlockLinear:
    """23 tokens, 2 x 3 blocks of 20 x 18 features, nothing a multiple of a tile."""
    return replace(BlockLinear(MONARCH, 23, 36, 60, 2, 3, 5, HALF, bias=True), **changes)


def error_of(ir: BlockLinear, schedule: Schedule | None = None) -> float:
    tensors = inputs(ir, CPU)
    if schedule is None:
        x, first, second, bias = tensors
        assert x is not None
        assert first is not None
        assert second is not None
        options = {"output_order": ir.output_order, "activation": ir.activation}
        found = launch(x, first, second, None, bias, **options)
    else:
        found = run(Launcher(bucketed(ir), schedule), *tensors)  # type: ignore[arg-type]
    assert found.dtype is ir.dtype
    wanted = expected(ir, tensors)
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output_order", ORDERS)
def test_every_dtype_and_order(dtype: torch.dtype, output_order: str) -> None:
    ir = ir_of(dtype=dtype, output_order=output_order)
    assert error_of(ir) < bound(ir)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    ir = ir_of(activation=activation, dtype=torch.float32)
    assert error_of(ir) < bound(ir)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40),
    st.integers(1, 20), st.booleans(),
)  # fmt: skip
def test_any_sizes(tokens: int, ins: int, outs: int, p: int, q: int, rank: int, bias: bool) -> None:
    ir = BlockLinear(MONARCH, tokens, ins * p, outs * q, ins, outs, rank, HALF, bias=bias)
    assert error_of(ir) < bound(ir)


@pytest.mark.parametrize("schedule", [
    Schedule(Tiling(16, 16, 4, 1), 16), Schedule(Tiling(32, 32, 4, 2), 32), Schedule(Tiling(16, 32, 8, 3), 16),
], ids=str)  # fmt: skip
def test_a_schedule_changes_no_result(schedule: Schedule) -> None:
    ir = ir_of()
    check_schedule(schedule, ir)
    assert error_of(ir, schedule) < bound(ir)


def test_all_variants_of_a_search_are_legal_and_some_are_right() -> None:
    ir = ir_of(in_features=128, out_features=192, rank=16, tokens=64)
    found = list(variants(choose_schedule(ir), "main", ir))
    assert len(found) > 50
    assert len({str(schedule) for schedule in found}) == len(found)
    for schedule in found[::40]:
        assert error_of(small(ir), schedule) < bound(ir)


def test_strides_and_leading_dims() -> None:
    ir = ir_of(bias=False)
    x, first, second, _ = inputs(ir, CPU)
    assert x is not None
    assert first is not None
    assert second is not None
    plain = launch(x, first, second)
    wide = torch.randn(23, 2 * 36).to(HALF)
    wide[:, ::2] = x
    turned = [f.transpose(0, 2).contiguous().transpose(0, 2) for f in (first, second)]
    assert torch.equal(launch(wide[:, ::2], *turned), plain)
    leading = launch(x[:20].reshape(2, 10, 36), first, second)
    assert torch.equal(leading, plain[:20].reshape(2, 10, 60))


def test_what_is_not_finite_stays_in_its_token() -> None:
    ir = ir_of(activation="relu")
    x, first, second, bias = inputs(ir, CPU)
    assert x is not None
    x[3, 7] = float("nan")
    found = launch(x, first, second, None, bias, activation="relu")  # type: ignore[arg-type]
    assert bool(found[3].isnan().all())
    assert bool(found[[*range(3), *range(4, 23)]].isfinite().all())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": BLAST}, "for Monarch alone"),
        ({"dtype": torch.float64}, "kernels are for f16, bf16, f32"),
        ({"rank": 300}, "rank at most 256"),
    ],
)
def test_no_kernels(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CodegenError, match=says):
        choose_schedule(ir_of(**changes))


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(Tiling(16, 16, 4, 1), 64),
        Schedule(Tiling(16, 16, 4, 1), 24),
        Schedule(Tiling(16, 64, 4, 1), 16),
        Schedule(Tiling(16, 16, 4, 1, 2), 16),
    ],
    ids=str,
)
def test_bad_schedules(schedule: Schedule) -> None:
    with pytest.raises(CodegenError):
        check_schedule(schedule, ir_of())


def test_a_launcher_is_made_for_a_power_of_two_of_tokens() -> None:
    assert [bucketed(ir_of(tokens=n)).tokens for n in (1, 3, 64, 65, 10**6, "s0")] == [1, 4, 64, 128, 8192, "M"]
    assert canonical(ir_of()) == canonical(ir_of(tokens=99))
    assert bucketed(ir_of(output_order=INTERLEAVED)).output_order == INTERLEAVED
