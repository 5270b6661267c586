"""What must not be touched: attention that a Monarch matrix cannot hold, near misses, and softmaxes of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.corpus.entry import Entry
from tests.corpus.spellings import BATCH, HEADS, SEQ_LEN, Program, attend, hidden, inputs, scored

PLACE = torch.arange(SEQ_LEN)


def _gram(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    scores = scored(q, k)
    return attend(scores, v), scores


def _probs_returned(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    probs = torch.softmax(scored(q, k), -1)
    return probs @ v, probs.mean(1)


def _talking_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    mix = v[0, :, 0, :HEADS]
    scores = torch.einsum("bhqk,hg->bgqk", scored(q, k), mix)
    return torch.softmax(scores, -1) @ v


def _talking_heads_after(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.einsum("bhqk,hg->bgqk", torch.softmax(scored(q, k), -1), v[0, :, 0, :HEADS]) @ v


def _quiet_softmax(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return weights / (weights.sum(-1, keepdim=True) + 1) @ v


def _sinks(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    sink = v[:, :, :1, :1].expand(-1, -1, SEQ_LEN, -1)
    return torch.softmax(torch.cat([scored(q, k), sink], -1), -1)[..., :-1] @ v


def _sum_over_queries(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return weights / weights.sum(-2, keepdim=True) @ v


def _sum_without_keepdim(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return weights / weights.sum(-1)[:, :, None, :] @ v


def _sum_of_others(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.exp(scored(q, k))
    return weights / torch.exp(scored(k, q)).sum(-1, keepdim=True) @ v


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def _gated(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (torch.softmax(scored(q, k), -1) * torch.sigmoid(scored(k, q))) @ v


def _relative_position(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    table = v.detach()[0, 0, :, 0]
    return attend(scored(q, k) + table[(PLACE[:, None] - PLACE[None]).abs()], v)


def _transformer_xl(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return attend(scored(q, k) + scored(q, v), v)


def _alibi(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125])[:, None, None]
    return attend(scored(q, k) - slopes * (PLACE[:, None] - PLACE[None]).abs(), v)


def _top_k(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    return attend(scores.masked_fill(scores < scores.topk(4, -1).values[..., -1:], float("-inf")), v)


def _twice(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    probs = torch.softmax(scored(q, k), -1)
    return (probs @ probs) @ v


def _partly(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(scored(q, k), -1)[..., :6] @ v[:, :, :6]


def _router(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    gates = torch.softmax(q @ k[0, 0, :4].mT, -1)  # tokens choose among four experts
    return gates.topk(2).values.sum(-1)


def _classifier(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return torch.softmax(q @ k[0, 0].mT, -1).argmax(-1)


def _pooling(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.softmax(torch.tanh(q).sum(-1), -1)
    return (weights[..., None] * v).sum(-2)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Any]] = {
    "scores_returned": _gram,
    "probs_returned": _probs_returned,
    "talking_heads": _talking_heads,
    "talking_heads_after": _talking_heads_after,
    "quiet_softmax": _quiet_softmax,
    "sinks": _sinks,
    "softcap": lambda q, k, v, m: attend(20 * torch.tanh(scored(q, k) / 20), v),
    "dropout": lambda q, k, v, m: F.dropout(torch.softmax(scored(q, k), -1), 0.1, training=True) @ v,
    "sdpa_dropout": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
    "sum_over_queries": _sum_over_queries,
    "sum_without_keepdim": _sum_without_keepdim,
    "sum_of_others": _sum_of_others,
    "gated": _gated,
    "relative_position": _relative_position,
    "transformer_xl": _transformer_xl,
    "alibi": _alibi,
    "top_k": _top_k,
    "probs_squared": _twice,
    "probs_sliced": _partly,
    "sigmoid_attention": lambda q, k, v, m: torch.sigmoid(scored(q, k)) @ v,
    "softmax_over_queries": lambda q, k, v, m: scored(q, k).softmax(-2) @ v,
    "softmax_over_heads": lambda q, k, v, m: scored(q, k).softmax(1) @ v,
    "weak_fill": lambda q, k, v, m: attend(scored(q, k).masked_fill(hidden(m), -5.0), v),
    "filled_then_scaled": lambda q, k, v, m: attend(scored(q, k).masked_fill(hidden(m), -1e9) * -1.0, v),
    "opaque_mask": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=v[..., :1].mT),
    "causal": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "causal_tril": lambda q, k, v, m: attend(
        scored(q, k).masked_fill(~torch.ones(SEQ_LEN, SEQ_LEN).tril().bool(), float("-inf")), v
    ),
    "sliding_window": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(PLACE[:, None] - PLACE[None]).abs() < 3
    ),
    "prefix_causal": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(PLACE[None] <= PLACE[:, None]) | (PLACE < 4)
    ),
    "packed": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=((PLACE // 5)[:, None] == (PLACE // 5)[None])
    ),
    "packed_unequally": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=((torch.arange(SEQ_LEN) // 5)[:, None] == torch.arange(SEQ_LEN) // 5)
    ),
    "query_mask": lambda q, k, v, m: F.scaled_dot_product_attention(
        q, k, v, attn_mask=m[:, None, :, None] | m[:, None, None, :]
    ),
    "cross": lambda q, k, v, m: F.scaled_dot_product_attention(q[:, :, :5], k, v),
    "grouped_unequally": lambda q, k, v, m: F.scaled_dot_product_attention(q, k[:, :1], v, enable_gqa=True),
    "grouped_batch": lambda q, k, v, m: F.scaled_dot_product_attention(q[0], k[0, :1], v[0, :1], enable_gqa=True),
    "half_values": lambda q, k, v, m: torch.softmax(scored(q, k), -1).half() @ v.half(),
    "clamped": lambda q, k, v, m: attend(scored(q, k).clamp(-3, 3), v),
    "squared_relu": lambda q, k, v, m: F.relu(scored(q, k)).square() @ v,
    "cosine_of_scores": lambda q, k, v, m: attend(scored(q, k).cos(), v),
}
"""Attention, exact for a reason."""

NO_ATTENTION: dict[str, Program] = {
    "linear_attention": _linear_attention,
    "router": _router,
    "classifier": _classifier,
    "attention_pooling": _pooling,
    "mixture": lambda q, k, v, m: torch.softmax(q[0, 0], -1).mm(k[0, 0].mT),
    "flattened": lambda q, k, v, m: scored(q, k).flatten(-2).softmax(-1).view(BATCH, HEADS, SEQ_LEN, SEQ_LEN) @ v,
}
"""Softmaxes of other kinds."""


def entries() -> list[Entry]:
    """Every negative under no_grad."""
    tables = {"attention": ATTENTION, "other": NO_ATTENTION}
    return [
        Entry(f"{table}/{name}", lambda p=program: (p, inputs()), want="exact")
        for table, programs in tables.items()
        for name, program in programs.items()
    ]
