"""Attention that Inductor's own fusion takes for something else (torch 2.13), and attention that it fuses rightly."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BATCH, HEADS, SEQ_LEN, DIM = 2, 3, 8, 8
PLACE = torch.arange(SEQ_LEN)
CAUSAL = PLACE[:, None] >= PLACE

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of q, k and v (batch, seq_len, heads, dim), and of a mask (batch, seq_len), an int that is 1 where a token is."""


def given() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, SEQ_LEN, HEADS, DIM, generator=generator) for _ in range(3))
    visible = (torch.arange(SEQ_LEN) < torch.tensor([[SEQ_LEN - 2], [3]])).long()
    return q, k, v, visible


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q.permute(0, 2, 1, 3) @ k.permute(0, 2, 1, 3).mT / 3.0


def attend(scores: Tensor, v: Tensor, dim: int = -1) -> Tensor:
    return scores.softmax(dim) @ v.permute(0, 2, 1, 3)


def by_key(hidden: Tensor) -> Tensor:
    return hidden.view(BATCH, 1, 1, SEQ_LEN).expand(BATCH, HEADS, SEQ_LEN, SEQ_LEN)


def by_query(hidden: Tensor) -> Tensor:
    return hidden.view(BATCH, 1, SEQ_LEN, 1).expand(BATCH, HEADS, SEQ_LEN, SEQ_LEN)


def _keys_permuted(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = q[:1], k[:1], v[:1]  # of more, the keys are copied
    return attend(q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1) / 3.0 + m[:1, None, None] * 0.1, v)


def _turned(order: tuple[int, ...]) -> Program:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 0, 2, 3).contiguous().permute(order) for x in (q, k, v))
        return (q @ k.mT / 3.0).softmax(-1) @ v

    return program


def _across_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3).contiguous().view(BATCH, -1, DIM) for x in (q, k, v))
    product = torch.bmm(q, k.transpose(1, 2)).view(BATCH, HEADS, SEQ_LEN, -1) + m.repeat(1, HEADS)[:, None, None]
    return torch.bmm(product.view(BATCH, HEADS * SEQ_LEN, -1).softmax(-1), v).view(BATCH, HEADS, SEQ_LEN, DIM)


def _run_time_scale(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3).contiguous() for x in (q, k, v))
    return (q @ k.mT / m.sum().sqrt() + torch.where(CAUSAL, 0.0, -torch.inf)).softmax(-1) @ v


def _weak_where(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3).contiguous() for x in (q, k, v))
    product = torch.where(CAUSAL, q @ k.permute(0, 1, 3, 2) / torch.full([], 3.0), torch.full([], -2.0))
    return (product + m[:, None, None] * 0.1).softmax(-1) @ v


def _shifted_by_another_dim(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    product = scores(q, k)
    weights = (product - product.amax(-2, keepdim=True)).exp()
    return weights / weights.sum(-2, keepdim=True) @ v.permute(0, 2, 1, 3)


def _shifted_by_maxima_of_keys(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    product = scores(q, k)
    weights = (product - product.amax(-2, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v.permute(0, 2, 1, 3)


def _exp_into_given(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    product = scores(q, k)
    weights = torch.exp(product - product.amax(-2, keepdim=True), out=torch.empty_like(product))
    return weights / weights.sum(-2, keepdim=True) @ v.permute(0, 2, 1, 3)


def _softmax_into_given(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    product = scores(q, k)
    probs = torch.ops.aten._softmax.out(product, -2, False, out=torch.empty_like(product))
    return probs @ v.permute(0, 2, 1, 3)


def _probs_written_later(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    probs = scores(q, k).softmax(-2)
    mixed = probs @ v.permute(0, 2, 1, 3)
    probs.as_strided((SEQ_LEN,), (SEQ_LEN + 1,)).zero_()
    return mixed


def _by_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.permute(0, 2, 1, 3) for x in tensors)


def _queries_divided(q: Tensor, k: Tensor, v: Tensor, m: Tensor, divisor: float | Tensor) -> Tensor:
    q, k, v = _by_heads(q, k, v)
    return (q / divisor @ k.mT).masked_fill(by_key(m == 0), -torch.inf).softmax(-1) @ v


def _half_queries_divided_by_head(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = _by_heads(q.half(), k.half(), v.half())
    return (q / torch.arange(1, HEADS + 1)[:, None, None] @ k.mT).softmax(-1) @ v


def _cast_to_int(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = _by_heads(q.half(), k.half(), v.half())
    return (q @ k.mT + m[:, None, None].half()).int().float().softmax(-1).half() @ v


CODES = torch.nn.Parameter(given()[1])
"""A parameter in the place of keys and values: no attention, which Inductor takes for it all the same."""

MISREAD: dict[str, Program] = {
    "codes_over_heads": lambda q, k, v, m: attend(scores(q, CODES), CODES, 1),
    "softmax_over_heads": lambda q, k, v, m: attend(scores(q, k), v, 1),
    "codes_scaled_at_run_time": lambda q, k, v, m: attend(
        scores(q, CODES) / m.sum().sqrt() + torch.where(CAUSAL, 0.0, -torch.inf), CODES
    ),
    "softmax_over_queries": lambda q, k, v, m: attend(scores(q, k), v, -2),
    "softmax_by_hand": _shifted_by_another_dim,
    "shifted_by_maxima_of_keys": _shifted_by_maxima_of_keys,
    "exp_into_given": _exp_into_given,
    "softmax_into_given": _softmax_into_given,
    "probs_written_later": _probs_written_later,
    "keys_permuted": _keys_permuted,
    "batch_second": _turned((1, 0, 2, 3)),
    "batch_third": _turned((2, 1, 0, 3)),
    "run_time_scale": _run_time_scale,
    "ones_hidden": lambda q, k, v, m: attend(scores(q, k).masked_fill(by_key(m == 1), -torch.inf), v),
    "queries_hidden": lambda q, k, v, m: attend(scores(q, k).masked_fill(by_query(m == 0), -1e9), v),
    "filled_weakly": lambda q, k, v, m: attend(scores(q, k).masked_fill(by_key(m == 0), -2.0), v),
    "filled_weakly_by_where": _weak_where,
    "viewed_across_heads": _across_heads,
    "divided_by_constant_tensor": lambda q, k, v, m: (
        (q @ k.mT / torch.tensor(1.5) + m[:, :, None, None] * 0.1).softmax(-1) @ v
    ),
    "queries_divided_by_tensor": lambda q, k, v, m: _queries_divided(q, k, v, m, m.sum().sqrt()),
    "queries_divided_by_head": _half_queries_divided_by_head,
    "added_twice": lambda q, k, v, m: attend(torch.add(scores(q, k), m[:, None, None] * 0.5, alpha=2), v),
    "added_in_one_dim": lambda q, k, v, m: attend(scores(q, k) + m[0] * 0.5, v),
    "cast_to_int": _cast_to_int,
}
"""Ops as in a pattern; their dims, orders or numbers are others."""


def _filled_by_where(divisor: float, copies: int = 1) -> Program:
    def program(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        q, k, v = _by_heads(q, k, torch.cat([v] * copies, -1))
        product = q @ k.permute(0, 1, 3, 2) / torch.full([], divisor)
        hidden = torch.full([], torch.finfo(q.dtype).min)
        return torch.where(CAUSAL, product, hidden).softmax(-1) @ v + torch.cat([k] * copies, -1) + v

    return program


FUSED: dict[str, Program] = {
    "divided": lambda q, k, v, m: attend(scores(q, k), v),
    "zeros_hidden": lambda q, k, v, m: attend(scores(q, k).masked_fill(by_key(m == 0), -torch.inf), v),
    "added": lambda q, k, v, m: attend(scores(q, k) + (1.0 - m[:, None, None]) * -1e4, v),
    "contiguous": lambda q, k, v, m: (q @ k.mT * 0.3).softmax(-1) @ v,
    "no_permutation": lambda q, k, v, m: F.softmax((q @ k.mT / DIM**0.5) + m[:, :, None, None] * 0.1, -1) @ v,
    "half": lambda q, k, v, m: (q.half() @ k.half().mT / 1.5).softmax(-1) @ v.half(),
    "half_masked_by_heads": lambda q, k, v, m: attend(
        scores(q.half(), k.half()) + (1 - m[:, None, None]).half() * -1e4, v.half()
    ),
    "filled_by_where": _filled_by_where(DIM**0.5),
}
"""What is to be left to it."""


def _cast(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3).half() for x in (q, k, v))
    return (q @ k.mT / 1.5).float().softmax(-1).half() @ v


def _cast_after_queries_are_divided(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3).half() for x in (q, k, v))
    return (q / 1.5 @ k.mT).float().softmax(-1).half() @ v


DIVIDED: dict[str, Program] = {
    "no_permutation": lambda q, k, v, m: F.softmax((q @ k.mT / 1.5) + m[:, :, None, None] * 0.1, -1) @ v,
    "cast": _cast,
    "cast_after_queries_are_divided": _cast_after_queries_are_divided,
    "half": lambda q, k, v, m: attend(scores(q.half(), k.half()), v.half()),
    "half_with_zeros": lambda q, k, v, m: attend(
        scores(q.half(), k.half()) + torch.zeros_like(m[:, None, None]), v.half()
    ),
    "one_sequence": lambda q, k, v, m: attend(scores(q[:1], k[:1]) + m[:1, None, None] * 0.1, v[:1]),
    "queries_alone": lambda q, k, v, m: _queries_divided(q, k, v, m, 1.5),
    "true": lambda q, k, v, m: F.softmax((q @ k.mT / True) + m[:, :, None, None] * 0.1, -1) @ v,
    "product_added": lambda q, k, v, m: (
        torch.addcmul(q @ k.mT / 1.5, m[:, :, None, None], m[:, :, None, None]).softmax(-1) @ v
    ),
    "filled_by_where": _filled_by_where(1.5),
    "filled_by_where_before_wide_values": _filled_by_where(DIM**0.5, copies=2),
}
"""What torch 2.11 fuses as if it were divided by sqrt(head_dim), and torch 2.13 rightly."""
