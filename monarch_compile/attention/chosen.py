"""Attention with chosen blocks, and causal attention: eager semantics, one iteration from the identity start.

Each block of queries attends exactly to its own block, to those of its window, to the prefix, and to the `chosen`
candidates of most far-field mass, in sum over the query heads that share a key head. All other blocks that it may see
are its far field. Candidates are blocks outside of its window; in causal attention, those before it alone.

What makes it causal: block b's summaries come from queries and keys of block b, and only later blocks read them; a
triangle hides later keys of a row's own block; and blocks are chosen by queries of the block before, since a row may
depend on no later query of its own block either. Queries whose keys a cache holds are not given, and count as 0.
Index letters: l, b blocks (of queries, of keys); j, i offsets in a block (of a query, of a key).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.attention.blocking import Blocking, Pieces, blocking_of, may_pad, padded, steps_to_neighbours
from monarch_compile.attention.form import Form
from monarch_compile.attention.groups import biased, cut, exact_rows, merge, prefix_group, softmax_lse, total_lse

MOST_ELEMENTS = 2**26
"""Logits, or gathered keys and values, of as many blocks of queries as are attended with at once."""


@dataclass(frozen=True)
class Blocks:
    """A sequence without its prefix, cut into blocks, and what each says to the queries at its own offsets.

    q, k, v (E, H, b, i, D). visible (E or 1, 1, b, i): keys that are tokens and not hidden. bias (E, 1, b, i) or None.
    is_row (b, j): places that hold a query; lacks_rows: whether a block may hold none. a, y (E, H, b, j, D),
    c (E, H, b, j): the summaries, c = inf where a block has no visible key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    bias: Tensor | None
    is_row: Tensor
    a: Tensor
    y: Tensor
    c: Tensor
    lacks_rows: bool = False


class Choice(NamedTuple):
    """Blocks for each block of queries: their numbers (E, H, l, n), and which places hold one, of the same shape."""

    block: Tensor
    is_block: Tensor


def attend_exactly_where_chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    form: Form,
    *,
    scale: float,
    grid: Sequence[Any] | None = None,
    causal: bool = False,
    choice: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (E, H, N, D_v), laid out (E, N, H, D_v), and natural logsumexps (E, H, N) of q (E, H, N, D).

    k (E, H_kv, N, D), v (E, H_kv, N, D_v). visible (E, N) bool, bias (E, N) added to the scores: both or None.
    choice (E, H, l, n): blocks to take for the chosen ones, -1 where there is none; to be compared with kernels.
    Fewer queries than keys are the last of a causal sequence; those before, whose keys a cache holds, count as 0.
    """
    group, prefix, at_end = q.shape[1] // k.shape[1], form.prefix, form.prefix_at_end
    cached = 0 if str(q.shape[2]) == str(k.shape[2]) else k.shape[2] - q.shape[2]
    if may_pad(cached):
        q = padded(q, (0, 0, cached, 0))
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    lead_masks: tuple[Tensor | None, Tensor | None] = (None, None)
    if prefix:
        (q_lead, q_rest), (k_lead, k_rest), (v_lead, v_rest) = (cut(x, 2, prefix, at_end) for x in (q, k, v))
        lead = slice(None, prefix) if causal else slice(None)
        seen, added = (None if x is None else x[:, lead] for x in (visible, bias))
        rows = _rows(q_lead, k[:, :, lead], v[:, :, lead], seen, added, scale, causal=causal)
        if q.shape[2] <= prefix:
            return _laid_out(_after(cached, rows[0])), _after(cached, rows[1].unsqueeze(-1)).squeeze(-1)
        (seen_lead, visible), (added_lead, bias) = (
            (None, None) if x is None else cut(x, 1, prefix, at_end) for x in (visible, bias)
        )
        lead_masks = seen_lead, added_lead
        q, k, v = q_rest, k_rest, v_rest
    blocking = blocking_of(
        q.shape[2], form.block_size, form.pad, form.window, tile=form.tile, window_shape=form.window_shape, grid=grid
    )
    blocks = _summarized(blocking, q, k, v, visible, bias, scale)
    first = 0
    if may_pad(cached):
        start = max(cached - prefix, 0) if isinstance(cached, int) else torch.sym_max(cached - prefix, 0)
        is_row = blocking.split((torch.arange(q.shape[2], device=q.device) >= start)[None, None, :, None])[0, 0, ..., 0]
        blocks = replace(blocks, is_row=is_row, lacks_rows=True)
        if isinstance(start, int) and isinstance(blocking, Pieces) and isinstance(blocking.missing, int):
            first = (start + (blocking.missing if form.pad == "pre" else 0)) // form.block_size
    far = _far(blocking, causal, q.device)
    is_near = _seen(far, causal) & ~far
    near = Choice(*_first_blocks(is_near.to(q.dtype) - 0.5, _most_near(form, blocking, causal)))
    outputs, lses = [], []
    if first:  # blocks of which no row is asked for
        skipped = (*q.shape[:2], first, form.block_size)
        outputs, lses = [q.new_zeros(*skipped, v.shape[3])], [q.new_zeros(skipped)]
    for own in _parts(blocks, near.block.shape[-1] + form.chosen, first):
        taken = _taken(blocks, far[own], own, form.chosen, causal, choice, group)
        parts = [_far_field(blocks, far[own], own, taken)]
        parts.append(_exact_blocks(blocks, own, _joined(near, own, taken), scale, causal))
        if prefix:
            parts.append(prefix_group(blocks.q[:, :, own], k_lead, v_lead, *lead_masks, scale))
        values, totals = zip(*parts, strict=True)
        outputs.append(merge(values, totals))
        lses.append(total_lse(totals))
    output = _from_blocks(torch.cat(outputs, 2), blocking)
    lse = _from_blocks(torch.cat(lses, 2).unsqueeze(-1), blocking).squeeze(-1)
    if prefix:
        order = -1 if at_end else 1
        output, lse = torch.cat([rows[0], output][::order], 2), torch.cat([rows[1], lse][::order], 2)
    return _laid_out(_after(cached, output)), _after(cached, lse.unsqueeze(-1)).squeeze(-1)


def _after(cached: Any, x: Tensor) -> Tensor:
    """Of rows (E, H, N, D) those that a call asks for: the ones after its cache."""
    if isinstance(cached, int):
        return x[:, :, cached:] if cached else x
    cropped: Tensor = F.pad(x, (0, 0, -cached, 0))  # a slice would be guarded on, for its layout
    return cropped


def far_masses(blocks: Blocks, far: Tensor, own: slice, causal: bool) -> Tensor:
    """How much of their far field the rows of a block give each candidate, in sum: (E, H, l, b), -1 for no candidate.

    far (l, b): the candidates of the blocks `own`. In causal attention the rows are those of the block before, whose
    softmax runs over the same candidates; where a call has none of them, the first row of the block itself, which sees
    no later token of it.
    """
    places = torch.arange(own.start, own.stop, device=far.device)
    reads = (places - 1).clamp(min=0) if causal else places
    is_row = blocks.is_row
    if causal and blocks.lacks_rows:
        is_alone = ~is_row[reads].any(-1)
        reads = torch.where(is_alone, places, reads)
        is_first = is_row & (is_row.cumsum(-1) == 1)
        is_row = torch.where(is_alone[:, None], is_first[reads], is_row[reads])
    else:
        is_row = is_row[reads]
    candidates = far[:, None, :]
    shares, _ = softmax_lse(_logits(blocks, blocks.q[:, :, reads]), candidates)  # (E, H, l, j, b)
    real = is_row.to(shares.dtype)[:, :, None]
    return (shares * real).sum(3).masked_fill(~far, -1.0)


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """The rows of a prefix, (E, H, P, D_v) and (E, H, P): exact, of every key, or under the triangle of their own."""
    if not causal:
        return exact_rows(q, k, v, visible, scale, bias)
    place = torch.arange(q.shape[2], device=q.device)
    seen = (place <= place[:, None])[None, None]
    seen = seen if visible is None else seen & visible[:, None, None, :]
    weights, lse = softmax_lse(biased(scale * q @ k.mT, None if bias is None else bias[:, None, None, :]), seen)
    return weights @ v, lse.masked_fill(~seen.any(-1), float("-inf"))


def _summarized(
    blocking: Blocking, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, bias: Tensor | None, scale: float
) -> Blocks:
    queries, keys, values = (blocking.split(x) for x in (q, k, v))
    is_token = blocking.is_token(q.device)
    seen = is_token[None, None] if visible is None else _by_block(blocking, visible)
    added = None if bias is None else _by_block(blocking, bias)
    scores = biased(scale * queries @ keys.mT, None if added is None else added.unsqueeze(3))
    right, lse = softmax_lse(scores, seen.unsqueeze(3))
    a, y = scale * right @ keys, right @ values
    c = ((queries * a).sum(-1) - lse).masked_fill(~seen.any(-1, keepdim=True), float("inf"))
    return Blocks(queries, keys, values, seen, added, is_token, a, y, c)


def _by_block(blocking: Blocking, of_keys: Tensor) -> Tensor:
    """A value of each key (E, N) in its block, (E, 1, b, i); 0 (False) for padding."""
    return blocking.split(of_keys[:, None, :, None]).squeeze(-1)


def _far(blocking: Blocking, causal: bool, device: torch.device) -> Tensor:
    """(l, b) bool: the blocks outside of each block's window that its rows may see."""
    far = blocking.is_far(device).t()
    return far & _seen(far, causal)


def _seen(far: Tensor, causal: bool) -> Tensor:
    """(l, b) bool: the blocks that some row of a block may see."""
    seen = torch.ones_like(far)
    return seen.tril() if causal else seen


def _most_near(form: Form, blocking: Blocking, causal: bool) -> int:
    """The most blocks in a window, the own one among them; at most as many as there are, where that is known."""
    window, axes, num_blocks = form.window or 0, len(form.tile or (1,)), blocking.num_blocks
    if isinstance(window, int) and isinstance(num_blocks, int):
        window = min(window, num_blocks)
    if isinstance(window, int) and axes == 1:
        most = (1 if causal else 2) * window + 1
    else:
        most = len(steps_to_neighbours(window, form.window_shape, axes))
    return min(most, num_blocks) if isinstance(num_blocks, int) else most


def _parts(blocks: Blocks, listed: int, first: int) -> Iterator[slice]:
    """As many blocks of queries at a time as memory is taken to have room for; all, where their number is symbolic.

    listed: exact blocks of each. first: the first that is asked for.
    """
    batch, heads, num_blocks, size, dim = blocks.q.shape
    if not all(isinstance(x, int) for x in (batch, heads, num_blocks)):
        yield slice(first, num_blocks)
        return
    keys = min(listed, num_blocks) * size
    one = batch * heads * (size * max(num_blocks, keys) + keys * (dim + blocks.v.shape[-1]))
    step = max(1, MOST_ELEMENTS // one)
    for start in range(first, num_blocks, step):
        yield slice(start, min(start + step, num_blocks))


def _taken(
    blocks: Blocks, far: Tensor, own: slice, chosen: int, causal: bool, choice: Tensor | None, group: int
) -> Choice | None:
    """The chosen blocks of the blocks `own`, whose candidates are far (l, b); None where none are asked for.

    group: query heads that share a key head, and its chosen blocks.
    """
    if choice is not None:
        given = choice[:, :, own].long()
        return Choice(given.clamp(min=0), given >= 0)
    if not chosen:
        return None
    masses = far_masses(blocks, far, own, causal)
    if group > 1:
        shared = torch.unflatten(masses, 1, (-1, group)).sum(2)  # of no candidate it stays below 0
        masses = shared.repeat_interleave(group, 1)
    return Choice(*_first_blocks(masses, chosen))


def _first_blocks(masses: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` blocks of largest mass (..., b), the first of equal ones, and which of them have a mass: at least 0.

    Padded first, so that there are as many without a comparison of `count` with a symbolic number of blocks.
    """
    masses = masses.detach()
    padded = torch.cat([masses, masses.new_full((*masses.shape[:-1], count), -1.0)], -1)
    found, index = padded.sort(stable=True, dim=-1, descending=True)
    is_block = found[..., :count] >= 0
    return index[..., :count].masked_fill(~is_block, 0), is_block


def _joined(near: Choice, own: slice, taken: Choice | None) -> Choice:
    """The blocks of the window, (l, n), and the chosen ones, if any: (E or 1, H or 1, l, n)."""
    window = Choice(*(x[own][None, None] for x in near))
    if taken is None:
        return window
    lead = taken.block.shape[:2]
    return Choice(*(torch.cat([x.expand(*lead, -1, -1), y], -1) for x, y in zip(window, taken, strict=True)))


def _logits(blocks: Blocks, queries: Tensor) -> Tensor:
    """Of queries (E, H, l, j, D) and the summaries at their own offsets: (E, H, l, j, b)."""
    by_offset = queries.transpose(2, 3) @ blocks.a.permute(0, 1, 3, 4, 2)  # (E, H, j, l, b)
    return (by_offset - blocks.c.transpose(2, 3).unsqueeze(3)).transpose(2, 3)


def _far_field(blocks: Blocks, far: Tensor, own: slice, taken: Choice | None) -> tuple[Tensor, Tensor]:
    """Values (E, H, l, j, D_v) and logsumexps (E, H, l, j) of the blocks that are neither near nor chosen."""
    left = (far & blocks.visible.any(-1).unsqueeze(2)) if taken is None else _without(far, blocks, taken)
    weights, lse = softmax_lse(_logits(blocks, blocks.q[:, :, own]), left.unsqueeze(3))
    values = weights.transpose(2, 3) @ blocks.y.transpose(2, 3)  # (E, H, j, l, D_v)
    return values.transpose(2, 3), lse.masked_fill(~left.any(-1, keepdim=True), float("-inf"))


def _without(far: Tensor, blocks: Blocks, taken: Choice) -> Tensor:
    """(E, H, l, b): far blocks with a visible key that are not chosen."""
    lead = taken.block.shape[:3]
    counts = torch.zeros(*lead, far.shape[-1], device=far.device)
    counts = counts.scatter_add(-1, taken.block, taken.is_block.to(counts.dtype))
    return far & blocks.visible.any(-1).unsqueeze(2) & (counts == 0)


def _exact_blocks(blocks: Blocks, own: slice, listed: Choice, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Exact attention to the blocks in a list: values (E, H, l, j, D_v) and logsumexps (E, H, l, j)."""
    queries = blocks.q[:, :, own]
    batch, heads, rows, size, _ = queries.shape
    count = listed.block.shape[-1]
    index, is_block = (x.expand(batch, heads, rows, count) for x in listed)
    entry = torch.arange(batch, device=index.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=index.device).view(1, -1, 1, 1)
    keys, values = (x[entry, head, index].flatten(3, 4) for x in (blocks.k, blocks.v))  # (E, H, l, n * i, D)
    of_entry = entry if blocks.visible.shape[0] > 1 else torch.zeros_like(entry)
    seen = (blocks.visible[of_entry, 0, index] & is_block.unsqueeze(-1)).unsqueeze(3)  # (E, H, l, 1, n, i)
    if causal:
        place = torch.arange(size, device=index.device)
        block = torch.arange(own.start, own.stop, device=index.device)
        before = index.unsqueeze(3).unsqueeze(-1) < block.view(-1, 1, 1, 1)
        seen = seen & (before | (place <= place[:, None]).view(size, 1, size))
    seen = seen.flatten(4, 5)
    bias = None if blocks.bias is None else blocks.bias[entry, 0, index].flatten(3, 4).unsqueeze(3)
    weights, lse = softmax_lse(biased(scale * queries @ keys.mT, bias), seen)
    return weights @ values, lse.masked_fill(~seen.any(-1), float("-inf"))


def _from_blocks(x: Tensor, blocking: Blocking) -> Tensor:
    """From (E, H, l, j, D) to (E, H, N, D)."""
    return blocking.joined(x.flatten(2, 3).transpose(1, 2)).transpose(1, 2)


def _laid_out(x: Tensor) -> Tensor:
    """(E, H, N, D) in the memory order (E, N, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
