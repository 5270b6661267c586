"""Causal attention through the backend and its doors: what option `causal` lowers, and what stays exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of, run_passes
from torch import Tensor

import monarch_compile
from monarch_compile.attention.candidates import forms_that_pay
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import cost_refusal
from monarch_compile.calibration.plan import Plan, SitePlan
from monarch_compile.calls import DEVICE_ALONE
from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import DEVICES
from monarch_compile.errors import ConfigError
from monarch_compile.family import Occurrence
from monarch_compile.integrations import replace_sdpa

N = 20
H100 = "h100"
OPTIONS = {"causal": True, "block_size": 4, "chosen": 1, "window": 1, "prefix": 2}
FORM = {name: OPTIONS[name] for name in ("block_size", "chosen", "window", "prefix")}


def tensors(heads: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, N, 8, generator=generator)
    k, v = (torch.randn(2, 2, N, 8, generator=generator) for _ in range(2))
    return q, k, v, torch.rand(2, N, generator=generator) > 0.3


def _places() -> tuple[Tensor, Tensor]:
    place = torch.arange(N)
    return place[:, None], place[None, :]


def _by_flag(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _by_hand(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    later = torch.ones(N, N, dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.mT * 8**-0.5).masked_fill(later, float("-inf")), -1) @ v


def _added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((N, N), float("-inf")).triu(1))


def _strictly_less(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys < rows + 1)


def _grouped(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _with_padding(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(keys <= rows) & m[:, None, None, :])


def _with_padding_apart(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    scores = (q @ k.mT * 8**-0.5).masked_fill(keys > rows, float("-inf"))
    return torch.softmax(scores.masked_fill(~m[:, None, None, :], float("-inf")), -1) @ v


def _with_padding_added(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    mask = torch.where((keys <= rows) & m[:, None, None, :], 0.0, torch.finfo(q.dtype).min)
    return torch.softmax(q @ k.mT * 8**-0.5 + mask, -1) @ v


def _of_scores_swapped(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    keys, rows = _places()
    keep = (keys <= rows) & m[:, None, :, None]
    return torch.softmax((k @ q.mT * 8**-0.5).masked_fill(~keep, float("-inf")), -2).mT @ v


LOWERED = {
    _by_flag: False,
    _by_hand: False,
    _added: False,
    _strictly_less: False,
    _grouped: False,
    _with_padding: True,
    _with_padding_apart: True,
    _with_padding_added: True,
    _of_scores_swapped: True,
}
"""Spellings, and whether the mask hides keys beside the later ones."""


@pytest.mark.parametrize("fn", LOWERED, ids=lambda fn: fn.__name__.strip("_"))
def test_lowered_where_the_option_is_given(fn: Any) -> None:
    q, k, v, m = tensors(4 if fn is _grouped else 2)
    output, (result,) = run_passes(fn, q, k, v, m, **OPTIONS)
    assert [d.code for d in result.decisions] == ["lowered"], [(d.code, d.reason) for d in result.decisions]
    ir = result.decisions[0].ir
    assert ir.is_causal
    assert ir.form.chosen == 1
    padding = ~m if LOWERED[fn] else None
    expected = monarch_attention(q, k, v, causal=True, key_padding_mask=padding, **FORM)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    (decision,) = decisions_of(fn, q, k, v, m, block_size=4)
    assert decision.code == "mask_causal"


@pytest.mark.parametrize("fn", LOWERED, ids=lambda fn: fn.__name__.strip("_"))
def test_all_blocks_chosen_gives_what_eager_gives(fn: Any) -> None:
    q, k, v, m = tensors(4 if fn is _grouped else 2)
    m[:, 0] = True  # eager gives NaN where a row sees no key
    output, (result,) = run_passes(fn, q, k, v, m, **{**OPTIONS, "chosen": N})
    assert result.num_lowered == 1
    torch.testing.assert_close(output, fn(q, k, v, m), rtol=1e-5, atol=1e-5)


def _one_before(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(keys <= rows - 1) | (keys == 0))


def _strictly_before(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    return torch.softmax((q @ k.mT).masked_fill(keys >= rows, -1e9), -1) @ v


def _one_after(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keys <= rows + 1)


def _sliding(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(keys <= rows) & (rows - keys < 5))


def _after_a_prefix(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    rows, keys = _places()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(keys <= rows) | (keys < 3))


def _one_query(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, :1], k, v)


def _causal_cross(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, :7], k, v, is_causal=True)


NEAR_MISSES = {
    _strictly_before: "mask_causal",
    _one_before: "mask_prefix_causal",
    _one_after: "mask_sliding_window",
    _sliding: "mask_sliding_window",
    _after_a_prefix: "mask_prefix_causal",
    _one_query: "single_query",
    _causal_cross: "cross_attention",
}


@pytest.mark.parametrize("fn", NEAR_MISSES, ids=lambda fn: fn.__name__.strip("_"))
def test_near_misses_stay_exact(fn: Any) -> None:
    q, k, v, m = tensors()
    output, (result,) = run_passes(fn, q, k, v, m, **OPTIONS)
    assert [d.code for d in result.decisions] == [NEAR_MISSES[fn]]
    torch.testing.assert_close(output, fn(q, k, v, m))


def test_unequal_lengths_stay_exact_though_cross_attention_may_be_lowered() -> None:
    (decision,) = decisions_of(_causal_cross, *tensors(), **OPTIONS, cross_attention=True)
    assert decision.code == "mask_causal"
    assert "the first query sees the first alone" in decision.reason


@pytest.mark.parametrize("wrong", [{"num_iters": 2}, {"init": "mean"}])
def test_other_iterations_stay_exact(wrong: dict[str, Any]) -> None:
    (decision,) = decisions_of(_by_flag, *tensors(), causal=True, **wrong)
    assert decision.code == "mask_causal"
    assert "num_iters=1 and init='identity'" in decision.reason
    with pytest.raises(ConfigError, match="'chosen' needs num_iters=1 and init='identity'"):
        MonarchConfig(chosen=1, **wrong)


def test_training_stays_exact() -> None:
    q, k, v, m = tensors()
    options = {"policy": "always", **OPTIONS}
    report = monarch_compile.explain(lambda q: _by_flag(q, k, v, m), q.requires_grad_(), options=options)
    assert [site.code for site in report.sites] == ["mask_causal"]
    assert "in training" in report.sites[0].reason
    with torch.no_grad():
        report = monarch_compile.explain(lambda q: _by_flag(q, k, v, m), q, options=options, measure=True)
    assert [site.code for site in report.sites] == ["lowered"]
    assert 0 < report.sites[0].error < 1


def test_the_error_is_against_causal_attention() -> None:
    q, k, v, m = tensors()
    options = {"policy": "always", **OPTIONS, "chosen": N}
    for fn in (_by_flag, _with_padding):
        m[:, 0] = True
        with torch.no_grad():
            report = monarch_compile.explain(lambda *x, fn=fn: fn(*x), q, k, v, m, options=options, measure=True)
        assert report.sites[0].error < 1e-5


def test_a_plan_lowers_without_the_option() -> None:
    q, k, v, m = tensors()
    (decision,) = decisions_of(_by_flag, q, k, v, m)
    site = SitePlan(decision.name, (2, 8, 8), Form(4, window=1, prefix=2, chosen=1))
    plan = Plan((site,), ((decision.name,),), 0.1, 0.1, 1, 1, "cpu")
    output, (result,) = run_passes(_by_flag, q, k, v, m, plan=plan)
    assert result.num_lowered == 1
    torch.testing.assert_close(output, monarch_attention(q, k, v, causal=True, **FORM))


def test_eager_calls() -> None:
    q, k, v, _ = tensors(4)
    with replace_sdpa(policy="always", **OPTIONS) as context:
        found = _grouped(q, k, v, q)
        F.scaled_dot_product_attention(q[:, :, :1], k, v, is_causal=True, enable_gqa=True)
        F.scaled_dot_product_attention(q.requires_grad_(), k, v, is_causal=True, enable_gqa=True)
    assert (context.lowered, context.exact) == (1, 2)
    assert set(context.reasons) == {"single_query", "mask_causal"}
    torch.testing.assert_close(found, monarch_attention(q, k, v, causal=True, **FORM))


def test_compiled_by_inductor() -> None:
    q, k, v, m = tensors()
    options = {"policy": "always", "strict": True, **OPTIONS}
    compiled = torch.compile(lambda *x: _with_padding(*x), backend="monarch", options=options)
    with torch.no_grad():
        found = compiled(q, k, v, m)
    expected = monarch_attention(q, k, v, causal=True, key_padding_mask=~m, **FORM)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_calibrate_tries_chosen_blocks_where_causal_attention_may_be_lowered() -> None:
    q, k, v, _ = (x[:1] for x in tensors())
    q, k, v = (x.repeat(1, 1, 13, 1) for x in (q, k, v))

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    occurrences = [Occurrence(_ir(model, q, k, v), ())]
    forms = forms_that_pay(occurrences, DEVICES[H100], {"prefix": 2})
    assert forms == []  # so short a sequence does not pay
    long = [Occurrence(replace(occurrences[0].ir, seq_len_q=2**16, seq_len_k=2**16), ())]
    forms = forms_that_pay(long, DEVICES[H100], {"prefix": 2})
    assert {form.chosen for form in forms} >= {0, 8, 16}
    assert {(form.num_iters, form.init, form.prefix) for form in forms} == {(1, "identity", 2)}
    assert forms_that_pay(long, DEVICES[H100], {"num_iters": 2}) == []
    options = {"causal": True, "policy": "always", "block_size": 4, "window": 1, "prefix": 0}
    plan = monarch_compile.calibrate(model, [(q, k, v)], budget=0.9, options=options)
    assert len(plan.sites) == 1


def _ir(fn: Any, *args: Tensor) -> Any:
    return decisions_of(fn, *args, causal=True, block_size=4)[0].ir


@pytest.mark.parametrize("chosen", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_one_compilation_serves_several_lengths(chosen: int) -> None:
    options = {"policy": "always", "strict": True, **OPTIONS, "chosen": chosen}
    compiled = torch.compile(lambda *x: _by_flag(*x), backend="monarch", options=options)
    for length in (17, 20, 33):
        q, k, v = (torch.randn(2, 2, length, 8) for _ in range(3))
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 2)
        expected = monarch_attention(q, k, v, causal=True, **{**FORM, "chosen": chosen})
        with torch.no_grad():
            torch.testing.assert_close(compiled(q, k, v, q), expected, rtol=1e-5, atol=1e-5)


def test_policy_auto_waits_for_kernels_that_were_measured() -> None:
    """At lengths where kernels of causal attention were not timed, only policy "always" asks for them."""
    sizes = {"batch": 1, "num_heads": 8, "num_kv_heads": 8, "seq_len_q": 65536, "seq_len_k": 65536}
    ir = MonarchAttention(
        **sizes, head_dim=64, value_dim=64, dtype=torch.bfloat16, form=Form(64), scale=0.125, is_causal=True
    )
    sizes_now = {"auto": False, "batch": 1, "seq_len": 65536, "queries": None}
    assert cost_refusal(ir, DEVICES["h100"], {}, "", calls=DEVICE_ALONE, **sizes_now) is None
    short = {**sizes_now, "seq_len": 32767}
    refused = cost_refusal(ir, DEVICES["h100"], {}, "", calls=DEVICE_ALONE, **short)
    assert refused is not None
    assert refused.code == "unmeasured_kernels"
    exact_twin = replace(ir, is_causal=False)
    assert cost_refusal(exact_twin, DEVICES["h100"], {}, "", calls=DEVICE_ALONE, **sizes_now) is None
