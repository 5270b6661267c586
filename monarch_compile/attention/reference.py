"""Eager semantics of Monarch attention: the oracle, and the form Inductor compiles where there is no Triton.

The iteration is section 3 of arXiv 2505.18698 (alternating maximisation over the two Monarch factors), written with
`c = qhat . a - logsumexp(scores)` in place of `sum R log R`, which it equals.
Index letters: l, b blocks (of queries, of keys); j, i offsets in a block (of a query, of a key).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.blocking import Blocking, Pieces, blocking_of, plain_window
from monarch_compile.attention.chosen import attend_exactly_where_chosen
from monarch_compile.attention.form import Form, weighs_own_block_exactly
from monarch_compile.attention.groups import (
    biased,
    centred,
    cut,
    exact_rows,
    merge,
    own_scores,
    prefix_group,
    shares,
    softmax_lse,
    split_mask,
    total_lse,
    window_group,
    window_scores,
)
from monarch_compile.attention.ir import is_exact


def reference(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Monarch attention of q (E, H, N_q, D), k (E, H_kv, N_k, D), v (E, H_kv, N_k, D_v) -> (E, H, N_q, D_v).

    H is a multiple of H_kv, and query head h reads key head h // (H / H_kv): nothing is copied for it, since offsets of
    the queries never mix, and the heads that share keys stand side by side as offsets (H_kv, H / H_kv * j).
    `key_mask` (E, N_k) is bool, True where a key is visible, or floating: added to the scores of every row, and hiding
    a key at `groups.HIDDEN` or below. A row that sees no key outputs 0. float16 and bfloat16 are computed in float32.
    The output's memory order is (batch, seq, heads, dim), so that merging the heads is a view.

    options: `scale`, those of `Form` and `grid`. `window`, `prefix`, `tile`, `window_shape` and `prefix_at_end` are
    those of `Form`: blocks are of what lies outside of the prefix, whose own rows attend to every key exactly. `grid`
    is what the tokens outside of the prefix lie on, flattened row by row: blocks are its tiles. For `chosen` and
    `causal` see the module `chosen`.
    """
    return _attend(q, k, v, key_mask, **options)[0]


def reference_with_lse(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """`reference`, and the natural logarithm of each row's total weight, (E, H, N_q): what its softmax over exact
    groups and far blocks divides by, -inf where a row sees no key. float32, or float64 for such inputs. A floating
    `key_mask` counts as `groups.centred` leaves it."""
    output, lse = _attend(q, k, v, key_mask, wants_lse=True, **options)
    assert lse is not None
    return output, lse


def _attend(
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
    window: int | Sequence[int] | None = None,
    prefix: int = 0,
    tile: Sequence[int] | None = None,
    window_shape: str = "box",
    prefix_at_end: bool = False,
    chosen: int = 0,
    grid: Sequence[int] | None = None,
    causal: bool = False,
    wants_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The result of `reference`, and the second of `reference_with_lse` where it is wanted."""
    window = plain_window(window)
    if window == 0 and not chosen and weighs_own_block_exactly(num_iters, init):
        window = None  # as in `Form.simplest`
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v = q.float(), k.float(), v.float()
    bias = None
    if key_mask is not None:
        key_mask = centred(key_mask) if key_mask.is_floating_point() else key_mask
        key_mask, bias = split_mask(key_mask, q.dtype)
    if chosen or causal:
        tiles = tuple(tile) if tile else None
        shape = (window_shape, prefix_at_end, chosen)
        form = Form(block_size, num_iters, init, pad, window, prefix, tiles, *shape)
        output, lse = attend_exactly_where_chosen(q, k, v, key_mask, bias, form, scale=scale, grid=grid, causal=causal)
        return output.to(dtype), lse if wants_lse else None
    if is_exact(q.shape[2], k.shape[2], block_size, prefix):
        rows, rows_lse = exact_rows(q, k, v, key_mask, scale, bias)
        return rows.transpose(1, 2).contiguous().transpose(1, 2).to(dtype), rows_lse if wants_lse else None
    if prefix:
        (q_lead, q_rest), (k_lead, k_rest), (v_lead, v_rest) = (cut(x, 2, prefix, prefix_at_end) for x in (q, k, v))
        rows, rows_lse = exact_rows(q_lead, k, v, key_mask, scale, bias)
        (mask_lead, key_mask), (bias_lead, bias) = (
            (None, None) if x is None else cut(x, 1, prefix, prefix_at_end) for x in (key_mask, bias)
        )
        q, k, v = q_rest, k_rest, v_rest
    seq_len_q, seq_len_k = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    key_blocks = blocking_of(seq_len_k, block_size, pad, window, tile=tile, window_shape=window_shape, grid=grid)
    query_blocks, num_blocks = key_blocks, key_blocks.num_blocks
    if seq_len_q != seq_len_k:
        query_blocks = Pieces(seq_len_q, num_blocks, _literal_one(-(-seq_len_q // num_blocks)), pad)
    q_blocks = _grouped(query_blocks.split(q), group).contiguous()
    features = (k.shape[-1], v.shape[-1])
    both = key_blocks.split(torch.cat([k, v], -1))  # side by side: laid out at once, and one product sums up both
    if window is None:
        both = both.contiguous()
    else:
        both, both_near = key_blocks.with_neighbours(both)
        keys_near, values_near = both_near.split_with_sizes(features, -1)
    keys = both.narrow(-1, 0, features[0])
    visible = _far_keys(key_blocks, key_mask, q.device)
    key_bias = None if bias is None else _by_block(bias, key_blocks)
    row_is_real = _rows(query_blocks, group, q.device)
    near = []  # values (E, H, l, j, D_v) and logsumexps (E, H, l, j) of the exact groups
    scores = None
    if window is not None:
        near_scores = window_scores(q_blocks, keys_near, key_blocks, scale, key_bias)
        near.append(window_group(near_scores, values_near, visible, key_blocks))
        if init == "identity":
            scores = own_scores(near_scores, key_blocks)
    if prefix:
        near.append(prefix_group(q_blocks, k_lead, v_lead, mask_lead, bias_lead, scale))
    near_lses = [lse.transpose(2, 3) for _, lse in near]
    far_blocks = _far_blocks(visible, key_blocks, window is not None, q.device)
    all_rows_see = visible is None
    all_see_far = all_rows_see and (window is None or key_blocks.all_have_far())

    # Operands of the batched products are laid out once, rows contiguous: `*_at` by query offset, the others by block.
    q_at = _by_offset(q_blocks)  # (E, H, j, l, D)
    qhat_at = q_at if init == "identity" else _mean_query(q_at, row_is_real)
    for step in range(num_iters):
        if scores is None or step:
            qhat = qhat_at.transpose(2, 3).expand(-1, -1, num_blocks, -1, -1)  # (E, H, b, j, D)
            scores = biased(scale * _bmm(qhat, keys, transposed=True), key_bias)  # (E, H, b, j, i)
        right, local_lse = softmax_lse(scores, visible)
        is_last = step == num_iters - 1
        a, *y = _bmm(right, both).split_with_sizes(features, -1) if is_last else (_bmm(right, keys),)
        a_at = _by_offset(scale * a)  # (E, H, j, b, D)
        c = (qhat_at * a_at).sum(-1) - local_lse.transpose(2, 3)  # (E, H, j, b)
        logits = _bmm(a_at, q_at, transposed=True) - c.unsqueeze(-1)  # (E, H, j, b, l)
        left, far_lse = softmax_lse(logits, far_blocks, dim=-2, all_rows_see=all_see_far)
        if (near or wants_lse) and far_blocks is not None and not all_see_far:
            far_lse = far_lse.masked_fill(~far_blocks.any(-2), float("-inf"))
        if not is_last:
            far_share = shares([far_lse, *near_lses], all_rows_see=all_rows_see)[0].unsqueeze(-2) if near else None
            qhat_at = _next_query(left, far_share, q_at, row_is_real)
    z = _bmm(left.transpose(-1, -2), _by_offset(*y))  # (E, H, j, l, D_v)
    lses = [far_lse, *near_lses]
    if near:
        z = merge([z, *(value.transpose(2, 3) for value, _ in near)], lses, all_rows_see=all_rows_see)
    output = _from_blocks(z, query_blocks, group)
    if prefix:
        output = _around(rows.transpose(1, 2), output.transpose(1, 2), 1, prefix_at_end).transpose(1, 2)
    if not wants_lse:
        return output.to(dtype), None
    lse = _from_blocks(total_lse(lses).unsqueeze(-1), query_blocks, group).squeeze(-1)
    return output.to(dtype), _around(rows_lse, lse, -1, prefix_at_end) if prefix else lse


def _around(of_prefix: Tensor, rest: Tensor, dim: int, at_end: bool) -> Tensor:
    """The rows of the prefix and all others in the order of the sequence: what `groups.cut` took apart."""
    return torch.cat([rest, of_prefix] if at_end else [of_prefix, rest], dim)


def _by_offset(x: Tensor) -> Tensor:
    """From (E, H, block, offset, D) to (E, H, offset, block, D), contiguous."""
    return x.transpose(2, 3).contiguous()


def _bmm(x: Tensor, y: Tensor, *, transposed: bool = False) -> Tensor:
    """x @ y, or x @ y^T, over three leading batch dimensions.

    torch.matmul would lay out a transposed operand anew; a transposed view costs a batched product nothing.
    """
    x3, y3 = x.flatten(0, 2), y.flatten(0, 2)
    return torch.unflatten(torch.bmm(x3, y3.mT if transposed else y3), 0, x.shape[:3])


def _literal_one(size: int) -> int:
    """A size, as a number where it is 1, which a symbolic one is guarded on: Inductor knows broadcast dims by it."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return 1 if guard_or_false(size == 1) else size


def _grouped(x: Tensor, group: int) -> Tensor:
    """From (E, H, l, j, D) to (E, H_kv, l, group * j, D): heads that share keys become offsets."""
    return torch.unflatten(x, 1, (-1, group)).transpose(2, 3).flatten(3, 4)


def _from_blocks(z: Tensor, blocks: Blocking, group: int) -> Tensor:
    """From (E, H_kv, group * j, l, D) to (E, H, N, D), laid out (E, N, H, D)."""
    batch, kv_heads, offsets, num_blocks, dim = z.shape
    size = offsets // group
    rows = torch.unflatten(z, 2, (group, size)).permute(0, 4, 3, 1, 2, 5)
    rows = rows.reshape(batch, num_blocks * size, kv_heads * group, dim)
    return blocks.joined(rows).transpose(1, 2)


def _far_keys(blocks: Blocking, key_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Keys that blocks may hold, visible and no padding, broadcastable to (E, H, b, j, i); None: every key."""
    if key_mask is not None:
        return _by_block(key_mask, blocks)
    return blocks.is_token(device)[None, None, :, None, :] if blocks.may_pad() else None


def _by_block(of_keys: Tensor, blocks: Blocking) -> Tensor:
    """A value of each key (E, N_k) where the keys lie in their blocks: (E, 1, b, 1, i), 0 (False) for padding."""
    return blocks.split(of_keys[:, None, :, None]).transpose(3, 4)


def _far_blocks(visible: Tensor | None, blocks: Blocking, windowed: bool, device: torch.device) -> Tensor | None:
    """Blocks in a row's far field that have a visible key, broadcastable to logits (E, H, j, b, l); None: all."""
    seen = None if visible is None else visible.any(-1).squeeze(-1)[:, :, None, :, None]
    if not windowed:
        return seen
    far = blocks.is_far(device)[None, None, None]
    return far if seen is None else far & seen


def _rows(blocks: Blocking, group: int, device: torch.device) -> Tensor | None:
    """(1, 1, j, l, 1) bool: rows that are no padding; None where all are such."""
    if not blocks.may_pad():
        return None
    real = blocks.is_token(device).t()
    return real.expand(group, -1, -1).reshape(1, 1, group * blocks.size, blocks.num_blocks, 1)


def _mean_query(q_at: Tensor, row_is_real: Tensor | None) -> Tensor:
    """The mean start: qbar / w is the mean real query at each offset, the same for every block: (E, H, j, 1, D)."""
    if row_is_real is None:
        return q_at.mean(3, keepdim=True)
    real = row_is_real.to(q_at.dtype)
    return (q_at * real).sum(3, keepdim=True) / real.sum(3, keepdim=True).clamp(min=1)


def _next_query(left: Tensor, far_share: Tensor | None, q_at: Tensor, row_is_real: Tensor | None) -> Tensor:
    """qbar / w of the next iteration, (E, H, j, b, D); 0 where no row gives the block any weight.

    `left` (E, H, j, b, l) sums to 1 over b; `far_share` (E, H, j, 1, l) is what each row gives its far field.
    """
    if far_share is not None:
        left = left * far_share
    if row_is_real is not None:
        left = left * row_is_real.transpose(-1, -2)
    weight = left.sum(-1)  # (E, H, j, b)
    total = _bmm(left, q_at)  # (E, H, j, b, D)
    return total / weight.masked_fill(weight == 0, 1.0).unsqueeze(-1)
