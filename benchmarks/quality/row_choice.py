"""Causal attention whose rows choose for themselves which far keys they see, emulated; no kernel computes this.

Chosen are pieces of `piece` keys, by the product of a row's query with the mean of a piece's keys. Shares are a softmax
over all pieces before the row's own, also those that it sees anyway, and are summed over the query heads that share a
key head. A row's choice depends on its own queries, and on keys that lie before it.

Nothing here is fast: scores of all pairs are formed, and masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

ROWS = 512
"""Rows that are attended with at once."""
PIECE = 8
"""Keys of a piece, of those that were tried (benchmarks/NOTES.md)."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    block_size: int,
    window: int,
    sinks: int,
    chosen: int,
    piece: int,
) -> Tensor:
    """Causal attention, exact, to a row's own block, `window` before it, the first `sinks` and its chosen pieces.

    q (E, H, N, D), k (E, H_kv, N, D), v (E, H_kv, N, D_v) -> (E, H, N, D_v). chosen: blocks that the pieces of a row
    hold as many keys as; `block_size` is a multiple of `piece`.
    """
    parts = []
    group = q.shape[1] // k.shape[1]
    for rows, seen in _seen(q, k, scale, block_size, window, sinks, chosen, piece):
        end = rows.stop
        keys, values = (x[:, :, :end].repeat_interleave(group, 1) for x in (k, v))
        mask = seen.repeat_interleave(group, 1)
        parts.append(scaled_dot_product_attention(q[:, :, rows], keys, values, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


def share_of_exact_keys(seq_len: int, *, block_size: int, window: int, sinks: int, chosen: int) -> float:
    """Keys that rows see exactly, at most, as a share of those that exact causal attention sees, over all rows."""
    exact = 0
    for row in range(seq_len):
        block = row // block_size
        blocks = min(block, window + sinks + chosen)
        exact += blocks * block_size + row % block_size + 1
    return exact / (seq_len * (seq_len + 1) / 2)


def _seen(
    q: Tensor,
    k: Tensor,
    scale: float,
    block_size: int,
    window: int,
    sinks: int,
    chosen: int,
    piece: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and which of the keys up to the last of them each sees, (E, H_kv, rows, keys)."""
    batch, heads, length, dim = k.shape
    group, count = q.shape[1] // heads, length // piece
    pieces = k[:, :, : count * piece].reshape(batch, heads, count, piece, dim)
    mean = pieces.mean(3)
    block_of = torch.arange(length, device=q.device) // block_size
    first_of = torch.arange(count, device=q.device) * piece // block_size
    for start in range(0, length, ROWS):
        rows = slice(start, min(start + ROWS, length))
        queries = q[:, :, rows].unflatten(1, (heads, group))
        scores = scale * torch.einsum("ehgnd,ehpd->ehgnp", queries, mean)
        is_past = (
            torch.arange(count, device=q.device)
            < torch.arange(rows.start, rows.stop, device=q.device)[:, None] // piece
        )
        is_candidate = (block_of[rows, None] - first_of > window) & (first_of >= sinks)
        shares = scores.masked_fill(~is_past, -math.inf).softmax(-1).nan_to_num().sum(2)
        shares = shares.masked_fill(~is_candidate, -1.0)
        best, index = shares.sort(dim=-1, descending=True, stable=True)  # of equal shares the first
        most = chosen * block_size // piece
        taken = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, index[..., :most], best[..., :most] >= 0)
        places = torch.arange(rows.stop, device=q.device)
        behind = block_of[rows, None] - block_of[: rows.stop]
        seen = ((behind <= window) | (block_of[: rows.stop] < sinks)).expand(batch, heads, -1, -1)
        of_keys = taken.repeat_interleave(piece, -1)
        of_keys = torch.nn.functional.pad(of_keys, (0, length - of_keys.shape[-1]))[..., : rows.stop]
        yield rows, (seen | of_keys) & (places <= torch.arange(rows.start, rows.stop, device=q.device)[:, None])
