"""Monarch attention as a dense matrix, by loops over blocks: slow, obvious, and independent of the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """The N_q x N_k matrix of one head and the objective after every iteration."""

    matrix: Tensor
    objectives: tuple[float, ...]


def dense_monarch(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    *,
    block_size: int,
    scale: float,
    num_iters: int,
    init: str,
    pad: str,
) -> Dense:
    """One head: q (N_q, D), k (N_k, D), visible (N_k,) bool, float64: arXiv 2505.18698, section 3, to the letter."""
    n_q, n_k = len(q), len(k)
    blocks = -(-n_k // block_size)
    rows = block_size if n_q == n_k else -(-n_q // blocks)
    row_at = _places(n_q, blocks, rows, pad)
    key_at = _places(n_k, blocks, block_size, pad)
    left = torch.zeros(rows, blocks, blocks, dtype=q.dtype)  # (j, b, l)
    for j in range(rows):
        left[j] = torch.eye(blocks) if init == "identity" else torch.full((blocks, blocks), 1 / blocks)
    objectives = []
    matrix = torch.zeros(n_q, n_k, dtype=q.dtype)
    for _ in range(num_iters):
        right, a, c = _right(q, k, visible, left, row_at, key_at, scale)
        left = _left(q, a, c, row_at)
        matrix = _assemble(left, right, row_at, key_at, n_q, n_k)
        objectives.append(objective(matrix, scale * q @ k.mT))
    return Dense(matrix, tuple(objectives))


def objective(matrix: Tensor, scores: Tensor) -> float:
    """<A, S> + H(A) over entries that are not zero."""
    kept = matrix > 0
    return float((matrix[kept] * scores[kept]).sum() - (matrix[kept] * matrix[kept].log()).sum())


def _places(n: int, blocks: int, size: int, pad: str) -> list[list[int | None]]:
    """For each block and offset, the row or key there, None for padding."""
    start = 0 if pad == "post" else blocks * size - n
    return [
        [p - start if start <= p < start + n else None for p in range(b * size, (b + 1) * size)] for b in range(blocks)
    ]


def _right(q, k, visible, left, row_at, key_at, scale):  # type: ignore[no-untyped-def]
    blocks, rows, dim = len(key_at), len(row_at[0]), q.shape[1]
    right: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
    a, c = {}, {}
    for b in range(blocks):
        keys = [n for n in key_at[b] if n is not None and visible[n]]
        for j in range(rows):
            weight, total = 0.0, torch.zeros(dim, dtype=q.dtype)
            for row_block in range(blocks):
                if row_at[row_block][j] is not None:
                    weight += float(left[j, b, row_block])
                    total += left[j, b, row_block] * q[row_at[row_block][j]]
            mean = total / weight if weight > 0 else total
            if not keys:
                right[b, j], a[b, j], c[b, j] = ([], q[:0, 0]), None, None
                continue
            share = torch.softmax(scale * k[keys] @ mean, 0)
            right[b, j] = (keys, share)
            a[b, j] = scale * share @ k[keys]
            c[b, j] = float(torch.xlogy(share, share).sum())
    return right, a, c


def _left(q, a, c, row_at):  # type: ignore[no-untyped-def]
    blocks, rows = len(row_at), len(row_at[0])
    left = torch.zeros(rows, blocks, blocks, dtype=q.dtype)
    for row_block in range(blocks):
        for j in range(rows):
            row = row_at[row_block][j]
            seen = [b for b in range(blocks) if a[b, j] is not None]
            if row is not None and seen:
                logits = torch.stack([a[b, j] @ q[row] - c[b, j] for b in seen])
                left[j, seen, row_block] = torch.softmax(logits, 0)
    return left


def _assemble(left, right, row_at, key_at, n_q, n_k):  # type: ignore[no-untyped-def]
    matrix = torch.zeros(n_q, n_k, dtype=left.dtype)
    for row_block, places in enumerate(row_at):
        for j, row in enumerate(places):
            if row is not None:
                for b in range(len(key_at)):
                    keys, share = right[b, j]
                    matrix[row, keys] = left[j, b, row_block] * share
    return matrix
