"""Sequence parallelism by an all-to-all over offsets, whatever the number of heads.

With one iteration from the identity start (arXiv 2505.18698, section 3), stage 1 of a block needs that block alone, and
stage 2 of an offset needs this offset of all blocks. So q, a, y and c of the rank's blocks are sent by offsets, and the
far field's result comes back: 4 N D / W numbers of each head a rank. A window needs keys and values of neighbouring
blocks, a prefix its keys and values on all ranks.
Index letters as in `reference`: l, b blocks; j, i offsets in a block.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.attention.gradients import place_has_kernels
from monarch_compile.attention.groups import (
    HIDDEN,
    biased,
    cut,
    exact_rows,
    merge,
    prefix_group,
    softmax_lse,
    split_mask,
)
from monarch_compile.attention.ir import MAX_HEAD_DIM
from monarch_compile.attention.parallel.exchange import Ranks, exchange, exchange_lists, from_all, from_rank, to_rank
from monarch_compile.attention.parallel.on_kernels import far_field_of_offsets, merged, summaries_by_offsets
from monarch_compile.attention.parallel.spread import Spread
from monarch_compile.calls import is_trained


def refusal_of(form: Form, *, causal: bool) -> str | None:
    """Why a form cannot be computed by offsets; None where it can."""
    if causal or not form.weighs_own_block_exactly:
        return "it needs num_iters=1 and init='identity', and no causal mask"
    if form.tile is not None or form.chosen or form.pad != "post":
        return "it needs pieces of the sequence (no tile), padded after it, and no chosen blocks"
    return None


def attend_by_offsets(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, spread: Spread, ranks: Ranks, form: Form, scale: float
) -> Tensor:
    """Attention of this rank's piece: q (E, H, n, D), k (E, H_kv, n, D), v (E, H_kv, n, D_v) -> (E, H, n, D_v).

    key_mask: (E, n), of the rank's own tokens, as in `reference.reference`, or None on all ranks. On CUDA, kernels run
    where no gradient is wanted, and the mask is no bias; elsewhere it is made of torch's operators, float16 and
    bfloat16 are computed, and sent, in float32, and it is differentiable once.
    """
    if _runs_on_kernels(q, k, v, key_mask):
        return _attend_on_kernels(q, k, v, key_mask, spread, ranks, form, scale)
    dtype, length = q.dtype, q.shape[2]
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    added = _added(key_mask, k, spread, ranks)
    near, rows, lead = [], None, spread.prefix_of(ranks.rank)
    if form.prefix:
        rows = _prefix_rows(q, k, v, added, spread, ranks, scale)
        k_lead, v_lead, added_lead = _prefix_keys(k, v, added, spread, ranks)
        q, k, v = (cut(x, 2, lead, form.prefix_at_end)[1] for x in (q, k, v))
        added = None if added is None else cut(added, 1, lead, form.prefix_at_end)[1]
    window = form.simplest().window
    assert not isinstance(window, tuple), "pieces lie along one axis"
    queries = _in_blocks(q, spread)
    group = q.shape[1] // k.shape[1]
    queries = torch.unflatten(queries, 1, (-1, group)).transpose(2, 3).flatten(3, 4)  # (E, H_kv, l, group * j, D)
    keys, values = _in_blocks(k, spread), _in_blocks(v, spread)
    visible, bias = None, None
    if added is not None:
        of_blocks = F.pad(added, (0, spread.places - added.shape[1]), value=float("-inf"))
        visible, bias = split_mask(torch.unflatten(of_blocks, 1, (-1, spread.block_size))[:, None, :, None], q.dtype)
    scores = None
    if window is not None:
        near_scores, near_group = _window_group(queries, keys, values, visible, bias, window, scale, spread, ranks)
        near.append(near_group)
        scores = near_scores.narrow(-1, window * spread.block_size, spread.block_size)
    if form.prefix:
        seen, of_lead = (None, None) if added_lead is None else split_mask(added_lead, q.dtype)
        near.append(prefix_group(queries, k_lead, v_lead, seen, of_lead, scale))
    if scores is None:
        scores = biased(scale * queries @ keys.mT, bias)  # (E, H_kv, b, j, i)
    right, own_lse = softmax_lse(scores, visible)
    a, y = scale * right @ keys, right @ values
    c = (queries * a).sum(-1) - own_lse  # (E, H_kv, b, j)
    if visible is not None:
        c = c.masked_fill(~visible.any(-1), float("inf"))
    z, far_lse = _far_field(queries, a, y, c, window, ranks)
    if near:
        z = merge([z, *(value for value, _ in near)], [far_lse, *(lse for _, lse in near)])
    output = torch.unflatten(z, 3, (group, -1)).transpose(2, 3).flatten(1, 2)  # (E, H, l, j, D_v)
    output = output.flatten(2, 3)[:, :, : length - lead]
    if rows is not None:
        output = torch.cat([output, rows] if form.prefix_at_end else [rows, output], 2)
    return output.to(dtype)


def _added(key_mask: Tensor | None, k: Tensor, spread: Spread, ranks: Ranks) -> Tensor | None:
    """What is added to the scores of the rank's keys, (E, n), -inf for a hidden key; None where no rank hides any.

    A bias is centred as in `groups.centred`, over the keys of all ranks.
    """
    if key_mask is None:
        return k.new_zeros(k.shape[0], k.shape[2]) if spread.has_empty_places else None
    if key_mask.dtype == torch.bool:
        return k.new_zeros(key_mask.shape).masked_fill(~key_mask, float("-inf"))
    bias = key_mask.to(torch.promote_types(key_mask.dtype, torch.float32))
    own = F.pad(bias.detach(), (0, 1), value=HIDDEN).amax(-1, keepdim=True)
    top = from_all(own, 1, [1] * ranks.size, ranks).amax(-1, keepdim=True)
    bias = bias - top
    return bias.masked_fill(bias <= HIDDEN, float("-inf")).to(k.dtype)


def _in_blocks(x: Tensor, spread: Spread) -> Tensor:
    """From (E, H, n, D) to (E, H, b, i, D), with zeros where there is no token."""
    padded = F.pad(x, (0, 0, 0, spread.places - x.shape[2]))
    return torch.unflatten(padded, 2, (spread.blocks_of_rank, spread.block_size))


def _prefix_keys(
    k: Tensor, v: Tensor, added: Tensor | None, spread: Spread, ranks: Ranks
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and what is added to the scores of the prefix, on all ranks."""
    size, source = spread.prefix, spread.prefix_rank

    def lead(x: Tensor, dim: int) -> Tensor:
        own = cut(x, dim, spread.prefix_of(ranks.rank), spread.prefix_at_end)[0]
        return from_rank(own, source, (*x.shape[:dim], size, *x.shape[dim + 1 :]), ranks)

    both = lead(torch.cat([k, v], -1), 2)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :], None if added is None else lead(added, 1)


def _prefix_rows(
    q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, spread: Spread, ranks: Ranks, scale: float
) -> Tensor:
    """Exact attention of the prefix's queries to the keys of all ranks, on the rank that holds it; elsewhere no rows.

    Each rank attends to its own keys; the results are merged by logsumexp.
    """
    own = cut(q, 2, spread.prefix_of(ranks.rank), spread.prefix_at_end)[0]
    shape = (*q.shape[:2], spread.prefix, q.shape[3])
    queries = from_rank(own, spread.prefix_rank, shape, ranks)
    if added is None:
        added = k.new_zeros(k.shape[0], k.shape[2])
    none = F.pad(added, (0, 1), value=float("-inf"))  # a rank without tokens has a key, which is hidden
    seen, bias = split_mask(none, q.dtype)
    values, lses = exact_rows(queries, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), seen, scale, bias)
    both = torch.cat([values, lses.unsqueeze(-1)], -1)
    found = to_rank(both, spread.prefix_rank, [both.shape] * ranks.size, ranks)
    if ranks.rank != spread.prefix_rank:
        nothing = torch.cat([x.flatten() for x in found])
        return nothing.reshape(*values.shape[:2], 0, values.shape[3])
    return merge([x[..., :-1] for x in found], [x[..., -1] for x in found])


def _window_group(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    bias: Tensor | None,
    window: int,
    scale: float,
    spread: Spread,
    ranks: Ranks,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Scores (E, H_kv, l, j, keys) of the rank's rows with the keys of their windows, and attention to these: values
    (E, H_kv, l, j, D_v) and logsumexps (E, H_kv, l, j)."""
    added = keys.new_zeros(keys.shape[0], 1, *keys.shape[2:4])
    if visible is not None:
        added = (added if bias is None else bias.squeeze(3)).masked_fill(~visible.squeeze(3), float("-inf"))
    both = _with_neighbours(torch.cat([keys, values], -1), window, 0.0, ranks)
    near_keys, near_values = both[..., : keys.shape[-1]], both[..., keys.shape[-1] :]
    near_added = _with_neighbours(added.unsqueeze(-1), window, float("-inf"), ranks).mT  # (E, 1, l, 1, keys)
    seen = ~(near_added <= HIDDEN)
    scores = scale * queries @ near_keys.mT + near_added.masked_fill(~seen, 0.0)
    weights, lse = softmax_lse(scores, seen)
    return scores, (weights @ near_values, lse.masked_fill(~seen.any(-1), float("-inf")))


def _with_neighbours(x: Tensor, window: int, beyond: float, ranks: Ranks) -> Tensor:
    """From blocks (E, H, b, i, D) to each with those of its window, (E, H, b, keys, D); `beyond` its ends."""
    count = x.shape[2]
    around, before, after = _around(x, window, ranks)
    around = F.pad(around, (0, 0, 0, 0, window - before, window - after), value=beyond)
    return torch.cat([around.narrow(2, shift, count) for shift in range(2 * window + 1)], 3)


def _around(x: Tensor, window: int, ranks: Ranks) -> tuple[Tensor, int, int]:
    """The rank's blocks (E, H, b, i, D) between those before and after that their windows reach, and how many these
    are. Neighbours on other ranks are sent by them, each rank what others need of its blocks."""
    count = x.shape[2]
    spans = [(rank * count, (rank + 1) * count) for rank in range(ranks.size)]

    def shared(source: int, target: int) -> tuple[int, int]:
        """The first block of `source` that `target` needs of it, counted from its own first, and how many."""
        if source == target:
            return 0, 0
        first = max(spans[source][0], spans[target][0] - window)
        last = min(spans[source][1], spans[target][1] + window)
        return (first - spans[source][0], last - first) if last > first else (0, 0)

    parts = [x.narrow(2, *shared(ranks.rank, target)) for target in range(ranks.size)]
    counts = [shared(source, ranks.rank)[1] for source in range(ranks.size)]
    found = exchange(parts, [(*x.shape[:2], size, *x.shape[3:]) for size in counts], ranks)
    around = torch.cat([*found[: ranks.rank], x, *found[ranks.rank + 1 :]], 2)
    return around, sum(counts[: ranks.rank]), sum(counts[ranks.rank + 1 :])


def _far_field(
    queries: Tensor, a: Tensor, y: Tensor, c: Tensor, window: int | None, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Stage 2 of the rank's rows: values (E, H_kv, l, j, D_v) of their far field, and its logsumexps (E, H_kv, l, j).

    queries, a (E, H_kv, b, j, D), y (E, H_kv, b, j, D_v), c (E, H_kv, b, j), inf for a block without a visible key.
    """
    head_dim, count, offsets = queries.shape[-1], queries.shape[2], queries.shape[3]
    share = -(-offsets // ranks.size)
    packed = torch.cat([queries, a, y, c.unsqueeze(-1)], -1)
    packed = F.pad(packed, (0, 0, 0, share * ranks.size - offsets))
    parts = list(torch.split(packed, share, 3))
    found = torch.cat(exchange(parts, [parts[0].shape] * ranks.size, ranks), 2).transpose(2, 3)
    at = torch.split(found, [head_dim, head_dim, y.shape[-1], 1], -1)  # (E, H_kv, own j, all b, ...)
    logits = at[1] @ at[0].mT - at[3]  # (E, H_kv, j, b, l)
    far = at[3] < float("inf")
    if window is not None:
        block = torch.arange(found.shape[3], device=found.device)
        far = far & ((block[:, None] - block[None, :]).abs() > window)
    left, lse = softmax_lse(logits, far, dim=-2)
    lse = lse.masked_fill(~far.any(-2), float("-inf"))
    both = torch.cat([left.mT @ at[2], lse.unsqueeze(-1)], -1)  # (E, H_kv, own j, all l, D_v + 1)
    parts = list(torch.split(both, count, 3))
    back = torch.cat(exchange(parts, [parts[0].shape] * ranks.size, ranks), 2)[:, :, :offsets].transpose(2, 3)
    return back[..., :-1], back[..., -1]


def _runs_on_kernels(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> bool:
    """Whether the emitted kernels run: all ranks must agree."""
    trains = is_trained([x for x in (q, k, v, key_mask) if x is not None])
    fits = max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM and (key_mask is None or key_mask.dtype == torch.bool)
    return place_has_kernels(q) and fits and not trains


def _attend_on_kernels(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, spread: Spread, ranks: Ranks, form: Form, scale: float
) -> Tensor:
    """The same by kernels, which exchange summaries of the inputs' dtype."""
    length, lead = q.shape[2], spread.prefix_of(ranks.rank)
    rows, of_prefix = None, None
    if form.prefix:
        added = _added(key_mask, k.float(), spread, ranks)
        wide = [x.float() for x in (q, k, v)]
        rows = _prefix_rows(wide[0], wide[1], wide[2], added, spread, ranks, scale).to(q.dtype)
        k_lead, v_lead, added_lead = _prefix_keys(wide[1], wide[2], added, spread, ranks)
        q, k, v = (cut(x, 2, lead, form.prefix_at_end)[1] for x in (q, k, v))
        key_mask = None if key_mask is None else cut(key_mask, 1, lead, form.prefix_at_end)[1]
        seen, bias = (None, None) if added_lead is None else split_mask(added_lead, torch.float32)
        heads = [torch.repeat_interleave(x, q.shape[1] // k.shape[1], 1) for x in (k_lead, v_lead)]
        of_prefix = prefix_group(_in_blocks(q, spread).float(), heads[0], heads[1], seen, bias, scale)
    own_form = replace(form, prefix=0).simplest()
    visible = key_mask
    if visible is None and spread.has_empty_places:
        visible = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    if visible is not None:
        visible = F.pad(visible, (0, spread.places - visible.shape[1]))
    queries = _in_blocks(q, spread).flatten(2, 3)
    before = 0
    keys, values = _in_blocks(k, spread), _in_blocks(v, spread)
    if own_form.window is not None:
        assert not isinstance(own_form.window, tuple), "pieces lie along one axis"
        both, before, _ = _around(torch.cat([keys, values], -1), own_form.window, ranks)
        keys, values = both[..., : k.shape[3]], both[..., k.shape[3] :]
        if visible is not None:
            of_blocks = torch.unflatten(visible.to(k.dtype), 1, (-1, spread.block_size))[:, None, :, :, None]
            visible = _around(of_blocks, own_form.window, ranks)[0].flatten(1) > 0
    keys, values = keys.flatten(2, 3), values.flatten(2, 3)
    own, parts = summaries_by_offsets(queries, keys, values, visible, before, own_form, scale, ranks.size)
    summaries = exchange_lists([p[:3] for p in parts], [[x.shape for x in parts[0][:3]]] * ranks.size, ranks)
    entropies = exchange_lists([p[3:] for p in parts], [[parts[0][3].shape]] * ranks.size, ranks)
    received = [[*some, *entropy] for some, entropy in zip(summaries, entropies, strict=True)]
    far = far_field_of_offsets(received, own_form.window, v.shape[3], masked=visible is not None)
    means = exchange_lists([[z] for z, _ in far], [[far[0][0].shape]] * ranks.size, ranks)
    lses = exchange_lists([[lse] for _, lse in far], [[far[0][1].shape]] * ranks.size, ranks)
    found, total = merged(own, [(z[0], lse[0]) for z, lse in zip(means, lses, strict=True)], own_form)
    output = found.transpose(1, 2)
    if of_prefix is not None:
        near, near_lse = of_prefix[0].flatten(2, 3), of_prefix[1].flatten(2)
        output = merge([output.float(), near], [total, near_lse]).to(q.dtype)
    output = output[:, :, : length - lead]
    if rows is not None:
        output = torch.cat([output, rows] if form.prefix_at_end else [rows, output], 2)
    return output
