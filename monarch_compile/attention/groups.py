"""Key groups that a query row treats exactly, merged with its Monarch far field by logsumexp (eager semantics).

Each group adds one entry to a row's softmax over blocks: its logit is the logsumexp of the row's scores in the group,
its value the group's exact attention. Groups are disjoint: prefix keys are in no window, and the far field holds
neither prefix keys nor the blocks that a row's window covers.
Index letters as in `reference`: l, b blocks; j, i offsets in a block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from monarch_compile.attention.blocking import Blocking

HIDDEN = -1e30
"""A bias of a key at or below this hides the key: nothing finite in 16 bits is, the lowest float32 is."""


def centred(bias: Tensor) -> Tensor:
    """A bias (E, N_k) in at least float32, with 0 for the largest of a row: softmax ignores such a shift."""
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    return bias - bias.detach().amax(-1, keepdim=True).clamp(min=HIDDEN)


def cut(x: Tensor, dim: int, prefix: int, at_end: bool) -> tuple[Tensor, Tensor]:
    """What x holds of the prefix, `prefix` places at the start or the end of a dim, and of the rest: two views.

    By the operator, since indexing would ask for a device where tensors are fake.
    """
    size = x.shape[dim]
    parts = ((size - prefix, size), (0, size - prefix)) if at_end else ((0, prefix), (prefix, size))
    of_prefix, rest = (torch.ops.aten.slice.Tensor(x, dim, *part) for part in parts)
    return of_prefix, rest


def split_mask(key_mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Which keys are visible, and what is added to their scores, as `dtype` (None: nothing)."""
    if key_mask.dtype == torch.bool:
        return key_mask, None
    visible = ~(key_mask <= HIDDEN)  # NaN must stay NaN
    return visible, key_mask.to(dtype).masked_fill(~visible, 0.0)


def biased(scores: Tensor, bias: Tensor | None) -> Tensor:
    """The scores and a bias that is broadcast to them."""
    return scores if bias is None else scores + bias


def softmax_lse(
    scores: Tensor, visible: Tensor | None, dim: int = -1, *, all_rows_see: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax over `dim` and its logsumexp; a row that sees nothing gives zeros and a finite, unused lse.

    all_rows_see: each row is known to see something, so that no code is needed for one that does not.
    """
    may_be_blind = visible is not None and not all_rows_see
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    top = scores.detach().amax(dim, keepdim=True)
    if may_be_blind:
        top = top.masked_fill(top == float("-inf"), 0.0)
    weights = (scores - top).exp()
    total = weights.sum(dim, keepdim=True)
    if may_be_blind:
        total = total.masked_fill(total == 0, 1.0)
    return weights / total, (top + total.log()).squeeze(dim)


def window_scores(q: Tensor, keys_near: Tensor, blocks: Blocking, scale: float, bias: Tensor | None = None) -> Tensor:
    """Scores of rows q (E, H, l, j, D) with the keys of the windows of their blocks.

    `keys_near` as in `Blocking.with_neighbours`; `bias` broadcasts to (E, H, b, 1, i). Returns (E, H, l, j, keys).
    """
    scores = scale * torch.unflatten(torch.bmm(q.flatten(0, 2), keys_near.mT), 0, q.shape[:3])
    return biased(scores, None if bias is None else blocks.of_neighbours(bias))


def own_scores(scores: Tensor, blocks: Blocking) -> Tensor:
    """Of `window_scores` those with a row's own block."""
    return scores.narrow(-1, blocks.own_place * blocks.size, blocks.size)


def window_group(
    scores: Tensor, values_near: Tensor, visible: Tensor | None, blocks: Blocking
) -> tuple[Tensor, Tensor]:
    """Exact attention of each block of rows to its window, from `window_scores`.

    `values_near` as in `Blocking.with_neighbours`; `visible` broadcasts to (E, H, b, 1, i). Returns values
    (E, H, l, j, D_v) and logsumexps (E, H, l, j), -inf where a row sees no key.
    """
    is_masked = visible is not None  # else each row sees its own block
    if visible is None:
        visible = torch.ones((1, 1, scores.shape[2], 1, blocks.size), dtype=torch.bool, device=scores.device)
    # As numbers: Inductor's C++ for padded comparisons does not compile (torch 2.13).
    seen = blocks.of_neighbours(visible.to(torch.float32)) > 0
    weights, lse = softmax_lse(scores, seen, all_rows_see=not is_masked)
    value = torch.unflatten(torch.bmm(weights.flatten(0, 2), values_near), 0, scores.shape[:3])
    return value, lse.masked_fill(~seen.any(-1), float("-inf")) if is_masked else lse


def prefix_group(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Exact attention of q (E, H, l, j, D) to the keys of a prefix k (E, H, P, D), v (E, H, P, D_v).

    Returns values (E, H, l, j, D_v) and logsumexps (E, H, l, j), -inf where a row sees no key.
    """
    seen = None if key_mask is None else key_mask[:, None, None, :]
    added = None if bias is None else bias[:, None, None, :]
    weights, lse = softmax_lse(biased(scale * q.flatten(2, 3) @ k.mT, added), seen)
    if seen is not None:
        lse = lse.masked_fill(~seen.any(-1), float("-inf"))
    shape = q.shape[2:4]
    return torch.unflatten(weights @ v, 2, shape), torch.unflatten(lse, 2, shape)


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of a few rows q (E, H, P, D) to every key of their key head.

    Returns values (E, H, P, D_v), 0 where a row sees no key, and logsumexps (E, H, P), -inf there.
    """
    seen = None if key_mask is None else key_mask[:, None, None, :]
    group = q.shape[1] // k.shape[1]
    rows = torch.unflatten(q, 1, (-1, group)).flatten(2, 3)  # (E, H_kv, group * P, D)
    scores = biased(scale * rows @ k.mT, None if bias is None else bias[:, None, None, :])
    weights, lse = softmax_lse(scores, seen)
    if seen is not None:
        lse = lse.masked_fill(~seen.any(-1), float("-inf"))
    return tuple(torch.unflatten(x, 2, (group, -1)).flatten(1, 2) for x in (weights @ v, lse))  # type: ignore[return-value]


def shares(lses: Sequence[Tensor], *, all_rows_see: bool = False) -> list[Tensor]:
    """What a row gives each of its groups, from their logsumexps; -inf is a group without keys.

    Computed group by group: stacking the logsumexps would allocate one more buffer. all_rows_see: as of `softmax_lse`.
    """
    top = functools.reduce(torch.maximum, lses).detach()
    if not all_rows_see:
        top = top.masked_fill(top == float("-inf"), 0.0)
    weights = [(lse - top).exp() for lse in lses]
    total = sum(weights[1:], start=weights[0])
    if not all_rows_see:
        total = total.masked_fill(total == 0, 1.0)
    return [weight / total for weight in weights]


def merge(values: Sequence[Tensor], lses: Sequence[Tensor], *, all_rows_see: bool = False) -> Tensor:
    """Attention over disjoint groups of keys from attention within each: values (..., D_v), logsumexps (...).

    all_rows_see: as of `softmax_lse`.
    """
    parts = shares(lses, all_rows_see=all_rows_see)
    first, *rest = (value * share.unsqueeze(-1) for value, share in zip(values, parts, strict=True))
    return sum(rest, start=first)


def total_lse(lses: Sequence[Tensor]) -> Tensor:
    """The logsumexp of a row over all of its groups, from those of each; -inf where it sees no key."""
    if len(lses) == 1:
        return lses[0]
    return functools.reduce(torch.logaddexp, lses)
