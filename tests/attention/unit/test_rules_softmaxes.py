"""Softmax written by hand: programs one step away from what is read as one, each with its code.

With block_size=1 Monarch attention is exact, so a lowered program has to agree with eager too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.capture import run_passes
from support.soundness import (
    Program,
    Registry,
    agrees,
    make_inputs,
    result_as_kernels_leave_it,  # noqa: F401
    scored,
)

from monarch_compile.config import MonarchConfig
from monarch_compile.passes.capture.trace import to_aten
from monarch_compile.passes.pipeline import rewrite

expect = Registry()


def weights(q, k):
    return torch.exp(scored(q, k))


@expect("softmax_dim")
def f_wrong_dim(q, k, v, m):
    w = weights(q, k)
    return w / w.sum(-2, keepdim=True) @ v


@expect("lowered")
def f_dim_swapped(q, k, v, m):
    w = weights(k, q)
    return (w / w.sum(-2, keepdim=True)).mT @ v


@expect("normalisation")
def f_total(q, k, v, m):
    w = weights(q, k)
    return w / w.sum((-1, -2), keepdim=True) @ v


@expect("normalisation")
def f_all(q, k, v, m):
    w = weights(q, k)
    return w / w.sum() @ v


@expect("normalisation")
def f_eps(q, k, v, m):
    w = weights(q, k)
    return w / (w.sum(-1, keepdim=True) + 1e-3) @ v


@expect("normalisation")
def f_mean(q, k, v, m):
    w = weights(q, k)
    return w / w.mean(-1, keepdim=True) @ v


@expect("scores_reused")
def f_written(q, k, v, m):
    s = scored(q, k)
    w = s.exp()
    s.mul_(3)
    return w / w.sum(-1, keepdim=True) @ v, s * 1


@expect("normalisation")
def f_written_w(q, k, v, m):
    w = weights(q, k)
    z = w.sum(-1, keepdim=True)
    w.mul_(2)
    return w / z @ v


@expect("mutation")
def f_written_alias(q, k, v, m):
    s = scored(q, k)
    x = s.view(-1)
    w = s.exp()
    x.add_(1)
    return w / w.sum(-1, keepdim=True) @ v


@expect("scores_reused")
def f_escape(q, k, v, m):
    w = weights(q, k)
    p = w / w.sum(-1, keepdim=True)
    return p @ v, w


@expect("scores_reused")
def f_escape_z(q, k, v, m):
    w = weights(q, k)
    z = w.sum(-1, keepdim=True)
    return w / z @ v, z


@expect("normalisation")
def f_mask_float(q, k, v, m):
    w = weights(q, k) * (m.float() * 2)[:, None, None]
    return w / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_mask_binary(q, k, v, m):
    w = weights(q, k) * (1 - (~m).float())[:, None, None]
    return w / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_mask_int(q, k, v, m):
    w = weights(q, k) * m.long()[:, None, None]
    return w / w.sum(-1, keepdim=True) @ v


@expect("mask_general")
def f_mask_query(q, k, v, m):
    w = weights(q, k) * m[:, None, :, None]
    return w / w.sum(-1, keepdim=True) @ v


@expect("normalisation")
def f_mask_before_sum_only(q, k, v, m):
    w = weights(q, k)
    return w / (w * m[:, None, None]).sum(-1, keepdim=True) @ v


@expect("normalisation")
def f_mask_after_sum(q, k, v, m):
    w = weights(q, k)
    return (w * m[:, None, None]) / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_late(q, k, v, m):
    w = weights(q, k)
    return (w @ v) / w.sum(-1, keepdim=True)


@expect("normalisation")
def f_late_wrong(q, k, v, m):
    w = weights(q, k)
    return (w @ v) / w.sum(-2, keepdim=True)[..., :4]


@expect("normalisation")
def f_late_bc(q, k, v, m):
    w = weights(q[:1], k[:1])
    return (w @ v) / w.sum(-1, keepdim=True)


@expect("normalisation")
def f_late_T(q, k, v, m):
    w = weights(q, k)
    return (v.mT @ w.mT) / w.sum(-1)[:, :, None, :]


@expect("normalisation")
def f_late_einsum(q, k, v, m):
    w = weights(q, k)
    return torch.einsum("bhqk,bhkd->bqhd", w, v) / w.sum(-1).transpose(1, 2)[..., None]


@expect("normalisation")
def f_late_escape(q, k, v, m):
    w = weights(q, k)
    x = w @ v
    return x / w.sum(-1, keepdim=True), x


@expect("scores_reused", "scores_reused")
def f_late_twice(q, k, v, m):
    w = weights(q, k)
    z = w.sum(-1, keepdim=True)
    return (w @ v) / z + (w @ k) / z


@expect("lowered")
def f_late_masked(q, k, v, m):
    w = weights(q, k) * m[:, None, None]
    return (w @ v) / w.sum(-1, keepdim=True)


@expect("normalisation")
def f_late_self(q, k, v, m):
    w = weights(q, k)
    return (w @ w) / w.sum(-1, keepdim=True)


@expect("lowered")
def f_renorm(q, k, v, m):
    p = scored(q, k).softmax(-1) * m[:, None, None]
    return p / p.sum(-1, keepdim=True) @ v


@expect("probs_reused")
def f_renorm_dim(q, k, v, m):
    p = scored(q, k).softmax(-2) * m[:, None, None]
    return p / p.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_lse(q, k, v, m):
    s = scored(q, k)
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


@expect("normalisation")
def f_lse_other(q, k, v, m):
    s = scored(q, k)
    return (s - scored(k, q).logsumexp(-1, keepdim=True)).exp() @ v


@expect("softmax_dim")
def f_lse_dim(q, k, v, m):
    s = scored(q, k)
    return (s - s.logsumexp(-2, keepdim=True)).exp() @ v


@expect("normalisation")
def f_lse_alpha(q, k, v, m):
    s = scored(q, k)
    return torch.sub(s, s.logsumexp(-1, keepdim=True), alpha=2).exp() @ v


@expect("normalisation")
def f_logsoftmax_scaled(q, k, v, m):
    return (scored(q, k).log_softmax(-1) * 2).exp() @ v


@expect("lowered")
def f_exp2(q, k, v, m):
    w = torch.exp2(scored(q, k))
    return w / w.sum(-1, keepdim=True) @ v


@expect("normalisation")
def f_half_sum(q, k, v, m):
    w = weights(q, k)
    return (w / w.sum(-1, keepdim=True, dtype=torch.float64)).float() @ v


@expect("context")
def f_nograd(q, k, v, m):
    s = scored(q, k)
    with torch.no_grad():
        w = s.exp()
    return w / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_recip(q, k, v, m):
    w = weights(q, k)
    return w * (1 / w.sum(-1, keepdim=True)) @ v


@expect("normalisation")
def f_recip2(q, k, v, m):
    w = weights(q, k)
    return w * (2 / w.sum(-1, keepdim=True)) @ v


@expect("lowered")
def f_pow(q, k, v, m):
    w = weights(q, k)
    return w * w.sum(-1, keepdim=True) ** -1 @ v


@expect("normalisation")
def f_square(q, k, v, m):
    w = weights(q, k)
    return w * w / (w * w).sum(-1, keepdim=True) @ v


@expect("lowered")
def f_where(q, k, v, m):
    w = torch.where(m[:, None, None], weights(q, k), 0.0)
    return w / w.sum(-1, keepdim=True) @ v


@expect("normalisation")
def f_where2(q, k, v, m):
    w = torch.where(m[:, None, None], weights(q, k), 0.5)
    return w / w.sum(-1, keepdim=True) @ v


@expect("normalisation", "normalisation")
def f_cosh(q, k, v, m):
    w = weights(q, k) + weights(k, q)
    return w / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_renorm_twice(q, k, v, m):
    w = weights(q, k)
    p = w / w.sum(-1, keepdim=True) * m[:, None, None]
    return p / p.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_renorm_late(q, k, v, m):
    p = (scored(q, k).log_softmax(-1)).exp() * m[:, None, None]
    return (p @ v) / p.sum(-1, keepdim=True)


@expect("lowered")
def f_renorm_own_dtype(q, k, v, m):
    p = scored(q, k).softmax(-1, dtype=torch.float32) * m[:, None, None]
    return p / p.sum(-1, keepdim=True) @ v


@expect("probs_reused")
def f_renorm_other_dtype(q, k, v, m):
    p = scored(q, k).softmax(-1, dtype=torch.float64) * m[:, None, None]
    return (p / p.sum(-1, keepdim=True)).float() @ v


@expect("scores_reused")
def f_renorm_returned(q, k, v, m):
    p = scored(q, k).softmax(-1)
    w = p * m[:, None, None]
    return w / w.sum(-1, keepdim=True) @ v, p


@expect("probs_reused", "scores_reused")
def f_renorm_beside(q, k, v, m):
    p = scored(q, k).softmax(-1)
    w = p * m[:, None, None]
    return p @ v + w / w.sum(-1, keepdim=True) @ v


@expect("normalisation", "scores_reused")
def f_eps_beside(q, k, v, m):
    w = weights(q, k)
    z = w.sum(-1, keepdim=True)
    return w / z @ v + w / (z + 1e-3) @ v


@expect("probs_op", "scale_not_constant")
def f_softmax_of_softmax(q, k, v, m):
    w = weights(q, k)
    w = (w / w.sum(-1, keepdim=True)).exp()
    return w / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_late_of_probs(q, k, v, m):
    w = weights(q, k)
    p = w / w.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bhqd", p, v) * (1 / p.sum(-1, keepdim=True))


@expect("lowered")
def f_late_of_product(q, k, v, m):
    w = weights(q, k)
    x = (w @ v) / w.sum(-1, keepdim=True)
    return x / x.sum(-1, keepdim=True)


@expect("mutation")
def f_late_values_written(q, k, v, m):
    w = weights(q, k)
    z = w.sum(-1, keepdim=True)
    x = w @ v
    v.mul_(2)
    return x / z


@expect("mutation")
def f_mask_written(q, k, v, m):
    w = weights(q, k) * m[:, None, None]
    m.fill_(True)
    return w / w.sum(-1, keepdim=True) @ v


@expect("mask_causal")
def f_mask_float_causal(q, k, v, m):
    w = weights(q, k) * torch.ones(7, 7).tril()
    return w / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_mask_float_swapped(q, k, v, m):
    w = weights(k, q) * m.float()[:, None, :, None]
    return (w / w.sum(-2, keepdim=True)).mT @ v


@expect("mask_general")
def f_mask_float_swapped_queries(q, k, v, m):
    w = weights(k, q) * m.float()[:, None, None]
    return (w / w.sum(-2, keepdim=True)).mT.nan_to_num() @ v


@expect("lowered")
def f_mask_twice(q, k, v, m):
    w = torch.where(m[:, None, None], weights(q, k) * m.float()[:, None, None], 0.0)
    return w / w.sum(-1, keepdim=True) @ v


@expect("lowered")
def f_written_later(q, k, v, m):
    s = scored(q, k)
    w = s.exp()
    p = w / w.sum(-1, keepdim=True)
    y = p @ v
    p.mul_(2)
    s.add_(1)
    return y


@pytest.mark.parametrize("fn", expect.programs, ids=lambda f: f.__name__)
def test_rule(fn: Program) -> None:
    assert agrees(fn) == expect.programs[fn]


def test_a_softmax_by_hand_that_stays_exact_stays_as_it_was_written():
    def two(q, k, v):
        scores = q @ k.transpose(-1, -2)
        hidden = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -1e9)
        causal = torch.exp(hidden - torch.logsumexp(hidden, -1, keepdim=True)) @ v
        return causal + torch.exp(torch.log_softmax(k @ q.transpose(-1, -2), -1)) @ v

    inputs = tuple(torch.randn(1, 2, 8, 4) for _ in range(3))
    output, (result,) = run_passes(two, *inputs)
    targets = [str(node.target) for node in result.after.graph.nodes]
    assert sorted(d.status for d in result.decisions) == ["exact", "lowered"]
    assert "aten.logsumexp.default" in targets
    assert "aten.exp.default" in targets
    assert "aten.log_softmax.int" not in targets
    torch.testing.assert_close(output, two(*inputs))


BY_HAND = [
    fn
    for fn, codes in expect.programs.items()
    if codes == ["lowered"] and fn not in (f_written_later, f_late_of_product)
]


@pytest.mark.parametrize("fn", BY_HAND, ids=lambda f: f.__name__)
def test_nothing_by_hand_is_left_of_what_is_lowered(fn: Program) -> None:
    (result,) = run_passes(fn, *make_inputs())[1]
    left = {str(node.target) for node in result.after.graph.nodes}
    assert not [name for name in left if any(part in name for part in ("exp.", "exp2", "softmax", "sum.", "div"))]


@pytest.mark.parametrize("fn", BY_HAND, ids=lambda f: f.__name__)
def test_a_graph_whose_softmax_stays_exact_is_unchanged(fn: Program) -> None:
    """But for what keeps it from Inductor's own fusion."""

    def backend(gm: torch.fx.GraphModule, given: list[torch.Tensor]) -> Any:
        found.append((to_aten(gm, given), rewrite(gm, given, MonarchConfig(policy="never"))))
        return gm.forward

    found: list[Any] = []
    torch._dynamo.reset()
    torch.compile(fn, backend=backend, fullgraph=True)(*make_inputs())
    ((captured, result),) = found
    assert [d.code for d in result.decisions] == ["policy_never"]
    assert str(result.before.graph) == str(captured.graph)
    assert result.num_protected or result.after is result.before
    assert result.num_protected == (fn in (f_dim_swapped, f_mask_float_swapped))


def test_late_normalisation_is_in_no_pattern_of_inductor() -> None:
    """A scale that is known at run time is misread where softmax comes before the product."""

    def scaled_at_run_time(q, k, v, m):
        return torch.exp(q @ k.mT / m.sum().sqrt())

    def early(q, k, v, m):
        w = scaled_at_run_time(q, k, v, m)
        return w / w.sum(-1, keepdim=True) @ v

    def late(q, k, v, m):
        w = scaled_at_run_time(q, k, v, m)
        return (w @ v) / w.sum(-1, keepdim=True)

    found = [run_passes(fn, *make_inputs(), policy="never")[1][0].num_protected for fn in (early, late)]
    assert found == [1, 0]
