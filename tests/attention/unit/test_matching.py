"""Every spelling of attention is rewritten to one IR; near misses are left alone, with a reason."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.capture import decisions_of, run_passes
from support.programs import AFTER, MASKS, PRODUCTS, SCALES, SOFTMAXES, VALUES, Program
from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention

PROGRAMS = st.builds(
    Program,
    product=st.sampled_from(sorted(PRODUCTS)),
    scale=st.sampled_from(sorted(SCALES)),
    mask=st.sampled_from(sorted(MASKS)),
    softmax=st.sampled_from(sorted(SOFTMAXES)),
    after=st.sampled_from(sorted(AFTER)),
    values=st.sampled_from(sorted(VALUES)),
)
BASE = Program("matmul", "mul", "none", "functional", "nothing", "matmul")
ONE_STEP_AWAY = [
    *(Program(name, "mul", "masked_fill", "functional", "nothing", "matmul") for name in PRODUCTS),
    *(Program("matmul", name, "none", "functional", "nothing", "matmul") for name in SCALES),
    *(Program("matmul", "mul", name, "functional", "nothing", "matmul") for name in MASKS),
    *(Program("matmul", "mul", "none", name, "nothing", "matmul") for name in SOFTMAXES),
    *(Program("matmul", "mul", "none", "functional", name, "matmul") for name in AFTER),
    *(Program("matmul", "mul", "masked_fill", "functional", "nothing", name) for name in VALUES),
]


def _tensors(batch: int, heads: int, seq_len: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, seq_len, dim, generator=generator) for _ in range(3))
    visible = torch.rand(batch, seq_len, generator=generator) > 0.3
    visible[:, 0] = True
    return q, k, v, visible


def _assert_lowered(program: Program, batch: int, heads: int, seq_len: int, dim: int) -> None:
    tensors = _tensors(batch, heads, seq_len, dim)
    output, (result,) = run_passes(program, *tensors)
    (decision,) = result.decisions
    assert (decision.status, decision.code) == ("lowered", "lowered"), decision
    expected = MonarchAttention(
        batch=batch,
        num_heads=heads,
        num_kv_heads=heads,
        seq_len_q=seq_len,
        seq_len_k=seq_len,
        head_dim=dim,
        value_dim=dim,
        dtype=torch.float32,
        form=Form(1, window=1),
        scale=decision.ir.scale,
        mask=MaskKind.NONE if program.mask == "none" else MaskKind.KEY_PADDING,
    )
    assert decision.ir == expected
    assert decision.ir.scale == pytest.approx(1 / math.sqrt(dim))
    assert not [n for n in result.after.graph.nodes if "softmax" in str(n.target)]
    torch.testing.assert_close(output, program(*_tensors(batch, heads, seq_len, dim)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("program", ONE_STEP_AWAY, ids=lambda p: "-".join(vars(p).values()))
def test_each_spelling_is_lowered(program: Program) -> None:
    _assert_lowered(program, 2, 3, 7, 4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PROGRAMS, st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.sampled_from([1, 4, 5]))
def test_random_spellings_give_the_same_ir(program: Program, batch: int, heads: int, seq_len: int, dim: int) -> None:
    _assert_lowered(program, batch, heads, seq_len, dim)


@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (6, 7, 4), (7, 4)])
def test_sdpa_of_any_rank(shape: tuple[int, ...]) -> None:
    q, k, v = (torch.randn(shape) for _ in range(3))
    output, (result,) = run_passes(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), q, k, v)
    assert [d.status for d in result.decisions] == ["lowered"]
    torch.testing.assert_close(output, F.scaled_dot_product_attention(q, k, v, scale=0.3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_sdpa_with_a_key_padding_mask(kind: str) -> None:
    q, k, v, visible = _tensors(2, 3, 7, 4)

    def fn(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        mask = visible[:, None, None, :].expand(2, 1, 7, 7)
        if kind == "float":
            mask = torch.zeros(2, 1, 7, 7).masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    output, (result,) = run_passes(fn, q, k, v, visible)
    assert [(d.status, d.mask) for d in result.decisions] == [("lowered", "key_padding")]
    torch.testing.assert_close(output, fn(q, k, v, visible), rtol=1e-5, atol=1e-5)


def test_broadcast_keys_are_not_copied() -> None:
    """Multi-query attention written by broadcasting: k and v are expanded views."""
    q, k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 1, 7, 4), torch.randn(2, 1, 7, 4)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * 0.5, -1) @ v

    output, (result,) = run_passes(fn, q, k, v)
    assert [d.status for d in result.decisions] == ["lowered"]
    torch.testing.assert_close(output, fn(q, k, v), rtol=1e-5, atol=1e-5)


def test_operands_are_taken_where_they_lie() -> None:
    """A scale before the heads are split, and copies after, are taken off: the kernels read the projection itself."""

    def fn(x: Tensor) -> Tensor:
        q, k, v = (x * 0.25).view(2, 7, 3, 4), x.view(2, 7, 3, 4), x.view(2, 7, 3, 4)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k.clone(), v, scale=1.0).transpose(1, 2).reshape(2, 7, 12)

    x = torch.randn(2, 7, 12)
    output, (result,) = run_passes(fn, x)
    (decision,) = result.decisions
    assert decision.ir is not None
    assert decision.ir.scale == 0.25
    left = {str(n.target) for n in result.after.graph.nodes if n.op == "call_function"}
    assert not left & {"aten.mul.Tensor", "aten.clone.default", "aten.contiguous.default"}
    torch.testing.assert_close(output, fn(x), rtol=1e-5, atol=1e-5)


def test_values_of_another_width() -> None:
    q, k, v = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 6)
    output, (result,) = run_passes(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, q, k, v)
    assert result.decisions[0].ir is not None
    assert result.decisions[0].ir.value_dim == 6
    torch.testing.assert_close(output, torch.softmax(q @ k.mT, -1) @ v, rtol=1e-5, atol=1e-5)


def test_output_viewed_after_the_site() -> None:
    """The lowered output has other strides than the exact one: a view that was legal must stay so."""
    q, k, v, _ = _tensors(2, 3, 7, 4)
    output, (result,) = run_passes(lambda q, k, v: (torch.softmax(q @ k.mT, -1) @ v).view(6, 28), q, k, v)
    assert result.num_lowered == 1
    torch.testing.assert_close(output, (torch.softmax(q @ k.mT, -1) @ v).view(6, 28), rtol=1e-5, atol=1e-5)


# ---- near misses: each is left exact, and says why -------------------------------------------------------------------


def _softmax_over_queries(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=-2) @ v


def _softmax_over_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, dim=1) @ v


def _active_dropout(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=True) @ v


def _active_dropout_in_place(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.dropout(torch.softmax(q @ k.mT, -1), 0.5, training=True, inplace=True) @ v


def _active_sdpa_dropout(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def _probs_returned(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    probs = torch.softmax(q @ k.mT, -1)
    return probs @ v, probs


def _scores_returned(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT
    return torch.softmax(scores, -1) @ v, scores.sum()


def _softcap(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(30 * torch.tanh(q @ k.mT / 30), -1) @ v


def _relu(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(torch.relu(q @ k.mT), -1) @ v


def _probs_modified(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT, -1) * 0.5) @ v


def _tensor_scale(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * m.sum(), -1) @ v


def _weak_fill(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(~m[:, None, None, :], -5.0), -1) @ v


def _positive_fill(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).masked_fill(~m[:, None, None, :], -1e9) * -1.0, -1) @ v


def _scores_flattened(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT).view(2, 3, 49), -1).view(2, 3, 7, 7) @ v


def _transposed_values(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return v.mT @ torch.softmax(q @ k.mT, -1)


def _general_bias(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + (q @ k.mT).sin(), -1) @ v


def _causal(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _causal_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    triangle = torch.ones(7, 7, dtype=torch.bool).tril()
    return torch.softmax((q @ k.mT).masked_fill(~triangle, float("-inf")), -1) @ v


def _causal_and_padding(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    place = torch.arange(7)
    keep = (place[None, :] <= place[:, None])[None, None] & m[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def _window_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    place = torch.arange(7)
    near = (place[:, None] - place[None, :] < 3) & (place[None, :] <= place[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=near)


def _query_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(m[:, None, :, None] | m[:, None, None, :]))


def _opaque_float_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q.sum((1, 3))[:, None, None, :])


def _key_bias(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + torch.arange(7.0) * 0.1, -1) @ v


def _mutated_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    hidden = ~m
    view = hidden[:, None, None, :]
    hidden[:, 3] = True
    return torch.softmax((q @ k.mT).masked_fill(view, float("-inf")), -1) @ v


def _mutated_scores(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.clamp_(-1.0, 1.0)
    return torch.softmax(scores, -1) @ v


def _mutated_query(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scaled = q * 0.5
    q.add_(5.0)
    return torch.softmax(scaled @ k.mT, -1) @ v


def _cross(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, :4], k, v)


def _gqa(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v, enable_gqa=True)


def _strided_output(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (torch.softmax(q @ k.mT, -1) @ v).as_strided((2, 3), (84, 28))


def _mixed_dtypes(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1).to(torch.bfloat16) @ v.to(torch.bfloat16)


NEAR_MISSES = {
    _softmax_over_queries: "softmax_dim",
    _softmax_over_heads: "softmax_dim",
    _active_dropout: "dropout_active",
    _active_dropout_in_place: "dropout_active",
    _active_sdpa_dropout: "dropout_active",
    _probs_returned: "probs_reused",
    _scores_returned: "scores_reused",
    _softcap: "softcap",
    _relu: "scores_op",
    _probs_modified: "probs_op",
    _tensor_scale: "scale_not_constant",
    _weak_fill: "mask_fill",
    _positive_fill: "mask_fill",
    _transposed_values: "values_layout",
    _general_bias: "mask_opaque",
    _causal: "mask_causal",
    _causal_mask: "mask_causal",
    _causal_and_padding: "mask_causal",
    _window_mask: "mask_sliding_window",
    _query_mask: "mask_general",
    _mutated_mask: "mutation",
    _mutated_scores: "scores_op",
    _mutated_query: "mutation",
    _cross: "cross_attention",
    _gqa: "gqa",
    _strided_output: "as_strided",
    _mixed_dtypes: "dtype",
}


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda f: f.__name__.strip("_"))
def test_near_miss_stays_exact_with_its_reason(fn: object) -> None:
    torch.manual_seed(0)
    tensors = _tensors(2, 3, 7, 4)
    output, (result,) = run_passes(fn, *(t.clone() for t in tensors))
    assert result.num_lowered == 0
    codes = [d.code for d in result.decisions]
    assert codes == [NEAR_MISSES[fn]], [(d.code, d.reason) for d in result.decisions]
    assert all(d.reason and d.node and "test_matching.py" in d.name for d in result.decisions)
    if "dropout" not in codes[0]:
        torch.testing.assert_close(output, fn(*(t.clone() for t in tensors)))


def test_a_private_write_is_made_functional() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        shifted = q + 1
        scaled = shifted * 0.5
        shifted.add_(5.0)
        return torch.softmax(scaled @ k.mT, -1) @ v, shifted

    q, k, v, _ = _tensors(2, 3, 7, 4)
    output, (result,) = run_passes(fn, q, k, v)
    assert result.num_lowered == 1
    torch.testing.assert_close(output, fn(q, k, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fn", [_scores_flattened, lambda x, w, *_: torch.softmax(x @ w.mT, -1).argmax(-1)])
def test_a_softmax_that_is_no_attention_is_no_site(fn: object) -> None:
    assert decisions_of(fn, *_tensors(2, 3, 7, 4)) == []


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_fused_layer_is_opened(norm_first: bool, padded: bool) -> None:
    """nn.TransformerEncoder's eval fast path is one op, which is traced as what it stands for."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first).eval()
    mask = torch.arange(7) >= torch.tensor([[7], [4]]) if padded else None
    x = torch.randn(2, 7, 8)
    with torch.no_grad():
        output, (result,) = run_passes(lambda x: layer(x, src_key_padding_mask=mask), x)
        expected = layer(x, src_key_padding_mask=mask)
    assert [(d.code, d.mask) for d in result.decisions] == [("lowered", "key_padding" if padded else "none")]
    kept = ~mask if padded else torch.ones(2, 7, dtype=torch.bool)
    torch.testing.assert_close(output[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_a_fused_attention_is_reported() -> None:
    """The fused op that also gives its weights stays as it is, and is not passed over."""
    weight, bias, out, x = torch.randn(24, 8), torch.randn(24), torch.randn(8, 8), torch.randn(2, 7, 8)

    def fn(x: Tensor) -> Tensor:
        return torch._native_multi_head_attention(x, x, x, 8, 2, weight, bias, out, bias[:8], None, True)[0]

    with torch.no_grad():
        (decision,) = decisions_of(fn, x)
    assert (decision.status, decision.code) == ("exact", "fused_layer")


def test_short_sites_stay_exact_on_request() -> None:
    tensors = _tensors(2, 3, 7, 4)
    (decision,) = decisions_of(BASE, *tensors, min_seq_len=8)
    assert decision.code == "min_seq_len"
    (decision,) = decisions_of(BASE, *tensors, policy="never")
    assert decision.code == "policy_never"
    (decision,) = decisions_of(BASE, *tensors, policy="auto")
    assert decision.code == "cost_exact_wins"
