"""In which form the operator runs: by the number of tokens, by what is asked for, and by what has kernels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from monarch_compile.cost.devices import DEVICES
from monarch_compile.errors import CodegenError, InputError
from monarch_compile.linear import forms, selection
from monarch_compile.linear.ir import (
    BLAST,
    DENSE,
    FORMS,
    FUSED,
    KERNEL_FORMS,
    KINDS,
    MONARCH,
    PRODUCTS,
    SPLIT,
    STAGED,
    BlockLinear,
)
from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.linear.reference import dense, reference
from tests.linear.unit.test_op import tensors

H100 = DEVICES["h100"]
LAYER = BlockLinear(MONARCH, "M", 4096, 4096, 16, 16, 64, torch.float16)


def test_the_form_follows_the_number_of_tokens() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "MEASURED", (SPLIT, STAGED))
        found = forms.ranges.__wrapped__(replace(LAYER, rank=32), H100, True)
    assert len(found) == 2
    assert found[0][1] == SPLIT
    assert found[-1] == (math.inf, STAGED)
    assert forms.form_of(found, 1) == SPLIT
    assert forms.form_of(found, 10**6) == STAGED
    assert forms.in_words(found).endswith(f"{STAGED} beyond")
    assert forms.in_words(((math.inf, FUSED),)) == FUSED


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 17), st.sampled_from(KINDS), st.sampled_from([8, 64, 256, 1024]), st.sampled_from(["h100", "h200"])
)
def test_what_is_chosen_is_predicted_to_be_nearly_the_fastest(power: int, kind: str, rank: int, device: str) -> None:
    ir = replace(LAYER, kind=kind, rank=rank)
    chosen = forms.form_of(forms.ranges(ir, DEVICES[device], True), 1 << power)
    sized = replace(ir, tokens=1 << power)
    others = (*(form for form in forms.kernel_forms(ir) if form in forms.MEASURED), PRODUCTS)
    least = min(forms.seconds(sized, form, DEVICES[device]) for form in others)
    assert forms.seconds(sized, chosen, DEVICES[device]) <= forms.SWITCH * least


def test_few_blocks_leave_the_split_form_too_few_programs() -> None:
    gpt2 = replace(LAYER, in_features=768, out_features=3072, in_blocks=4, out_blocks=4, rank=72)
    assert forms.form_of(forms.ranges(gpt2, H100, True), 1) == STAGED


@pytest.mark.parametrize("tokens", [1, 64, 1 << 17])
def test_what_was_not_measured_to_be_fast_is_not_chosen(tokens: int) -> None:
    for ir in (LAYER, replace(LAYER, rank=256)):
        assert forms.form_of(forms.ranges(ir, H100, True), tokens) in (STAGED, PRODUCTS)
        assert forms.form_of(forms.ranges(ir, H100, True, forms.KERNELS), tokens) == STAGED


@pytest.mark.parametrize("request_", [forms.AUTO, forms.KERNELS])
def test_without_kernels_products_run(request_: str) -> None:
    assert forms.ranges(LAYER, H100, False, request_) == ((math.inf, PRODUCTS),)
    wide = replace(LAYER, dtype=torch.float64)
    assert forms.ranges(wide, H100, True, request_) == ((math.inf, PRODUCTS),)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, KERNEL_FORMS),
        ({"rank": 257}, (STAGED,)),
        ({"kind": BLAST}, (STAGED,)),
        ({"kind": BLAST, "in_blocks": 128}, ()),
        ({"dtype": torch.float64}, ()),
    ],
)
def test_which_forms_have_kernels(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert forms.kernel_forms(replace(LAYER, **changes)) == expected


@pytest.mark.parametrize("form", FORMS)
def test_a_form_by_its_name_is_kept(form: str) -> None:
    x, first, second, coupling, _ = tensors(MONARCH, dtype=torch.float32)
    assert x is not None
    assert first is not None
    assert second is not None
    assert selection.form_for(x, first, second, coupling, form) == form


def test_on_a_cpu_and_of_no_tokens_products_run() -> None:
    for tokens in ((5,), (0,), (2, 0)):
        x, first, second, coupling, _ = tensors(MONARCH, tokens, dtype=torch.float32)
        assert x is not None
        assert first is not None
        assert second is not None
        assert selection.form_for(x, first, second, coupling, forms.KERNELS) == PRODUCTS
        assert not selection.has_gradient_kernels(x, x, first, second, coupling, forms.AUTO)


def test_offsets_beyond_32_bits_are_left_to_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "has_kernels", lambda device: True)
    monkeypatch.setattr(forms, "resolved", lambda *rest: STAGED)
    x, first, second, _, _ = tensors(MONARCH, dtype=torch.float32)
    assert x is not None
    assert first is not None
    assert second is not None
    assert selection.form_for(x, first, second, None, forms.AUTO) == STAGED
    monkeypatch.setattr(selection, "MAX_OFFSET", 59)
    grad = torch.empty(5, 15)
    assert selection.has_gradient_kernels(grad, x, first, second, None, forms.AUTO)
    assert not selection.has_gradient_kernels(grad.T.contiguous().T, x, first, second, None, forms.AUTO)
    monkeypatch.setattr(selection, "MAX_OFFSET", 6)
    assert selection.form_for(x, first, second, None, forms.AUTO) == PRODUCTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_dense_form_means_the_same(kind: str, activation: str) -> None:
    given_tensors = tensors(kind, (3, 5))
    wanted = reference(*given_tensors, activation=activation)  # type: ignore[arg-type]
    torch.testing.assert_close(dense(*given_tensors, activation=activation), wanted)  # type: ignore[arg-type]
    torch.testing.assert_close(LINEAR_OP(*given_tensors, "blocked", activation, DENSE), wanted)


def test_what_is_asked_for_and_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="form must be one of auto, kernels, split"):
        LINEAR_OP(*tensors(MONARCH), "blocked", "none", "quick")
    with pytest.raises(CodegenError):
        LINEAR_OP(*tensors(MONARCH), "blocked", "none", FUSED)  # float64, on a CPU


def test_of_symbolic_tokens_only_the_range_is_guarded_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator and its gradients on fake tensors of a CUDA device, from 300 tokens."""
    monkeypatch.setattr(
        forms, "_ranges_on", lambda ir, device, request: ((16, SPLIT), (1024, FUSED), (math.inf, STAGED))
    )
    monkeypatch.setattr(forms, "has_kernels", lambda device: True)
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    dims = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    tokens = mode.from_tensor(torch.zeros(300, 64), symbolic_context=dims).shape[0]
    options = {"dtype": torch.float16, "device": "cuda"}
    with mode:
        x, first, second = (torch.empty(s, **options) for s in ((tokens, 64), (4, 4, 5, 16), (4, 16, 4, 5)))
        y = LINEAR_OP(x, first, second, None, None, "blocked", "none", "auto")
        dx, _, unwanted = torch.ops.monarch_compile.block_linear_gradients(
            y, x, first, second, "blocked", True, True, False
        )
    assert (str(dx.shape), unwanted.numel()) == (str(x.shape), 0)
    symbol = tokens.node.expr
    assert {guard.expr for guard in env.guards} == {symbol > 16, symbol <= 1024}
