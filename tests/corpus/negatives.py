"""What must not be touched: attention that a Monarch matrix cannot hold, near misses, and softmaxes of other kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.corpus.entry import Entry
from tests.corpus.spellings import BATCH, HEAD_DIM, HEADS, SEQ_LEN, Program, attend, hidden, inputs, scored

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


def _positions_by_row_and_column(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """As in ViTDet and SAM: one table for the rows of an image, one for its columns."""
    scores = scored(q, k).view(BATCH, HEADS, 3, 4, 3, 4)
    scores = scores + scored(q, k[:, :, :3]).view(BATCH, HEADS, 3, 4, 3, 1)
    return attend(
        (scores + scored(q, k[:, :, :4]).view(BATCH, HEADS, 3, 4, 1, 4)).view(BATCH, HEADS, SEQ_LEN, SEQ_LEN), v
    )


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


def _keypoints(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    maps = F.relu(scored(q, k))  # softmax over an image, not over the keys of a query
    return maps.flatten(2).softmax(-1).view_as(maps) @ v


def _pooling(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    weights = torch.softmax(torch.tanh(q).sum(-1), -1)
    return (weights[..., None] * v).sum(-2)


def _out_of_matmul(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q.new_empty(BATCH, HEADS, SEQ_LEN, SEQ_LEN)
    torch.matmul(q, k.mT, out=scores)
    return attend(scores, v)


def _out_of_softmax(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = scored(q, k)
    torch.softmax(scores, -1, out=scores)
    return scores @ v


def _in_steps(scores: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        scores = scores + 0.1
    return scores


class TalkingHeads(nn.Module):
    """Layers between the heads, as in CaiT."""

    def __init__(self, before: bool, after: bool) -> None:
        super().__init__()
        self.before = nn.Linear(HEADS, HEADS) if before else None
        self.after = nn.Linear(HEADS, HEADS) if after else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = scored(q, k)
        if self.before is not None:
            scores = self.before(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        probs = scores.softmax(-1)
        if self.after is not None:
            probs = self.after(probs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return probs @ v


class PairBias(nn.Module):
    """A bias that a layer makes of pairs of places, as in AlphaFold: nothing mixes the heads of the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Linear(HEAD_DIM, HEADS)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        pairs = k[:, 0, :, None] * v[:, 0, None]
        return attend(scored(q, k) + self.bias(pairs).permute(0, 3, 1, 2), v)


class Gate(nn.Module):
    """Softmaxes beside layers whose weights are computed, but of parameters alone: no keys and no values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HEAD_DIM, SEQ_LEN), nn.Linear(SEQ_LEN, HEAD_DIM)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        weight = self.second.weight.square()
        return F.linear(self.first(q).softmax(-1), weight) + F.linear(q, self.first.weight.square()).softmax(-1) @ v


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
    "positions_by_row_and_column": _positions_by_row_and_column,
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
    "out_of_matmul": _out_of_matmul,
    "out_of_softmax": _out_of_softmax,
    "sum_of_products": lambda q, k, v, m: attend((q[:, :, :, None] * k[:, :, None]).sum(-1), v),
    "linear_scores": lambda q, k, v, m: attend(F.linear(q[0, 0], k[0, 0]), v[0, 0]),
    "linear_values": lambda q, k, v, m: F.linear(scored(q[0, 0], k[0, 0]).softmax(-1), v[0, 0].T),
    "inner_scores": lambda q, k, v, m: attend(torch.inner(q[0, 0], k[0, 0]), v[0, 0]),
    "baddbmm_values": lambda q, k, v, m: torch.baddbmm(q[0], scored(q[0], k[0]).softmax(-1), v[0]),
    "talking_heads_by_a_layer": TalkingHeads(before=True, after=False),
    "talking_heads_by_a_layer_after": TalkingHeads(before=False, after=True),
    "pair_bias": PairBias(),
    "long_softcap": lambda q, k, v, m: attend(_in_steps(20 * torch.tanh(scored(q, k) / 20), 12), v),
    "empty": lambda q, k, v, m: F.scaled_dot_product_attention(q[:0], k[:0], v[:0]),
    "one_query": lambda q, k, v, m: F.scaled_dot_product_attention(q[:, :, :1], k, v),
    "kernel_by_name": lambda q, k, v, m: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0],
    "cosine_of_scores": lambda q, k, v, m: attend(scored(q, k).cos(), v),
}
"""Attention, exact for a reason."""

NO_ATTENTION: dict[str, Program] = {
    "linear_attention": _linear_attention,
    "router": _router,
    "classifier": _classifier,
    "attention_pooling": _pooling,
    "keypoints": _keypoints,
    "gate": Gate(),
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
