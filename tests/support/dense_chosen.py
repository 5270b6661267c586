"""Causal attention and attention with chosen blocks as a dense matrix, row by row: slow, and no part of `reference`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def dense_chosen(
    q: Tensor,
    k: Tensor,
    visible: Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    prefix: int,
    chosen: int,
    causal: bool,
    choosers: Sequence[Tensor],
) -> Tensor:
    """One head: the (N, N) matrix of q (N, D), k (N, D), visible (N,) bool; float64, blocks padded after the end.

    choosers: queries (N, D) of all heads that share these keys, and choose blocks of them together.
    """
    n = len(q)
    scores = (scale * q @ k.mT).masked_fill(~visible, float("-inf"))
    voters = [(voter, (scale * voter @ k.mT).masked_fill(~visible, float("-inf"))) for voter in choosers]
    starts = list(range(prefix, n, block_size))
    blocks = [range(start, min(start + block_size, n)) for start in starts]
    matrix = torch.zeros(n, n, dtype=q.dtype)
    for row in range(min(prefix, n)):
        keys = range(row + 1) if causal else range(n)
        _add(matrix, scores, row, [(list(keys), None)])
    for place, own in enumerate(blocks):
        near = [b for b in range(len(blocks)) if abs(b - place) <= (window or 0) and (not causal or b <= place)]
        far = [b for b in range(len(blocks)) if b not in near and (not causal or b < place)]
        readers = place - 1 if causal else place
        masses = dict.fromkeys(far, 0.0)
        for offset, (voter, own_scores) in itertools.product(range(len(blocks[readers]) if far else 0), voters):
            row = voter[blocks[readers][offset]]
            logits = {b: _summary(voter, k, own_scores, blocks, b, offset, scale)[0](row) for b in far}
            total = torch.logsumexp(torch.stack(list(logits.values())), 0)
            for b in far:
                masses[b] += 0.0 if total == float("-inf") else float((logits[b] - total).exp())
        taken = sorted(far, key=lambda b: (-masses[b], b))[:chosen]
        for offset, row in enumerate(own):
            exact = [key for b in (*near, *taken) for key in blocks[b] if not causal or key <= row]
            exact += list(range(min(prefix, n)))
            groups = [(exact, None)]
            for b in far:
                if b not in taken:
                    logit, weights = _summary(q, k, scores, blocks, b, offset, scale)
                    groups.append((list(blocks[b]), (logit(q[row]), weights)))
            _add(matrix, scores, row, groups)
    return matrix


def _summary(
    q: Tensor, k: Tensor, scores: Tensor, blocks: list[range], b: int, offset: int, scale: float
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """How a row weighs block b at one offset, and the weights of its keys: those of the block's own query there.

    A place without a token has a query of zeros.
    """
    block = list(blocks[b])
    seen = scores[0, block] != float("-inf")
    if not seen.any():
        return (lambda row: torch.tensor(float("-inf"), dtype=q.dtype)), torch.zeros(len(block), dtype=q.dtype)
    own = q[block[offset]] if offset < len(block) else torch.zeros_like(q[0])
    local = (scale * k[block] @ own).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(local, 0)
    mean = scale * weights @ k[block]
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum()
    return (lambda row: row @ mean + entropy), weights


def _add(
    matrix: Tensor, scores: Tensor, row: int, groups: list[tuple[list[int], tuple[Tensor, Tensor] | None]]
) -> None:
    """Softmax of a row over groups of keys: exact ones, of their scores, and far blocks, of their logits."""
    logits, weights = [], []
    for keys, summary in groups:
        if summary is None:
            own = scores[row, keys]
            logits.append(torch.logsumexp(own, 0) if keys else torch.tensor(float("-inf"), dtype=scores.dtype))
            weights.append(torch.softmax(own, 0).nan_to_num())
        else:
            logits.append(summary[0])
            weights.append(summary[1])
    shares = torch.softmax(torch.stack(logits), 0).nan_to_num()
    for (keys, _), share, own in zip(groups, shares, weights, strict=True):
        matrix[row, keys] += share * own
