"""Masks that repeat others, masked assignments, leading dims: near misses of their rules, each with its code.

With block_size=1 Monarch attention is exact, so a lowered program has to agree with eager too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.soundness import Program, Registry, agrees, attend, result_as_kernels_leave_it, scored  # noqa: F401

expect = Registry()


@expect("mask_multiplied")
def p_other_mask(q, k, v, m):
    p = scored(q, k).masked_fill(~m[:, None, None], -1e9).softmax(-1)
    return p.masked_fill(~m.roll(1, 1)[:, None, None], 0.0) @ v


@expect("mask_multiplied")
def p_unmasked(q, k, v, m):
    return scored(q, k).softmax(-1).masked_fill(~m[:, None, None], 0.0) @ v


@expect("lowered")
def p_times(q, k, v, m):
    p = scored(q, k).masked_fill(~m[:, None, None], -1e9).softmax(-1)
    return (p * m[:, None, None].float()) @ v


@expect("mask_multiplied")
def p_times2(q, k, v, m):
    p = scored(q, k).masked_fill(~m[:, None, None], -1e9).softmax(-1)
    return (p * (m[:, None, None].float() * 2)) @ v


@expect("mask_multiplied")
def p_inv(q, k, v, m):
    p = scored(q, k).masked_fill(~m[:, None, None], -1e9).softmax(-1)
    return p.masked_fill(m[:, None, None], 0.0) @ v


@expect("probs_op")
def p_nan(q, k, v, m):
    return scored(q, k).softmax(-1).nan_to_num(0.5) @ v


@expect("lowered")
def p_nan0(q, k, v, m):
    return scored(q, k).softmax(-1).nan_to_num(0.0, posinf=3.0) @ v


@expect("lowered")
def p_where_v(q, k, v, m):
    p = scored(q, k).masked_fill(~m[:, None, None], -1e9).softmax(-1)
    return torch.where(m[:, None, None], p, 0.0) @ v


@expect("mask_multiplied")
def p_where_i(q, k, v, m):
    p = scored(q, k).masked_fill(~m[:, None, None], -1e9).softmax(-1)
    return torch.where(~m[:, None, None], p, 0.0) @ v


@expect("mask_multiplied")
def t_times_plain(q, k, v, m):
    return attend(scored(q, k) * m[:, None, None].float(), v)


@expect("lowered")
def t_times_mask(q, k, v, m):
    f = m[:, None, None].float()
    return attend(scored(q, k) * f + (1 - f) * -1e9, v)


@expect("mask_multiplied")
def t_times_inv(q, k, v, m):
    f = m[:, None, None].float()
    return attend(scored(q, k) * (1 - f) + (1 - f) * -1e9, v)


@expect("mask_multiplied")
def t_times_two(q, k, v, m):
    f = m[:, None, None].float()
    return attend(scored(q, k) * (f * 2) + (1 - f) * -1e9, v)


@expect("mask_multiplied")
def t_times_big(q, k, v, m):
    f = m[:, None, None].float()
    return attend(scored(q, k) * (f + (1 - f) * -1e9) + (1 - f) * -1e9, v)


@expect("mask_fill")
def t_neg_fill(q, k, v, m):
    return attend(-(scored(q, k).masked_fill(~m[:, None, None], -1e9)), v)


@expect("lowered")
def t_neg_fill_ok(q, k, v, m):
    return attend(-(scored(q, k).masked_fill(~m[:, None, None], 1e9)), v)


@expect("lowered")
def put_mask(q, k, v, m):
    s = scored(q, k)
    s[(~m[:, None, None]).expand_as(s)] = -1e9
    return attend(s, v)


@expect("scores_op")
def put_acc(q, k, v, m):
    s = scored(q, k)
    s.index_put_(((~m[:, None, None]).expand_as(s),), torch.tensor(-1e9), accumulate=True)
    return attend(s, v)


@expect("scores_op")
def put_rows(q, k, v, m):
    s = scored(q, k)
    s[:, :, m[0]] = -1e9
    return attend(s, v)


@expect("scores_reused")
def put_slice(q, k, v, m):
    s = scored(q, k)
    s[..., 5:] = -1e9
    return attend(s, v)


@expect("scores_reused")
def put_view(q, k, v, m):
    s = scored(q, k)
    w = s * 1
    s[(~m[:, None, None]).expand_as(s)] = -1e9
    return attend(w, v), s


@expect("scores_op")
def put_batch(q, k, v, m):
    s = scored(q, k)
    s[m[:, 0]] = -1e9
    return attend(s, v)


@expect("lowered")
def d5(q, k, v, m):
    q, k, v = (x[:, None].expand(2, 2, 3, 7, 4) for x in (q, k, v))
    return attend((q @ k.mT).masked_fill(~m[:, None, None, None], -1e9), v)


@expect("lowered")
def d5b(q, k, v, m):
    q, k, v = (x[:, None].expand(2, 2, 3, 7, 4) for x in (q, k, v))
    mm = torch.stack([m, m.roll(1, 1)], 1)
    return attend((q @ k.mT).masked_fill(~mm[:, :, None, None], -1e9), v)


@expect("mask_general")
def d5c(q, k, v, m):
    q, k, v = (x[:, None].expand(2, 2, 3, 7, 4) for x in (q, k, v))
    mm = torch.stack([m[0], m[1], m[0] & m[1]], 0)
    return attend((q @ k.mT).masked_fill(~mm[:, None], -1e9), v)


@expect("lowered")
def d5d(q, k, v, m):
    q5, k5 = (x[:, None].expand(2, 2, 3, 7, 4) for x in (q, k))
    return attend(q5 @ k5.mT, v[:, None])


@expect("scale_not_constant")
def d5e(q, k, v, m):
    q5, k5 = (x[:, None].expand(2, 2, 3, 7, 4) for x in (q, k))
    return attend(q5 @ k5.mT * v[:, None, :, :1, :1], v[:, None])


@expect("lowered")
def d5s(q, k, v, m):
    q, k, v = (x[:, None].expand(2, 2, 3, 7, 4) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m[:, None, None, None, :])


@expect("lowered")
def servants(q, k, v, m):
    s = scored(q, k)
    return attend(s.masked_fill(s.amax((1, 2))[:, None, None] < 0.5, -1e9), v)


@expect("mask_general")
def servants2(q, k, v, m):
    s = scored(q, k)
    return attend(s.masked_fill(s < s.mean(-1, keepdim=True), -1e9), v)


@expect("mask_key_bias")
def bias_and_mask(q, k, v, m):
    return attend((scored(q, k) + q[0, 0, :, 0]).masked_fill(~m[:, None, None], -1e9), v)


@expect("mask_key_bias")
def two_biases(q, k, v, m):
    return attend(scored(q, k) + q[0, 0, :, 0] + k[0, 0, :, 0], v)


@expect("lowered")
def bias_then_scale(q, k, v, m):
    return attend((k @ q.mT * 0.5 - q[0, 0, :, :1]).mT * -0.7, v)


@expect("mask_scaled")
def bias_then_unknown_scale(q, k, v, m):
    return attend((scored(q, k) + q[0, 0, :, 0]) * q.abs().mean(), v)


@expect("lowered")
def bias_of_each_batch(q, k, v, m):
    return attend(scored(q, k) + (3 * q).sum((1, 3))[:, None, None], v)


@expect("lowered")
def log_mask(q, k, v, m):
    return attend(scored(q, k) + (m.float() * 2)[:, None, None].log(), v)


@expect("mask_sliding_window")
def abs_win(q, k, v, m):
    p = torch.arange(7)
    return attend(scored(q, k).masked_fill((p[:, None] - p[None]).abs() > 2, -1e9), v)


@expect("lowered")
def repint(q, k, v, m):
    return attend(
        (q.reshape(6, 7, 4) @ k.reshape(6, 7, 4).mT) + (~m).float().repeat_interleave(3, 0)[:, None] * -1e9,
        v.reshape(6, 7, 4),
    )


@expect("lowered")
def repint_of_rows(q, k, v, m):
    return attend(
        (q.reshape(6, 7, 4) @ k.reshape(6, 7, 4).mT)
        + (~m[:, :6]).float().repeat_interleave(7, 1).view(2, 6, 7).repeat_interleave(3, 0).transpose(0, 0)[:, :1]
        * -1e9,
        v.reshape(6, 7, 4),
    )


@pytest.mark.parametrize("fn", expect.programs, ids=lambda f: f.__name__)
def test_rule(fn: Program) -> None:
    assert agrees(fn) == expect.programs[fn]
