"""What gradients are made from: logsumexps of the reference, its vjp, and the operators' registrations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from monarch_compile.attention import gradients
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.ir import differentiated_by_kernels
from monarch_compile.attention.op import attention, attention_backward, attention_with_lse
from monarch_compile.attention.reference import reference, reference_with_lse
from tests.support.backward_kernels import backward_kernels  # noqa: F401

SEQ_LEN = 19
ARGUMENTS = (0.5, 4, 1, "identity", "post", [1], 2, None, "box", False, 0, None, False)
FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "window": {"window": 1},
    "chosen": {"chosen": 1, "window": 0, "prefix": 2},
    "causal": {"chosen": 1, "causal": True},
    "prefix, padded before": {"prefix": 3, "pad": "pre"},
    "window and prefix": {"window": 1, "prefix": 1},
    "two iterations": {"num_iters": 2, "window": 0},
    "mean start": {"init": "mean"},
    "tiles": {"tile": (2, 2), "grid": (3, 6), "prefix": 1, "window": 1, "window_shape": "plus"},
    "text after an image": {"tile": (2, 2), "grid": (2, 7), "prefix": 5, "prefix_at_end": True, "window": 0},
    "one block": {"block_size": 64},
    "window of all": {"window": 9, "prefix": 2},
}


def tensors(dtype: torch.dtype = torch.float64, heads: int = 2, kv_heads: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, SEQ_LEN, 3), (2, kv_heads, SEQ_LEN, 3), (2, kv_heads, SEQ_LEN, 2)]
    return [torch.randn(shape, dtype=dtype, generator=generator) for shape in shapes]


def masks() -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(2, SEQ_LEN, generator=generator) > 0.4
    bias = torch.randn(2, SEQ_LEN, dtype=torch.float64, generator=generator).masked_fill(~visible, float("-inf"))
    return {"none": None, "padding": visible, "bias": bias}


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("form", FORMS)
def test_the_logsumexp_is_that_of_what_a_row_weighs(form: str, mask: str) -> None:
    """That of the exact scores where every key is in an exact group; else no more: a far block's entry never exceeds
    the maximum that it stands for."""
    q, k, v = tensors()
    options = {"scale": 0.5, "block_size": 4, **FORMS[form]}
    output, lse = reference_with_lse(q, k, v, masks()[mask], **options)
    assert torch.equal(output, reference(q, k, v, masks()[mask], **options))
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float64)
    exact = torch.logsumexp(scores(q, k, masks()[mask]), -1)
    if form in ("one block", "window of all"):
        torch.testing.assert_close(lse, exact)
    else:
        assert (lse <= exact + 1e-9).all()
        assert (lse < exact - 1e-4).any()


def scores(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    found = 0.5 * q @ k.mT
    if mask is None:
        return found
    if mask.dtype == torch.bool:
        return found.masked_fill(~mask[:, None, None], float("-inf"))
    return found + (mask - mask.amax(-1, keepdim=True))[:, None, None]


@pytest.mark.parametrize("form", FORMS)
def test_a_row_that_sees_no_key_has_no_weight(form: str) -> None:
    visible = torch.ones(2, SEQ_LEN, dtype=torch.bool)
    visible[1] = False
    lse = reference_with_lse(*tensors(), visible, **{"scale": 0.5, "block_size": 4, **FORMS[form]})[1]
    assert (lse[1] == float("-inf")).all()
    assert lse[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_logsumexp_is_kept_in_float32(dtype: torch.dtype) -> None:
    output, lse = reference_with_lse(*tensors(dtype), scale=0.5, block_size=4, window=1)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("form", ["window and prefix", "two iterations", "tiles"])
@pytest.mark.parametrize("mask", ["padding", "bias"])
def test_the_gradients_of_the_reference_are_those_of_differences(form: str, mask: str) -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    options, given = {"scale": 0.5, "block_size": 4, **FORMS[form]}, masks()[mask]
    if mask == "bias":
        bias = torch.randn(2, SEQ_LEN, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *x: reference(*x, **options), (q, k, v, bias), fast_mode=True)
    else:
        assert torch.autograd.gradcheck(lambda *x: reference(*x, given, **options), (q, k, v), fast_mode=True)


@pytest.mark.parametrize(
    "check",
    [
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        pytest.param("test_aot_dispatch_dynamic", marks=pytest.mark.nightly),
    ],
)
def test_the_operator_is_registered_as_torch_wants_it(check: str) -> None:
    given = [x.requires_grad_() for x in tensors(torch.float32)]
    torch.library.opcheck(attention_with_lse, (*given, masks()["padding"], *ARGUMENTS), test_utils=check)


def test_both_operators_lie_alike_in_memory() -> None:
    given = tensors(torch.float32)
    for mode in (FakeTensorMode(), torch.no_grad()):
        with mode:
            own = [mode.from_tensor(x) for x in given] if isinstance(mode, FakeTensorMode) else given
            plain, (output, lse) = attention(*own, None, *ARGUMENTS), attention_with_lse(*own, None, *ARGUMENTS)
        assert (output.shape, output.stride(), output.dtype) == (plain.shape, plain.stride(), plain.dtype)
        assert lse.shape == plain.shape[:3]


def test_the_logsumexp_asks_for_no_gradient() -> None:
    output, lse = attention_with_lse(*(x.requires_grad_() for x in tensors()), None, *ARGUMENTS)
    assert output.requires_grad
    assert not lse.requires_grad


def test_autocast_does_not_reach_into_the_operators(backward_kernels: list[str]) -> None:  # noqa: F811
    given = [x.requires_grad_() for x in tensors(torch.float32)]
    output, _ = attention_with_lse(*given, None, *ARGUMENTS)
    expected = torch.autograd.grad(output.sum(), given)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention_with_lse(*given, None, *ARGUMENTS)
        found = torch.autograd.grad(output.sum(), given)
    assert backward_kernels.count("backward") == 2
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("trains", "options", "launches"), [
    (True, {}, ["forward", "backward"]),
    (False, {}, []),
    (True, {"num_iters": 2}, []),
    (True, {"init": "mean"}, []),
    (True, {"block_size": 64}, []),
])  # fmt: skip
def test_eager_calls_keep_what_kernels_read_where_a_gradient_is_wanted(
    backward_kernels: list[str],  # noqa: F811
    trains: bool,
    options: dict[str, Any],
    launches: list[str],
) -> None:
    q, k, v = (x.requires_grad_(trains) for x in tensors())
    output = monarch_attention(q, k, v, **{"block_size": 4, **options})
    if trains:
        output.sum().backward()
        assert q.grad is not None
    assert backward_kernels == launches


def test_the_codegen_agrees_on_which_forms_have_backward_kernels() -> None:
    kernels = pytest.importorskip("monarch_compile.codegen.attention.gradients")
    for num_iters, init, window, prefix, cross in itertools.product(
        (1, 2), ("identity", "mean"), (None, 0, 1), (0, 16, 17), (False, True)
    ):
        form = Form(4, num_iters, init, window=window, prefix=prefix)
        refused = kernels.backward_refusal(form, cross) is not None
        assert refused is not differentiated_by_kernels(form, is_cross=cross), form


def test_on_cuda_the_operators_have_the_shapes_and_strides_of_the_others() -> None:
    pytest.importorskip("monarch_compile.codegen.attention.gradients")
    pytest.importorskip("triton")
    arguments = (*ARGUMENTS[:6], 0, *ARGUMENTS[7:])  # rows of a prefix would ask for a device
    with FakeTensorMode():
        given = [torch.empty(x.shape, dtype=torch.bfloat16, device="cuda") for x in tensors()]
        assert gradients.run_on_kernels(given[0], given[1], ARGUMENTS)
        assert not gradients.run_on_kernels(given[0].double(), given[1].double(), ARGUMENTS)
        assert not gradients.run_on_kernels(given[0], given[1], (0.5, 64, *ARGUMENTS[2:]))
        plain, (output, lse) = attention(*given, None, *arguments), attention_with_lse(*given, None, *arguments)
        found = attention_backward(output, *given, None, output, lse, *arguments)
    assert (output.shape, output.stride(), output.dtype) == (plain.shape, plain.stride(), plain.dtype)
    assert (lse.shape, lse.dtype) == (plain.shape[:3], torch.float32)
    assert [(x.shape, x.dtype) for x in found[:3]] == [(x.shape, x.dtype) for x in given]
    assert found[3].shape == (0,)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_on_cuda_chosen_blocks_have_the_shape_and_strides_of_the_reference(causal: bool, prefix: int) -> None:
    pytest.importorskip("triton")
    arguments = (*ARGUMENTS[:6], prefix, *ARGUMENTS[7:10], 2, None, causal)
    given = tensors()
    expected = attention(*given, None, *arguments)
    with FakeTensorMode():
        fake = [torch.empty(x.shape, dtype=torch.bfloat16, device="cuda") for x in given]
        assert not gradients.run_on_kernels(fake[0], fake[1], arguments)
        if prefix and not causal:  # rows of a prefix would ask for a device
            return
        found = attention(*fake, None, *arguments)
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())
