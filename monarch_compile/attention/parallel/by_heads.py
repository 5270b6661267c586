"""Sequence parallelism by an all-to-all over heads: each rank computes some heads of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monarch_compile.attention.parallel.exchange import Ranks, exchange, from_all
from monarch_compile.attention.parallel.spread import Spread

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of q, k, v and a key mask of the whole sequence."""


def heads_divide(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether each rank can take as many heads, query heads with the key heads that they share."""
    return heads % ranks == 0 and kv_heads % ranks == 0


def attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, spread: Spread, ranks: Ranks, attend: Attend
) -> Tensor:
    """Attention of this rank's piece: q (E, H, n, D), k (E, H_kv, n, D), v (E, H_kv, n, D_v) -> (E, H, n, D_v).

    key_mask: (E, n), of the rank's own tokens, or None on all ranks. H and H_kv are multiples of the number of ranks.
    """
    sizes = [spread.tokens_of(rank) for rank in range(ranks.size)]
    whole = [_by_heads(x, sizes, ranks) for x in (q, k, v)]
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = from_all(key_mask.to(torch.uint8), 1, sizes, ranks).to(torch.bool)
    elif key_mask is not None:
        key_mask = from_all(key_mask, 1, sizes, ranks)
    output = attend(whole[0], whole[1], whole[2], key_mask)
    batch, own_heads, _, value_dim = output.shape
    parts = list(torch.split(output, sizes, 2))
    shapes = [(batch, own_heads, sizes[ranks.rank], value_dim)] * ranks.size
    return torch.cat(exchange(parts, shapes, ranks), 1)


def _by_heads(x: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
    """From a piece (E, H, n, D) of all heads to some heads (E, H / ranks, N, D) of the sequence."""
    parts = list(x.chunk(ranks.size, 1))
    batch, heads, _, dim = parts[0].shape
    return torch.cat(exchange(parts, [(batch, heads, size, dim) for size in sizes], ranks), 2)
