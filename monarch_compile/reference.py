"""Eager semantics of Monarch attention: the oracle, and the form Inductor compiles where there is no Triton.

The iteration is section 3 of arXiv 2505.18698 (alternating maximisation over the two Monarch factors), written with
`c = qhat . a - logsumexp(scores)` in place of `sum R log R`, which it equals.
Index letters: l, b blocks (of queries, of keys); j, i offsets in a block (of a query, of a key).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    block_size: int,
    scale: float,
    num_iters: int = 1,
    init: str = "identity",
    pad: str = "post",
) -> Tensor:
    """Monarch attention of q (E, H, N_q, D), k (E, H, N_k, D), v (E, H, N_k, D_v) -> (E, H, N_q, D_v).

    `key_mask` (E, N_k) bool is True where a key is visible. A row that sees no key outputs 0. float16 and bfloat16 are
    computed in float32. The output's memory order is (batch, seq, heads, dim), so that merging the heads is a view.
    """
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    seq_len_q, seq_len_k = q.shape[2], k.shape[2]
    num_blocks = -(-seq_len_k // block_size)
    block_size_q = block_size if seq_len_q == seq_len_k else -(-seq_len_q // num_blocks)
    q, k, v = (
        _to_blocks(x, num_blocks, size, pad) for x, size in ((q, block_size_q), (k, block_size), (v, block_size))
    )
    visible = _visible_keys(k, seq_len_k, block_size, num_blocks, pad, key_mask)
    row_is_real = _real_rows(q, seq_len_q, pad)

    # Operands of the batched products are laid out once, rows contiguous: `*_at` by query offset, the others by block.
    q_at = _by_offset(q)  # (E, H, j, l, D)
    qhat_at = q_at if init == "identity" else _mean_query(q_at, row_is_real)
    keys, values = k.contiguous(), v.contiguous()
    for step in range(num_iters):
        last = step == num_iters - 1
        qhat = qhat_at.transpose(2, 3).expand(-1, -1, num_blocks, -1, -1)  # (E, H, b, j, D)
        right, local_lse = _softmax_lse(scale * _bmm(qhat, keys, transposed=True), visible)  # (E, H, b, j, i)
        a_at = _by_offset(scale * _bmm(right, keys))  # (E, H, j, b, D)
        c = (qhat_at * a_at).sum(-1) - local_lse.transpose(2, 3)  # (E, H, j, b)
        logits = _bmm(a_at, q_at, transposed=True) - c.unsqueeze(-1)  # (E, H, j, b, l)
        left = _softmax_lse(logits, None if visible is None else _seen_blocks(visible), dim=-2)[0]
        if not last:
            qhat_at = _next_query(left, q_at, row_is_real)
    z = _bmm(left.transpose(-1, -2), _by_offset(_bmm(right, values)))  # (E, H, j, l, D_v)
    return _from_blocks(z, seq_len_q, pad).to(dtype)


def _by_offset(x: Tensor) -> Tensor:
    """From (E, H, block, offset, D) to (E, H, offset, block, D), contiguous."""
    return x.transpose(2, 3).contiguous()


def _bmm(x: Tensor, y: Tensor, *, transposed: bool = False) -> Tensor:
    """x @ y, or x @ y^T, over three leading batch dimensions.

    torch.matmul would lay out a transposed operand anew; a transposed view costs a batched product nothing.
    """
    x3, y3 = x.flatten(0, 2), y.flatten(0, 2)
    return torch.unflatten(torch.bmm(x3, y3.mT if transposed else y3), 0, x.shape[:3])


def _to_blocks(x: Tensor, num_blocks: int, size: int, pad: str) -> Tensor:
    missing = num_blocks * size - x.shape[2]
    if missing:
        x = F.pad(x, (0, 0, 0, missing) if pad == "post" else (0, 0, missing, 0))
    return x.reshape(x.shape[0], x.shape[1], num_blocks, size, x.shape[3])


def _from_blocks(z: Tensor, seq_len: int, pad: str) -> Tensor:
    batch, heads, size, num_blocks, dim = z.shape
    rows = z.permute(0, 3, 2, 1, 4).reshape(batch, num_blocks * size, heads, dim)
    start = 0 if pad == "post" else num_blocks * size - seq_len
    return rows[:, start : start + seq_len].transpose(1, 2)


def _positions(x: Tensor, seq_len: int, pad: str) -> Tensor:
    """Whether position (block, offset) of the padded sequence is a real one: (blocks, size) bool."""
    num_blocks, size = x.shape[2], x.shape[3]
    start = 0 if pad == "post" else num_blocks * size - seq_len
    index = torch.arange(num_blocks * size, device=x.device).view(num_blocks, size)
    return (index >= start) & (index < start + seq_len)


def _visible_keys(
    k: Tensor, seq_len: int, size: int, num_blocks: int, pad: str, key_mask: Tensor | None
) -> Tensor | None:
    """Visible keys, broadcastable to scores (E, H, b, j, i), or None where every key is."""
    if key_mask is not None:
        missing = num_blocks * size - seq_len
        padded = F.pad(key_mask, (0, missing) if pad == "post" else (missing, 0), value=False)
        return padded.view(key_mask.shape[0], 1, num_blocks, 1, size)
    if num_blocks * size == seq_len:
        return None
    return _positions(k, seq_len, pad).view(1, 1, num_blocks, 1, size)


def _seen_blocks(visible: Tensor) -> Tensor:
    """Blocks with a visible key, broadcastable to logits (E, H, j, l, b)."""
    return visible.any(-1).squeeze(-1)[:, :, None, :, None]


def _real_rows(q: Tensor, seq_len: int, pad: str) -> Tensor | None:
    """(1, 1, j, l, 1) bool: query rows that are not padding, or None where all are real."""
    num_blocks, size = q.shape[2], q.shape[3]
    if num_blocks * size == seq_len:
        return None
    return _positions(q, seq_len, pad).t().view(1, 1, size, num_blocks, 1)


def _softmax_lse(scores: Tensor, visible: Tensor | None, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Softmax over the last dim and its logsumexp; a row that sees nothing gives zeros and a finite, unused lse."""
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    top = scores.detach().amax(dim, keepdim=True)
    if visible is not None:
        top = top.masked_fill(top == float("-inf"), 0.0)
    weights = (scores - top).exp()
    total = weights.sum(dim, keepdim=True)
    if visible is not None:
        total = total.masked_fill(total == 0, 1.0)
    return weights / total, (top + total.log()).squeeze(dim)


def _mean_query(q_at: Tensor, row_is_real: Tensor | None) -> Tensor:
    """The mean start: qbar / w is the mean real query at each offset, the same for every block: (E, H, j, 1, D)."""
    if row_is_real is None:
        return q_at.mean(3, keepdim=True)
    real = row_is_real.to(q_at.dtype)
    return (q_at * real).sum(3, keepdim=True) / real.sum(3, keepdim=True).clamp(min=1)


def _next_query(left: Tensor, q_at: Tensor, row_is_real: Tensor | None) -> Tensor:
    """qbar / w of the next iteration, (E, H, j, b, D); 0 where no row gives the block any weight."""
    if row_is_real is not None:
        left = left * row_is_real.transpose(-1, -2)
    weight = left.sum(-1)  # (E, H, j, b)
    total = _bmm(left, q_at)  # (E, H, j, b, D)
    return total / weight.masked_fill(weight == 0, 1.0).unsqueeze(-1)
