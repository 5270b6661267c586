"""Attention that must fail: were it judged as good as exact attention, the judgement would be worth nothing.

q (E, H, N_q, D), k (E, H, N_k, D), v (E, H, N_k, D_v), key_mask (E, N_k) True = visible, or None; output
(E, H, N_q, D_v). A row that sees no key gives 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def uniform(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Every query attends to all visible keys alike: the mean of their values, whatever q and k are."""
    visible = v.new_ones(k.shape[0], k.shape[2]) if key_mask is None else key_mask.to(v.dtype)
    mean = (visible[:, None, None] @ v) / visible.sum(-1).clamp(min=1)[:, None, None, None]
    return mean.expand(*q.shape[:3], v.shape[3])


def block_diagonal(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *, scale: float, block_size: int
) -> Tensor:
    """Every query attends to the `block_size` keys of its own block, exactly, and to no other.

    Where there are fewer or more queries than keys they are cut into as many blocks as the keys.
    """
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    num_blocks = -(-keys // block_size)
    block_rows = block_size if rows == keys else -(-rows // num_blocks)
    visible = torch.ones(batch, keys, dtype=torch.bool, device=k.device) if key_mask is None else key_mask
    mask = pad(visible, (0, num_blocks * block_size - keys)).reshape(batch, 1, num_blocks, 1, block_size)
    output = scaled_dot_product_attention(
        _blocks(q, num_blocks, block_rows),
        _blocks(k, num_blocks, block_size),
        _blocks(v, num_blocks, block_size),
        attn_mask=mask,
        scale=scale,
    )
    output = output.where(mask.any(-1, keepdim=True), 0.0)
    return output.reshape(batch, heads, num_blocks * block_rows, v.shape[3])[:, :, :rows]


def listed_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, block_size: int, window: int, sinks: int, random: int = 0
) -> Tensor:
    """Causal attention, exact, to a query's own block, `window` before it, the first `sinks`, and `random` others.

    As many queries as keys; heads of k and v may be shared. Random blocks, of those that come before, are others for
    each head and block of queries, and the same at each call.
    """
    rows, group = q.shape[2], q.shape[1] // k.shape[1]
    count = -(-rows // block_size)
    place = torch.arange(count)
    before = place[:, None] - place  # (blocks of queries, blocks of keys)
    near = (before <= window) | (place < sinks)
    order = torch.rand(q.shape[1], count, count, generator=torch.Generator().manual_seed(0))
    order = order.masked_fill(near | (before < 0), 2.0)
    drawn = torch.zeros(order.shape, dtype=torch.bool)
    if random:
        best = order.argsort(-1)[..., :random]
        drawn = drawn.scatter(-1, best, True)
    seen = ((near | drawn) & (before >= 0)).to(q.device)
    parts = []
    for block in range(count):
        start, end = block * block_size, min((block + 1) * block_size, rows)
        keys = seen[:, block].repeat_interleave(block_size, 1)[:, None, :end]
        at = torch.arange(end, device=q.device)
        mask = keys & (at <= at[start:end, None])
        shared = (x[:, :, :end].repeat_interleave(group, 1) for x in (k, v))
        parts.append(scaled_dot_product_attention(q[:, :, start:end], *shared, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


def _blocks(x: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """(E, H, N, D) -> (E, H, blocks, block size, D), zeros after the end."""
    padded = pad(x, (0, 0, 0, num_blocks * block_size - x.shape[2]))
    return padded.reshape(*x.shape[:2], num_blocks, block_size, x.shape[3])
