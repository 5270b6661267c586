"""Row shifts, scales known at run time, swapped roles: programs one step away from what is folded, each with its code.

With block_size=1 Monarch attention is exact, so a lowered program has to agree with eager too.
"""

from __future__ import annotations

import pytest
import torch
from support.soundness import Program, Registry, agrees, attend, result_as_kernels_leave_it, scored  # noqa: F401

expect = Registry()


@expect("mask_split_bias")
def shift_cols(q, k, v, m):
    s = scored(q, k)
    return attend(s - s.amax(-2, keepdim=True), v)


@expect("row_shift")
def shift_masked_after(q, k, v, m):
    s = scored(q, k)
    c = (q.sum(-1, keepdim=True)) * 1e5
    return attend((s - c).masked_fill(~m[:, None, None], -1e5), v)


@expect("row_shift")
def shift_plus_max_masked(q, k, v, m):
    s = scored(q, k) * 1
    return attend((s + s.amax(-1, keepdim=True) * 1e5).masked_fill(~m[:, None, None], -1e5), v)


@expect("row_shift")
def shift_other_max(q, k, v, m):
    s = scored(q, k)
    t = scored(k, q) * 1e6
    return attend((s - t.amax(-1, keepdim=True)).masked_fill(~m[:, None, None], -1e5), v)


@expect("row_shift")
def shift_hides_queries(q, k, v, m):
    return attend(scored(q, k) + (1 - m[:, None, :, None].float()) * -1e9, v)


@expect("row_shift")
def shift_hides_queries_swapped(q, k, v, m):
    s = k @ q.mT + (1 - m[:, None, None, :].float()) * -1e9
    return s.softmax(-2).mT @ v


@expect("row_shift")
def shift_hides_queries_half(q, k, v, m):
    q, k, v = q.half(), k.half(), v.half()
    return attend(scored(q, k) + (1 - m[:, None, :, None].half()) * -3e4, v)


@expect("row_shift")
def shift_marks_queries(q, k, v, m):
    return attend(scored(q, k) + (q[..., :1] > 0).float() * -1e9, v)


@expect("row_shift")
def shift_filled(q, k, v, m):
    return attend(scored(q, k) + q[..., :1].masked_fill(q[..., :1] > 0, -1e9), v)


@expect("row_shift")
def shift_divided(q, k, v, m):
    return attend(scored(q, k) - q[..., :1] / 1e-9, v)


@expect("row_shift")
def shift_by_one_of_two_numbers(q, k, v, m):
    return attend(scored(q, k) + torch.where(q[..., :1] > 0, -1e9, 0.0), v)


@expect("row_shift")
def shift_taken_from_a_number(q, k, v, m):
    s = scored(q, k)
    return attend(s + (1e9 - s.amax(-1, keepdim=True)), v)


@expect("row_shift")
def shift_at_least_a_number(q, k, v, m):
    return attend(scored(q, k) + q[..., :1].clamp(min=1e9), v)


@expect("row_shift")
def shift_clamped_by_numbers(q, k, v, m):
    return attend(scored(q, k) + torch.clamp(q[..., :1], 1e9, max=2e9), v)


@expect("row_shift")
def shift_with_a_product(q, k, v, m):
    return attend(scored(q, k) + torch.addcmul(q[..., :1], q[..., :1], q[..., 1:2], value=1e9), v)


@expect("row_shift")
def shift_by_a_reciprocal(q, k, v, m):
    return attend(scored(q, k) + 1 / q[..., :1], v)


@expect("row_shift")
def shift_by_a_quotient(q, k, v, m):
    return attend(scored(q, k) + q[..., :1] / q[..., 1:2], v)


@expect("row_shift")
def shift_by_a_cosh(q, k, v, m):
    return attend(scored(q, k) + (10 * q[..., :1]).cosh(), v)


@expect("row_shift")
def shift_by_powers_of_scores(q, k, v, m):
    s = scored(q, k)
    return attend(s + (s * s * s * s).square().amax(-1, keepdim=True), v)


@expect("row_shift")
def shift_by_several_numbers(q, k, v, m):
    return attend(scored(q, k) + q[..., :1] * 50 * 50 * 50 * 50, v)


@expect("row_shift")
def shift_by_the_largest_of_a_part_of_masked(q, k, v, m):
    s = scored(q, k).masked_fill(~m[:, None, None], -1e9)
    return attend(s - s[..., :2].amax(-1, keepdim=True), v)


@expect("row_shift")
def shift_times_a_number_as_it_is_added(q, k, v, m):
    s = scored(q, k)
    return attend(torch.add(s, s.amax(-1, keepdim=True), alpha=1e9), v)


@expect("row_shift")
def shift_before_a_large_scale(q, k, v, m):
    return attend((scored(q, k) * 1e-6 + q[..., :1]) * 1e6, v)


@expect("row_shift")
def shift_by_a_norm_of_a_small_order(q, k, v, m):
    return attend(scored(q, k) + q.norm(p=0.05, dim=-1, keepdim=True), v)


@expect("row_shift")
def shift_steep(q, k, v, m):
    return attend(scored(q, k) - q[..., :1].abs() ** 60, v)


@expect("row_shift")
def shift_by_mean_of_masked(q, k, v, m):
    s = scored(q, k).masked_fill(~m[:, None, None], -1e9)
    return attend(s - s.mean(-1, keepdim=True), v)


@expect("row_shift")
def shift_by_least_of_masked(q, k, v, m):
    s = scored(q, k) + (1 - m[:, None, None].float()) * -1e9
    return attend(s - s.amin(-1, keepdim=True).detach(), v)


@expect("row_shift")
def shift_by_first_of_masked(q, k, v, m):
    s = scored(q, k).masked_fill(m[:, None, None], -1e9)
    return attend(s.float() - s.detach()[..., :1], v)


@expect("lowered")
def shift_by_mean_before_mask(q, k, v, m):
    s = scored(q, k)
    return attend(s.masked_fill(~m[:, None, None], -1e9) - s.mean(-1, keepdim=True), v)


@expect("lowered")
def shift_by_maximum_of_copy(q, k, v, m):
    s = scored(q, k).masked_fill(~m[:, None, None], -1e9)
    return attend(s - s.detach().double().amax(-1, keepdim=True).float(), v)


@expect("lowered")
def shift_by_maximum_of_all(q, k, v, m):
    s = scored(q, k).masked_fill(~m[:, None, None], -1e9)
    return attend(s - s.max(), v)


@expect("mask_opaque")
def mask_negated(q, k, v, m):
    return attend(-(scored(q, k) + (1 - m[:, None, None].float()) * -1e9), v)


@expect("lowered")
def shift_of_queries(q, k, v, m):
    q = q * 1
    return attend(scored(q, k) + q[..., :1], v)


@expect("scores_reused")
def shift_escapes(q, k, v, m):
    s = scored(q, k)
    c = s.amax(-1, keepdim=True)
    return attend(s - c, v), c


@expect("lowered")
def shift_then_scale(q, k, v, m):
    s = scored(q, k)
    return attend((s - s.amax(-1, keepdim=True)) * 2.0, v)


@expect("lowered")
def shift_keys_swapped(q, k, v, m):
    s = k @ q.mT
    return (s - s.amax(-2, keepdim=True)).softmax(-2).mT @ v


@expect("mask_split_bias")
def shift_rows_swapped(q, k, v, m):
    s = k @ q.mT
    return (s - s.amax(-1, keepdim=True)).softmax(-2).mT @ v


@expect("lowered")
def shift_vector(q, k, v, m):
    return attend(scored(q, k) + q[0, 0, :, 0], v)


@expect("lowered")
def shift_0d(q, k, v, m):
    return attend(scored(q, k) + q.sum(), v)


@expect("lowered")
def shift_int(q, k, v, m):
    return attend(scored(q, k) + m.sum(), v)


@expect("lowered")
def factor_neg(q, k, v, m):
    return attend(scored(q, k) * (-q.abs().mean()), v)


@expect("mask_scaled")
def factor_masked_above(q, k, v, m):
    return attend(scored(q, k).masked_fill(~m[:, None, None], -1e9) * (q.mean()), v)


@expect("mask_scaled")
def times_after_a_mask(q, k, v, m):
    masked = scored(q, k) + (1 - m[:, None, None].float()) * -1e9  # -1e9 * 0 is 0: not hidden any more
    return attend(masked * m[:, None, None].float(), v)


@expect("lowered")
def times_before_a_mask(q, k, v, m):
    times = scored(q, k) * m[:, None, None].float()
    return attend(times + (1 - m[:, None, None].float()) * -1e9, v)


@expect("lowered")
def factor_masked_below(q, k, v, m):
    return attend((scored(q, k) * q.mean()).masked_fill(~m[:, None, None], -1e9), v)


@expect("scale")
def factor_zero(q, k, v, m):
    return attend(scored(q, k) * 0.0, v)


@expect("scale")
def factor_infinite(q, k, v, m):
    return attend(scored(q, k) / 0.0, v)


@expect("scale_not_constant")
def factor_row(q, k, v, m):
    return attend(scored(q, k) * q[..., :1], v)


@expect("mask_multiplied")
def factor_col(q, k, v, m):
    return attend(scored(q, k) * k[..., :1].mT, v)


@expect("lowered")
def factor_head(q, k, v, m):
    return attend(scored(q, k) * v[:, :, :1, :1], v)


@expect("lowered")
def factor_head_div(q, k, v, m):
    return attend(scored(q, k) / v[:1, :, :1, :1].exp(), v)


@expect("scale_not_constant")
def factor_double(q, k, v, m):
    return attend((scored(q, k).double() * v[:1, :, :1, :1].double()).float(), v)


@expect("lowered")
def factor_double0(q, k, v, m):
    return attend((scored(q, k) * v.double().mean()), v)


@expect("scale_not_constant")
def factor_int(q, k, v, m):
    return attend(scored(q, k) * m.sum(), v)


@expect("scale_not_constant")
def factor_bool(q, k, v, m):
    return attend(scored(q, k) * m[0, 0], v)


@expect("mutation")
def factor_written(q, k, v, m):
    t = q.mean() * 1
    s = scored(q, k) * t.view(())
    t.mul_(3)
    return attend(s, v)


@expect("lowered")
def factor_two(q, k, v, m):
    return attend(scored(q, k) * q.mean() / k.std(), v)


@expect("scale_not_constant")
def factor_merged(q, k, v, m):
    q2, k2, v2 = (x.reshape(6, 7, 4) for x in (q, k, v))
    return attend(q2 @ k2.mT * v2[:, :1, :1], v2)


@expect("scale_not_constant")
def factor_of_merged_scores(q, k, v, m):
    s = (q @ k.mT).reshape(6, 7, 7) * v.reshape(6, 7, 4)[:, :1, :1]
    return attend(s.reshape(2, 3, 7, 7), v)


@expect("scale_not_constant")
def factor_of_scores_with_a_dim_more(q, k, v, m):
    s = (q @ k.mT).unsqueeze(0) * v[:, :, :1, :1].unsqueeze(0)
    return attend(s.squeeze(0), v)


@expect("scale_not_constant")
def factor_of_wider_scores(q, k, v, m):
    q, k, v = q.half(), k.half(), v.half()
    sharpness = 1e5 / q.float().square().mean()  # such queries are infinite in float16, such scores are not
    return attend(((q @ k.mT * 1e-5).float() * sharpness).half(), v).float()


@expect("scale_not_constant")
def factor_bc(q, k, v, m):
    return attend((q[:1] @ k[:1].mT) * v[:, :, :1, :1], v)


@expect("lowered")
def factor_const_mask(q, k, v, m):
    return attend((scored(q, k) + 50.0) * q.mean(), v)


@expect("scores_op")
def factor_const_mask2(q, k, v, m):
    return attend(((scored(q, k) + 50.0) * (q.mean() * 1e6)).masked_fill(~m[:, None, None], -1e5), v)


@expect("mask_general")
def sw_mask_col(q, k, v, m):
    return (k @ q.mT).masked_fill(~m[:, None, None, :], -1e9).softmax(-2).mT @ v


@expect("lowered")
def sw_mask_key(q, k, v, m):
    return (k @ q.mT).masked_fill(~m[:, None, :, None], -1e9).softmax(-2).mT @ v


@expect("mask_general")
def sw_mask_vec(q, k, v, m):
    return (k @ q.mT).masked_fill(~m[1], -1e9).softmax(-2).mT @ v


@expect("lowered")
def sw_add_key(q, k, v, m):
    return ((k @ q.mT) + (1 - m.float())[:, None, :, None] * -1e9).softmax(-2).mT @ v


@expect("softmax_dim")
def sw_wrong(q, k, v, m):
    return (k @ q.mT).softmax(-2) @ v


@expect("values_layout")
def sw_wrong2(q, k, v, m):
    return (k @ q.mT).softmax(-1).mT @ v


@expect("lowered")
def sw_twice(q, k, v, m):
    return (k @ q.mT).mT.mT.softmax(-2).mT.mT.mT @ v


@expect("values_layout")
def sw_left(q, k, v, m):
    return v.mT @ (q @ k.mT).softmax(-1)


@expect("lowered")
def sw_left2(q, k, v, m):
    return v.mT @ (q @ k.mT).softmax(-2)


@expect("scores_view")
def sw_batch(q, k, v, m):
    return (q @ k.mT).transpose(0, 1).softmax(-1) @ v.transpose(0, 1)


@expect("lowered")
def sw_perm(q, k, v, m):
    return (q @ k.mT).permute(0, 1, 3, 2).softmax(-1) @ v


@expect("scores_view")
def sw_head_row(q, k, v, m):
    return (q @ k.mT).transpose(1, 2).softmax(-1).transpose(1, 2) @ v


@expect("lowered")
def sw_einsum(q, k, v, m):
    return torch.einsum("bhkq,bhkd->bhqd", (k @ q.mT).softmax(-2), v)


@expect("softmax_dim")
def sw_einsum2(q, k, v, m):
    return torch.einsum("bhqk,bhkd->bhqd", (k @ q.mT).softmax(-2), v)


@expect("lowered")
def sw_einsum3(q, k, v, m):
    return torch.einsum("bhqk,bhkd->bqhd", (k @ q.mT).mT.softmax(-1), v)


@expect("probs_reused")
def sw_pv_same(q, k, v, m):
    p = (q @ k.mT).softmax(-1)
    return p @ p.mT


@expect("values_layout")
def sw_einsum_same(q, k, v, m):
    p = (q @ k.mT).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", p, p)


@pytest.mark.parametrize("fn", expect.programs, ids=lambda f: f.__name__)
def test_rule(fn: Program) -> None:
    assert agrees(fn) == expect.programs[fn]
