"""The kernels of block linears in Triton's interpreter, over buffers that start as NaN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_compile.codegen.linear.emitter import EMITTER
from monarch_compile.codegen.linear.launch import bucketed, canonical, launch
from monarch_compile.codegen.linear.schedule import Schedule, check_schedule, choose_schedule
from monarch_compile.codegen.linear.search import bound, inputs, sized, small, variants
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.errors import CodegenError
from monarch_compile.linear.ir import (
    ACTIVATIONS,
    BLAST,
    FUSED,
    INTERLEAVED,
    KERNEL_FORMS,
    KINDS,
    MONARCH,
    ORDERS,
    SPLIT,
    STAGED,
    BlockLinear,
    FormedLinear,
    LinearGradients,
)
from tests.linear.kernel.problems import CPU, HALF, error_of, formed, gradient_errors

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
WAYS = [(MONARCH, form) for form in KERNEL_FORMS] + [(BLAST, STAGED)]
FIRST, LAST = Tiling(16, 16, 4, 1), Tiling(16, 32, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output_order", ORDERS)
@pytest.mark.parametrize(("kind", "form"), WAYS)
def test_every_form_dtype_and_order(kind: str, form: str, dtype: torch.dtype, output_order: str) -> None:
    ir = formed(form, kind=kind, dtype=dtype, output_order=output_order)
    assert error_of(ir) < bound(ir)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_activations(form: str, activation: str) -> None:
    ir = formed(form, activation=activation, dtype=torch.float32, tokens=3)
    assert error_of(ir) < bound(ir)


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
"""in_blocks, out_blocks, P, Q and rank."""


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(WAYS), st.integers(1, 40), SIZES, st.booleans())
def test_any_sizes(way: tuple[str, str], tokens: int, sizes: tuple[int, ...], bias: bool) -> None:
    (kind, form), (ins, outs, p, q, rank) = way, sizes
    ir = FormedLinear(BlockLinear(kind, tokens, ins * p, outs * q, ins, outs, rank, HALF, bias=bias), form)
    assert error_of(ir, few_terms=True) < bound(ir)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), SIZES, st.sampled_from(ORDERS))
def test_gradients_of_any_sizes(tokens: int, sizes: tuple[int, ...], output_order: str) -> None:
    ins, outs, p, q, rank = sizes
    ir = BlockLinear(MONARCH, tokens, ins * p, outs * q, ins, outs, rank, HALF, output_order=output_order)
    assert max(gradient_errors(LinearGradients(ir), CPU, few_terms=True)) < 2.0**-10


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_is_wanted_is_computed(wanted: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    ir = LinearGradients(replace(formed(STAGED).of, dtype=dtype, bias=False), *wanted)
    program = EMITTER.program_of(ir, choose_schedule(ir), True)
    assert len(program.kernels) == 2
    assert max(gradient_errors(ir, CPU)) < (2.0**-7 if dtype is torch.bfloat16 else 2.0**-20)


@pytest.mark.parametrize(("form", "schedule"), [
    (FUSED, Schedule(Tiling(16, 16, 4, 1), 16)),
    (FUSED, Schedule(Tiling(32, 32, 4, 2), 32)),
    (FUSED, Schedule(Tiling(16, 32, 8, 3), 16)),
    (SPLIT, Schedule(Tiling(16, 16, 4, 1, 2), 16)),
    (SPLIT, Schedule(Tiling(32, 32, 4, 2, 1), 32)),
    (STAGED, Schedule(FIRST, 16, LAST, 32)),
    (STAGED, Schedule(LAST, 64, FIRST, 16)),
], ids=str)  # fmt: skip
def test_a_schedule_changes_no_result(form: str, schedule: Schedule) -> None:
    ir = formed(form)
    check_schedule(schedule, ir)
    assert error_of(ir, schedule) < bound(ir)


def test_input_blocks_that_programs_do_not_share_evenly() -> None:
    ir = formed(SPLIT, in_features=90, in_blocks=5, dtype=torch.float32)
    assert error_of(ir, Schedule(Tiling(16, 16, 4, 1, 2), 16)) < bound(ir)


@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_all_variants_of_a_search_are_legal_and_some_are_right(form: str) -> None:
    ir = formed(form, in_features=128, out_features=192, rank=16, tokens=64)
    assert sized(replace(ir, of=replace(ir.of, tokens="s0"))).tokens == 1024
    for stage in EMITTER.tuning.stages(ir):
        found = list(variants(choose_schedule(ir), stage, ir))
        assert len(found) > 40
        assert len({str(schedule) for schedule in found}) == len(found)
        for schedule in found[:: len(found) // 2]:
            assert error_of(small(ir), schedule) < bound(ir)


@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_strides_and_leading_dims(form: str) -> None:
    x, first, second, *_ = inputs(formed(form, bias=False), CPU)
    assert x is not None
    assert first is not None
    assert second is not None
    plain = launch(x, first, second, form=form)
    wide = torch.randn(23, 2 * 36).to(HALF)
    wide[:, ::2] = x
    turned = [f.transpose(0, 2).contiguous().transpose(0, 2) for f in (first, second)]
    assert torch.equal(launch(wide[:, ::2], *turned, form=form), plain)
    leading = launch(x[:20].reshape(2, 10, 36), first, second, form=form)
    assert torch.equal(leading, plain[:20].reshape(2, 10, 60))


@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_what_is_not_finite_stays_in_its_token(form: str) -> None:
    x, first, second, _, bias = inputs(formed(form), CPU)
    assert x is not None
    x[3, 7] = float("nan")
    found = launch(x, first, second, None, bias, activation="relu", form=form)  # type: ignore[arg-type]
    assert bool(found[3].isnan().all())
    assert bool(found[[*range(3), *range(4, 23)]].isfinite().all())


@pytest.mark.parametrize(
    ("form", "changes", "says"),
    [
        (FUSED, {"kind": BLAST}, "for Monarch alone"),
        (SPLIT, {"kind": BLAST}, "for Monarch alone"),
        (STAGED, {"dtype": torch.float64}, "kernels are for f16, bf16 and f32"),
        (FUSED, {"rank": 300}, "rank at most 256"),
        (STAGED, {"kind": BLAST, "in_blocks": 72, "in_features": 72}, "at most 64 input blocks"),
    ],
)
def test_no_kernels(form: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CodegenError, match=says):
        choose_schedule(formed(form, **changes))


def test_gradients_of_blast_have_no_kernels() -> None:
    with pytest.raises(CodegenError, match="of Monarch linears alone"):
        choose_schedule(LinearGradients(formed(STAGED, kind=BLAST).of))
    assert EMITTER.gradients(formed(STAGED, kind=BLAST).of) is None
    assert EMITTER.gradients(formed(STAGED).of) is not None


@pytest.mark.parametrize(
    ("form", "schedule"),
    [
        (FUSED, Schedule(Tiling(16, 16, 4, 1), 64)),
        (FUSED, Schedule(Tiling(16, 16, 4, 1), 24)),
        (FUSED, Schedule(Tiling(16, 64, 4, 1), 16)),
        (FUSED, Schedule(Tiling(16, 16, 4, 1, 2), 16)),
        (SPLIT, Schedule(Tiling(16, 16, 4, 1, 4), 16)),
        (FUSED, Schedule(FIRST, 16, LAST, 16)),
        (STAGED, Schedule(FIRST, 16)),
        (STAGED, Schedule(FIRST, 16, LAST, 24)),
    ],
    ids=str,
)
def test_bad_schedules(form: str, schedule: Schedule) -> None:
    with pytest.raises(CodegenError):
        check_schedule(schedule, formed(form))


def test_a_launcher_is_made_for_a_power_of_two_of_tokens() -> None:
    buckets = [bucketed(formed(FUSED, tokens=n).of).tokens for n in (1, 3, 64, 65, 10**6, "s0")]
    assert buckets == [1, 4, 64, 128, 8192, "M"]
    assert canonical(formed(FUSED)) == canonical(formed(FUSED, tokens=99))
    assert bucketed(formed(STAGED, output_order=INTERLEAVED)).of.output_order == INTERLEAVED


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_runs_kernels_where_they_are_asked_for(kind: str) -> None:
    """Forward and backward, with an activation, against float64."""
    from monarch_compile.linear.op import LINEAR_OP

    ir = formed(STAGED, kind=kind, dtype=torch.float32).of
    given = inputs(FormedLinear(ir, STAGED), CPU)
    own = [None if t is None else t.clone().requires_grad_() for t in given]
    wide = [None if t is None else t.double().requires_grad_() for t in given]
    y, wanted = (LINEAR_OP(*t, INTERLEAVED, "silu", form) for t, form in ((own, STAGED), (wide, "products")))
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for result in (y, wanted):
        result.square().sum().backward()
    for one, other in zip(own, wide, strict=True):
        if one is not None and other is not None:
            assert one.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
