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


@dataclass(frozen=True)
class Layout:
    """Which row and which keys stand where, and which keys are exact for a row.

    row_at, key_at: for each block and offset the row or key there, None for padding. near_at: for each row the visible
    keys of its exact groups. far_at: for each row the blocks of its far field; none for a row that is exact throughout.
    """

    row_at: list[list[int | None]]
    key_at: list[list[int | None]]
    near_at: list[list[int]]
    far_at: list[list[int]]


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
    window: int | None = None,
    prefix: int = 0,
    bias: Tensor | None = None,
) -> Dense:
    """One head: q (N_q, D), k (N_k, D), visible (N_k,) bool, float64: arXiv 2505.18698, section 3, to the letter.

    `bias` (N_k,) is added to the scores of every row.
    """
    bias = torch.zeros(len(k), dtype=q.dtype) if bias is None else bias
    n_q, n_k = len(q), len(k)
    prefix = prefix if prefix < min(n_q, n_k) else max(n_q, n_k)  # every row is exact, and there are no blocks
    blocks = -(-max(n_k - prefix, 0) // block_size)
    rows = block_size if n_q == n_k else -(-max(n_q - prefix, 0) // max(blocks, 1))
    lay = _layout(n_q, n_k, visible, blocks, rows, block_size, pad, window, prefix)
    left = torch.zeros(rows, blocks, blocks, dtype=q.dtype)  # (j, b, l)
    for j in range(rows):
        left[j] = torch.eye(blocks) if init == "identity" else torch.full((blocks, blocks), 1 / max(blocks, 1))
    scores = scale * q @ k.mT + bias
    objectives, matrix = [], torch.zeros(n_q, n_k, dtype=q.dtype)
    for _ in range(num_iters):
        right, a, c = _right(q, k, visible, bias, left, lay, scale)
        left = _left(q, scores, a, c, lay)
        matrix = _assemble(left, right, scores, lay, prefix)
        objectives.append(objective(matrix, scores))
    return Dense(matrix, tuple(objectives))


def objective(matrix: Tensor, scores: Tensor) -> float:
    """<A, S> + H(A) over entries that are not zero."""
    kept = matrix > 0
    return float((matrix[kept] * scores[kept]).sum() - (matrix[kept] * matrix[kept].log()).sum())


def _places(n: int, blocks: int, size: int, pad: str, prefix: int) -> list[list[int | None]]:
    """For each block and offset, the row or key there, None for padding: those that follow the prefix, in turn."""
    missing: list[int | None] = [None] * (blocks * size - max(n - prefix, 0))
    following = list(range(prefix, n))
    places = following + missing if pad == "post" else missing + following
    return [places[b * size : (b + 1) * size] for b in range(blocks)]


def _layout(n_q, n_k, visible, blocks, rows, block_size, pad, window, prefix) -> Layout:  # type: ignore[no-untyped-def]
    row_at, key_at = _places(n_q, blocks, rows, pad, prefix), _places(n_k, blocks, block_size, pad, prefix)
    block_of = {row: block for block, places in enumerate(row_at) for row in places if row is not None}
    near_at, far_at = [], []
    for row in range(n_q):
        if row < prefix:
            covered, near = list(range(blocks)), set(range(n_k))
        else:
            covered = [] if window is None else [b for b in range(blocks) if abs(b - block_of[row]) <= window]
            near = {n for b in covered for n in key_at[b] if n is not None} | set(range(prefix))
        near_at.append(sorted(n for n in near if visible[n]))
        far_at.append([b for b in range(blocks) if b not in covered])
    return Layout(row_at, key_at, near_at, far_at)


def _right(q, k, visible, bias, left, lay, scale):  # type: ignore[no-untyped-def]
    rows, blocks, _ = left.shape
    dim = q.shape[1]
    right: dict[tuple[int, int], tuple[list[int], Tensor]] = {}
    a, c = {}, {}
    for b in range(blocks):
        keys = [n for n in lay.key_at[b] if n is not None and visible[n]]
        for j in range(rows):
            weight, total = 0.0, torch.zeros(dim, dtype=q.dtype)
            for row_block in range(blocks):
                row = lay.row_at[row_block][j]
                if row is not None:
                    weight += float(left[j, b, row_block])
                    total += left[j, b, row_block] * q[row]
            mean = total / weight if weight > 0 else total
            if not keys:
                right[b, j], a[b, j], c[b, j] = ([], q[:0, 0]), None, None
                continue
            share = torch.softmax(scale * k[keys] @ mean + bias[keys], 0)
            right[b, j] = (keys, share)
            a[b, j] = scale * share @ k[keys]
            c[b, j] = float(torch.xlogy(share, share).sum() - share @ bias[keys])
    return right, a, c


def _left(q, scores, a, c, lay):  # type: ignore[no-untyped-def]
    blocks, rows = len(lay.row_at), len(lay.row_at[0]) if lay.row_at else 0
    left = torch.zeros(rows, blocks, blocks, dtype=q.dtype)
    for row_block in range(blocks):
        for j in range(rows):
            row = lay.row_at[row_block][j]
            if row is None:
                continue
            seen = [b for b in lay.far_at[row] if a[b, j] is not None]
            logits = [a[b, j] @ q[row] - c[b, j] for b in seen]
            near = [torch.logsumexp(scores[row, lay.near_at[row]], 0)] if lay.near_at[row] else []
            if seen:
                left[j, seen, row_block] = torch.softmax(torch.stack(logits + near), 0)[: len(seen)]
    return left


def _assemble(left, right, scores, lay, prefix):  # type: ignore[no-untyped-def]
    matrix = torch.zeros_like(scores)
    for row, near in enumerate(lay.near_at[:prefix]):
        matrix[row, near] = torch.softmax(scores[row, near], 0)
    for row_block, places in enumerate(lay.row_at):
        for j, row in enumerate(places):
            if row is None:
                continue
            for b in lay.far_at[row]:
                keys, share = right[b, j]
                matrix[row, keys] = left[j, b, row_block] * share
            near = lay.near_at[row]
            if near:
                matrix[row, near] = (1 - left[j, :, row_block].sum()) * torch.softmax(scores[row, near], 0)
    return matrix
