"""Bidirectional attention without a bias, written by hand in every way we have seen or could think of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import Entry

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
INF = float("inf")
LOW = torch.finfo(torch.float32).min
BATCH, HEADS, SEQ_LEN, HEAD_DIM = 2, 3, 12, 8


def inputs(train: bool = False) -> tuple[Tensor, ...]:
    """q, k, v (batch, heads, seq_len, head_dim) and `visible` (batch, seq_len), True where a key is seen."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, SEQ_LEN, HEAD_DIM, generator=generator) for _ in range(3))
    visible = torch.arange(SEQ_LEN) < torch.tensor([[SEQ_LEN], [SEQ_LEN - 4]])
    return (*(x.requires_grad_(train) for x in (q, k, v)), visible)


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def scored(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def hidden(m: Tensor) -> Tensor:
    return ~m[:, None, None, :]


# ---- products --------------------------------------------------------------------------------------------------------


def _bmm(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, SEQ_LEN, HEAD_DIM) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, 2), v).view(BATCH, HEADS, SEQ_LEN, -1)


def _baddbmm(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, SEQ_LEN, HEAD_DIM) for x in (q, k, v))
    empty = torch.empty(q.shape[0], SEQ_LEN, SEQ_LEN, dtype=q.dtype)
    return torch.bmm(torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3).softmax(-1), v)


def _baddbmm_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, SEQ_LEN, HEAD_DIM) for x in (q, k, v))
    added = (~m).float().repeat_interleave(HEADS, 0)[:, None, :] * -1e9
    return torch.bmm(torch.baddbmm(added, q, k.mT).softmax(-1), v)


def _unsplit_einsum(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (batch, seq, heads, dim)
    probs = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.3, dim=-1)
    return torch.einsum("bhnm,bmhd->bnhd", probs, v).flatten(2)


def _keys_first(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    probs = torch.softmax(k @ q.transpose(-2, -1) * 0.3, dim=-2)  # (batch, heads, keys, queries)
    return probs.transpose(-2, -1) @ v


def _keys_first_values_left(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    probs = torch.softmax((k @ q.mT * 0.3).masked_fill(~m[:, None, :, None], -INF), dim=-2)
    return (v.mT @ probs).mT


def _guided_diffusion(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # (batch * heads, channels, seq)
    factor = 1 / math.sqrt(math.sqrt(HEAD_DIM))
    weight = torch.einsum("bct,bcs->bts", q * factor, k * factor)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bts,bcs->bct", weight, v)


def _latent_diffusion(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x[:, 0].transpose(1, 2) for x in (q, k, v))  # (batch, channels, height * width)
    weight = torch.bmm(q.permute(0, 2, 1), k) * (int(HEAD_DIM) ** (-0.5))
    weight = F.softmax(weight, dim=2).permute(0, 2, 1)
    return torch.bmm(v, weight)


def _axial(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.view(BATCH, HEADS, 3, 4, HEAD_DIM) for x in (q, k, v))  # attention along the last of two axes
    return F.scaled_dot_product_attention(q, k, v)


def _windows(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.view(BATCH, HEADS, 3, 4, HEAD_DIM).transpose(1, 2) for x in (q, k, v))
    return attend(q @ k.mT * 0.3, v).transpose(2, 3).reshape(BATCH, SEQ_LEN, -1)


def _lucidrains(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * HEAD_DIM**-0.5
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    sim = sim.masked_fill(~m[:, None, None, :], -torch.finfo(sim.dtype).max)
    return torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)


PRODUCTS: dict[str, Program] = {
    "linalg": lambda q, k, v, m: torch.linalg.matmul(torch.linalg.matmul(q, k.mT).softmax(-1), v),
    "matmul_transpose": lambda q, k, v, m: attend(torch.matmul(q, k.transpose(-2, -1)), v),
    "mT": lambda q, k, v, m: attend(q @ k.mT, v),
    "permute": lambda q, k, v, m: attend(q @ k.permute(0, 1, 3, 2), v),
    "swapaxes": lambda q, k, v, m: attend(q @ k.swapaxes(-1, -2), v),
    "movedim": lambda q, k, v, m: attend(q @ k.movedim(-1, -2), v),
    "adjoint": lambda q, k, v, m: attend(q @ k.adjoint(), v),
    "bmm": _bmm,
    "baddbmm_beta_0": _baddbmm,
    "baddbmm_mask": _baddbmm_mask,
    "einsum": lambda q, k, v, m: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "einsum_letters": lambda q, k, v, m: attend(torch.einsum("xyie, xyje -> xyij", q, k), v),
    "einsum_ellipsis": lambda q, k, v, m: attend(torch.einsum("...qd,...kd->...qk", q, k), v),
    "einsum_swapped": lambda q, k, v, m: attend(torch.einsum("bhkd,bhqd->bhqk", k, q), v),
    "einsum_implicit": lambda q, k, v, m: attend(torch.einsum("ik,jk", q[0, 0], k[0, 0]), v[0, 0]),
    "einsum_unsplit": _unsplit_einsum,
    "einsum_keys_first": lambda q, k, v, m: torch.einsum(
        "bhkq,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhkq", q, k).softmax(-2), v
    ),
    "keys_first": _keys_first,
    "keys_first_values_left": _keys_first_values_left,
    "scores_transposed": lambda q, k, v, m: attend((k @ q.mT).transpose(-1, -2) * 0.3, v),
    "values_left": lambda q, k, v, m: (v.mT @ (q @ k.mT).softmax(-1).mT).mT,
    "guided_diffusion": _guided_diffusion,
    "latent_diffusion": _latent_diffusion,
    "axial_sdpa_5d": _axial,
    "windows_5d": _windows,
    "rank_3": lambda q, k, v, m: attend(scored(q[:, 0], k[:, 0]), v[:, 0]),
    "rank_2": lambda q, k, v, m: attend(q[0, 0].mm(k[0, 0].t()), v[0, 0]),
    "broadcast_keys": lambda q, k, v, m: attend(scored(q, k[:, :1]), v[:, :1]),
    "lucidrains": _lucidrains,
}


# ---- scaled_dot_product_attention ------------------------------------------------------------------------------------

SDPA: dict[str, Program] = {
    "plain": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v),
    "scale": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "rank_3": lambda q, k, v, m: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "bool_mask": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m[:, None, None, :]),
    "float_mask": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.zeros(BATCH, 1, 1, SEQ_LEN).masked_fill(hidden(m), -INF)
    ),
    "expanded_mask": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=m[:, None, None, :].expand(-1, HEADS, SEQ_LEN, -1)
    ),
    "transposed": lambda q, k, v, m: F.scaled_dot_product_attention(
        *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2),
}


# ---- fewer key heads than query heads -------------------------------------------------------------------------------


def twice(q: Tensor) -> Tensor:
    """Twice as many query heads as there are key heads."""
    return torch.cat([q, -q], 1)


def _repeat_kv(x: Tensor) -> Tensor:
    return x[:, :, None].expand(BATCH, HEADS, 2, SEQ_LEN, HEAD_DIM).reshape(BATCH, HEADS * 2, SEQ_LEN, HEAD_DIM)


def _repeat_unsplit(x: Tensor) -> Tensor:
    """Repeated as (batch, seq, heads, dim), then transposed."""
    return x.transpose(1, 2).contiguous().repeat_interleave(2, dim=2).transpose(1, 2)


def _grouped_einsum(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = torch.einsum("bhgqd,bhkd->bhgqk", twice(q).unflatten(1, (HEADS, 2)), k) * 0.3
    return torch.einsum("bhgqk,bhkd->bhgqd", scores.masked_fill(~m[:, None, None, None], -INF).softmax(-1), v)


SHARED: dict[str, Program] = {
    "enable_gqa": lambda q, k, v, m: F.scaled_dot_product_attention(twice(q), k, v, enable_gqa=True),
    "enable_gqa_masked": lambda q, k, v, m: F.scaled_dot_product_attention(
        twice(q), k, v, attn_mask=m[:, None, None, :], enable_gqa=True
    ),
    "enable_gqa_one_head": lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True),
    "enable_gqa_5d": lambda q, k, v, m: F.scaled_dot_product_attention(
        twice(q)[:, None], k[:, None], v[:, None], enable_gqa=True
    ),
    "repeat_kv": lambda q, k, v, m: F.scaled_dot_product_attention(twice(q), _repeat_kv(k), _repeat_kv(v)),
    "repeat_kv_spelled": lambda q, k, v, m: attend(
        scored(twice(q), _repeat_kv(k)).masked_fill(hidden(m), -INF), _repeat_kv(v)
    ),
    "repeat_interleave": lambda q, k, v, m: attend(
        scored(twice(q), k.repeat_interleave(2, dim=1)), v.repeat_interleave(2, 1)
    ),
    "repeat_unsplit": lambda q, k, v, m: attend(scored(twice(q), _repeat_unsplit(k)), _repeat_unsplit(v)),
    "repeat_one_head": lambda q, k, v, m: attend(
        scored(q, k[:, :1].repeat(1, HEADS, 1, 1)), v[:, :1].expand(-1, HEADS, -1, -1).contiguous()
    ),
    "einsum": _grouped_einsum,
    "einsum_one_head": lambda q, k, v, m: torch.einsum(
        "bhqk,bkd->bhqd", (torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]) * 0.3).softmax(-1), v[:, 0]
    ),
    "wider_values": lambda q, k, v, m: F.scaled_dot_product_attention(
        twice(q), k, torch.cat([v, v], -1), enable_gqa=True
    ),
    "tiled": lambda q, k, v, m: attend(scored(twice(q), k.repeat(1, 2, 1, 1)), v.repeat(1, 2, 1, 1)),
    "keys_tiled_values_repeated": lambda q, k, v, m: attend(scored(twice(q), k.repeat(1, 2, 1, 1)), _repeat_kv(v)),
}
"""The last two are no groups of neighbouring heads: they are lowered with the heads as they were repeated."""


# ---- scales ----------------------------------------------------------------------------------------------------------

ROOT = math.sqrt(HEAD_DIM)
SCALES: dict[str, Program] = {
    "in_many_steps": lambda q, k, v, m: attend(functools.reduce(lambda s, _: s * 1.1, range(16), q @ k.mT), v),
    "mul": lambda q, k, v, m: attend(q @ k.mT * 0.3, v),
    "mul_left": lambda q, k, v, m: attend(0.3 * (q @ k.mT), v),
    "div": lambda q, k, v, m: attend(q @ k.mT / ROOT, v),
    "div_inplace": lambda q, k, v, m: attend((q @ k.mT).div_(ROOT), v),
    "mul_inplace": lambda q, k, v, m: attend((q @ k.mT).mul_(0.3), v),
    "on_q": lambda q, k, v, m: attend((q * 0.3) @ k.mT, v),
    "on_k": lambda q, k, v, m: attend(q @ (k / ROOT).mT, v),
    "split": lambda q, k, v, m: attend((q * ROOT**-0.5) @ (k * ROOT**-0.5).mT, v),
    "tensor_0d": lambda q, k, v, m: attend(q @ k.mT / torch.tensor(ROOT), v),
    "tensor_sqrt": lambda q, k, v, m: attend(q @ k.mT / torch.sqrt(torch.tensor(HEAD_DIM, dtype=torch.float32)), v),
    "tensor_full": lambda q, k, v, m: attend(q @ k.mT / torch.full([], HEAD_DIM**0.5, dtype=q.dtype), v),
    "tensor_pow": lambda q, k, v, m: attend(q @ k.mT * torch.tensor(float(HEAD_DIM)) ** -0.5, v),
    "negative_twice": lambda q, k, v, m: attend(-(q @ -k.mT), v),
    "from_the_input": lambda q, k, v, m: attend(q @ k.mT * q.detach().abs().mean(), v),
    "learned_per_head": lambda q, k, v, m: attend(q @ k.mT * v.detach()[0, :, :1, :1].exp(), v),
}


# ---- softmax ---------------------------------------------------------------------------------------------------------


def _exp_sum(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return weights / weights.sum(-1, keepdim=True) @ v


def _exp_sum_masked(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k)) * m[:, None, None, :]
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def _exp_sum_filled(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k)).masked_fill(hidden(m), 0.0)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def _safe(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def _safe_amax(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k).masked_fill(hidden(m), LOW)
    weights = torch.exp(scores - torch.amax(scores, dim=-1, keepdim=True))
    return (weights / torch.sum(weights, dim=-1, keepdim=True)) @ v


def _safe_inplace(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q.detach(), k.detach())
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return scores.div_(scores.sum(-1, keepdim=True)) @ v


def _late(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def _late_safe(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k).masked_fill(hidden(m), -INF)
    weights = torch.exp(scores - scores.max(-1, keepdim=True)[0])
    total = weights.sum(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v) / total[..., None]


def _late_reciprocal(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return (weights @ v) * weights.sum(-1, keepdim=True).reciprocal()


def _log_sum_exp(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def _log_sum_exp_unsqueezed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    return torch.exp(scores - scores.logsumexp(-1)[..., None]) @ v


def _times_reciprocal(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return weights * (1.0 / weights.sum(-1, keepdim=True)) @ v


def _exp2(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp2(scored(q, k) * math.log2(math.e))
    return weights / weights.sum(-1, keepdim=True) @ v


def _power(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = 2.0 ** (scored(q, k) * math.log2(math.e))
    return weights / weights.sum(-1, keepdim=True) @ v


def _exp_sum_filled_by_where(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.where(hidden(m), 0.0, torch.exp(scored(q, k)))
    return weights / weights.sum(-1, keepdim=True) @ v


def _safe_masked_late(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    weights = torch.exp(scores - scores.amax(-1).unsqueeze(-1)) * ~hidden(m)
    return weights / weights.sum(-1, keepdim=True) @ v


SOFTMAXES: dict[str, Program] = {
    "functional": lambda q, k, v, m: F.softmax(scored(q, k), dim=-1) @ v,
    "module": lambda q, k, v, m: nn.Softmax(dim=-1)(scored(q, k)) @ v,
    "positive_dim": lambda q, k, v, m: torch.softmax(scored(q, k), dim=3) @ v,
    "dtype": lambda q, k, v, m: F.softmax(scored(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v,
    "upcast": lambda q, k, v, m: scored(q, k).double().softmax(-1).type_as(v) @ v,
    "safe_op": lambda q, k, v, m: torch.ops.aten._safe_softmax.default(scored(q, k), -1) @ v,
    "special": lambda q, k, v, m: torch.special.softmax(scored(q, k), -1) @ v,
    "exp_sum": _exp_sum,
    "exp_sum_masked": _exp_sum_masked,
    "exp_sum_filled": _exp_sum_filled,
    "exp_sum_filled_by_where": _exp_sum_filled_by_where,
    "safe_max": _safe,
    "safe_amax": _safe_amax,
    "safe_inplace": _safe_inplace,
    "safe_masked_late": _safe_masked_late,
    "safe_then_softmax": lambda q, k, v, m: attend(scored(q, k) - scored(q, k).amax(-1, keepdim=True), v),
    "late": _late,
    "late_safe": _late_safe,
    "late_reciprocal": _late_reciprocal,
    "log_softmax_exp": lambda q, k, v, m: scored(q, k).log_softmax(-1).exp() @ v,
    "log_softmax_exp_special": lambda q, k, v, m: torch.special.log_softmax(scored(q, k), -1).exp() @ v,
    "log_sum_exp": _log_sum_exp,
    "log_sum_exp_unsqueezed": _log_sum_exp_unsqueezed,
    "times_reciprocal": _times_reciprocal,
    "exp2": _exp2,
    "power": _power,
    "negated": lambda q, k, v, m: F.softmin(-scored(q, k), dim=-1) @ v,
}


# ---- masks -----------------------------------------------------------------------------------------------------------


def _index_put(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    scores[hidden(m).expand_as(scores)] = -INF
    return attend(scores, v)


def _augmented(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    scores += (1.0 - m[:, None, None, :].float()) * -10000.0
    return attend(scores, v)


def _in_one(sequence: Tensor) -> Tensor:
    """Which places are in one sequence."""
    return sequence[:, None] == sequence[None]


def _merged_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, SEQ_LEN, HEAD_DIM) for x in (q, k, v))
    scores = torch.bmm(q, k.mT).view(BATCH, HEADS, SEQ_LEN, SEQ_LEN).masked_fill(hidden(m), -INF)
    return torch.bmm(scores.view(-1, SEQ_LEN, SEQ_LEN).softmax(-1), v)


def _lengths(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    keep = torch.arange(SEQ_LEN)[None, :] < m.sum(-1)[:, None]
    return attend(torch.where(keep[:, None, None], scored(q, k), -1e9), v)


def _multiplied(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    keep = m[:, None, None, :].float()
    return attend(scored(q, k) * keep - 1e9 * (1 - keep), v)


def _hidden_again(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    probs = torch.softmax(scored(q, k).masked_fill(hidden(m), LOW), -1)
    return probs.masked_fill(hidden(m), 0.0) @ v


MASKS: dict[str, Program] = {
    "masked_fill": lambda q, k, v, m: attend(scored(q, k).masked_fill(hidden(m), -INF), v),
    "masked_fill_eq_0": lambda q, k, v, m: attend(scored(q, k).masked_fill(m[:, None, None, :] == 0, -1e9), v),
    "masked_fill_inplace": lambda q, k, v, m: attend(scored(q, k).masked_fill_(hidden(m), LOW), v),
    "masked_fill_tensor": lambda q, k, v, m: attend(scored(q, k).masked_fill(hidden(m), torch.tensor(-INF)), v),
    "where": lambda q, k, v, m: attend(torch.where(m[:, None, None, :], scored(q, k), LOW), v),
    "where_tensor": lambda q, k, v, m: attend(torch.where(hidden(m), torch.full([], -INF), scored(q, k)), v),
    "where_full": lambda q, k, v, m: attend(
        torch.where(m[:, None, None, :], scored(q, k), torch.full_like(scored(q, k), -1e9)), v
    ),
    "added": lambda q, k, v, m: attend(scored(q, k) + (1.0 - m[:, None, None, :].float()) * LOW, v),
    "added_inplace": _augmented,
    "added_where": lambda q, k, v, m: attend(scored(q, k) + torch.where(m, 0.0, -INF)[:, None, None, :], v),
    "added_left": lambda q, k, v, m: attend(
        torch.zeros(m.shape).masked_fill(~m, LOW)[:, None, None, :] + scored(q, k), v
    ),
    "subtracted": lambda q, k, v, m: attend(scored(q, k) - hidden(m).float() * 1e9, v),
    "log_of_mask": lambda q, k, v, m: attend(scored(q, k) + m[:, None, None, :].float().log(), v),
    "multiplied": _multiplied,
    "index_put": _index_put,
    "lengths": _lengths,
    "merged_heads": _merged_heads,
    "twice": lambda q, k, v, m: attend(
        scored(q, k).masked_fill(hidden(m), -INF) + torch.zeros(SEQ_LEN).masked_fill(~m[1], -1e9), v
    ),
    "then_nan_to_num": lambda q, k, v, m: torch.nan_to_num(scored(q, k).masked_fill(hidden(m), -INF).softmax(-1)) @ v,
    "hidden_again": _hidden_again,
    "packed": lambda q, k, v, m: attend(scored(q, k).masked_fill(~_in_one(torch.arange(SEQ_LEN) // 4), -INF), v),
    "packed_each": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=_in_one(torch.arange(2).repeat_interleave(6))
    ),
    "square": lambda q, k, v, m: attend(scored(q, k).masked_fill(hidden(m).expand(-1, 1, SEQ_LEN, -1), -1e9), v),
}


# ---- between softmax and the values ----------------------------------------------------------------------------------

AFTER: dict[str, Program] = {
    "dropout_eval": lambda q, k, v, m: F.dropout(torch.softmax(scored(q, k), -1), 0.1, training=False) @ v,
    "dropout_inplace": lambda q, k, v, m: F.dropout(torch.softmax(scored(q, k), -1), 0.1, False, inplace=True) @ v,
    "dropout_zero": lambda q, k, v, m: F.dropout(torch.softmax(scored(q, k), -1), 0.0, training=True) @ v,
    "contiguous": lambda q, k, v, m: torch.softmax(scored(q, k), -1).contiguous() @ v,
    "float": lambda q, k, v, m: torch.softmax(scored(q, k), -1).float() @ v,
    "merged_output": lambda q, k, v, m: attend(scored(q, k), v).transpose(1, 2).reshape(BATCH, SEQ_LEN, -1),
    "residual": lambda q, k, v, m: q + attend(scored(q, k), v),
    "wider_values": lambda q, k, v, m: attend(scored(q, k), torch.cat([v, v], -1)),
    "chained": lambda q, k, v, m: attend(scored(attend(scored(q, k), v), k), v),
}

TABLES = {
    "product": PRODUCTS,
    "sdpa": SDPA,
    "heads": SHARED,
    "scale": SCALES,
    "softmax": SOFTMAXES,
    "mask": MASKS,
    "after": AFTER,
}
TRAINED = ("product", "sdpa", "heads", "scale", "softmax", "mask")
"""Tables that are captured under grad mode as well; what they spell without a gradient (`safe_inplace`) included."""


def entries() -> list[Entry]:
    """Every spelling under no_grad, most of them under grad mode too."""
    found = []
    for train in (False, True):
        for table, programs in TABLES.items():
            for name, program in programs.items():
                if not train or table in TRAINED:
                    full = f"{table}/{name}" + ("/train" if train else "")
                    found.append(Entry(full, lambda p=program, t=train: (p, inputs(t)), train=train))
    return found
