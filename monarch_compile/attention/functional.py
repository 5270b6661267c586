"""The public functional form of Monarch attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.calls import active_transform
from monarch_compile.errors import InputError, IRError


def monarch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int | None = None,
    num_iters: int = 1,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    init: str = "identity",
    pad: str = "post",
    window: int | Sequence[int] | None = 1,
    prefix: int = 0,
    grid: Sequence[int] | None = None,
    tile: Sequence[int] | None = None,
    window_shape: str = "box",
    prefix_at_end: bool = False,
    chosen: int = 0,
    causal: bool = False,
) -> Tensor:
    """MonarchAttention (arXiv 2505.18698, section 3): softmax attention through a Monarch matrix, in N * sqrt(N) work.

    Beside the paper's form, a few groups of keys are taken out of a row's far field and treated exactly; the groups
    and the far field merge by logsumexp.

    Under torch.func (grad, vmap, jvp, ...) and forward-mode differentiation the reference runs instead of the kernels,
    on CUDA too: it is made of differentiable torch operations.

    Args:
        q: queries, (batch, num_heads, seq_len_q, head_dim); float16, bfloat16, float32 or float64.
        k: keys, (batch, num_kv_heads, seq_len_k, head_dim); num_heads is a multiple of num_kv_heads, and query head h
            reads key head h // (num_heads / num_kv_heads).
        v: values, (batch, num_kv_heads, seq_len_k, value_dim).
        block_size: keys in a block. 1, or at least seq_len_k, gives exact softmax attention. May be left out with a
            tile, whose number of tokens it is.
        num_iters: pairs of updates of the two Monarch factors.
        scale: multiplies q k^T; 1 / sqrt(head_dim) when None.
        key_padding_mask: (batch, seq_len_k) bool, **True where a key is padding and is ignored**, as in
            torch.nn.MultiheadAttention. A row that sees no key outputs 0.
        key_bias: (batch, seq_len_k), floating, added to the scores of every row; -inf (or at most -1e30) hides the key.
        init: "identity" (a block is first represented by its own queries) or "mean" (by the mean query).
        pad: on which side a sequence is padded to whole blocks, "post" or "pre".
        window: blocks on each side of a query's own block that it attends to exactly, beside its own (0: its own
            only), counted along each axis where blocks are tiles, or a number for each axis of the tile; None: none,
            the paper's form. Between unequal lengths it means little, and CUDA takes None only.
        prefix: leading keys that every query attends to exactly; as many leading queries attend to every key exactly.
            Blocks are of what follows them.
        prefix_at_end: whether these tokens are the last of the sequence, not the first: text that comes after an image.
        grid: sizes of the axes, one to three, that the tokens outside of the prefix flatten row by row: (height,
            width) of an image, (frames, height, width) of a video. Given together with `tile`; seq_len_q and seq_len_k
            are then both prefix + the product of the sizes.
        tile: tokens of a block along each axis of the grid: blocks are then tiles of it, and `pad` must be "post".
        window_shape: the tiles of a window, all at most `window` away along each axis ("box") or those along one axis
            alone ("plus").
        chosen: blocks outside of the window that each block of queries attends to exactly, for each key head by
            itself: those of most far-field mass, the first of equal ones. Needs num_iters=1, init="identity" and
            seq_len_q == seq_len_k, unless it is causal. The own block is exact then, whatever the window.
        causal: whether a query sees no later key. Needs num_iters=1, init="identity" and no tile. Fewer queries than
            keys are the last of their sequence: a cache holds the keys of those before, which count as queries of 0.
            The window is of the blocks before a query's own, which is exact itself; a prefix is exact for every
            later query, and causal in itself. Blocks are chosen by the queries of the block before, so that no output
            depends on a later token.

    Returns:
        (batch, num_heads, seq_len_q, value_dim), in q's dtype, its memory dense in (batch, seq, heads, dim) order,
        however the inputs lie: merging the heads is a view.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or a parameter is out of range.
        CodegenError: no CUDA kernel exists for the dtype, the head size, or a window or prefix between unequal lengths.
    """
    _check_tensors(q, k, v, key_padding_mask)
    _check_bias(k, key_padding_mask, key_bias)
    size = math.prod(tile) if block_size is None and tile is not None else block_size
    options: tuple[Any, ...] = (size, num_iters, init, pad, window, prefix, tile, window_shape, prefix_at_end, chosen)
    try:
        form = Form(**dict(zip(FORM_OPTIONS, options, strict=True)))
    except IRError as error:
        raise InputError(str(error)) from None
    _check_grid(q, k, form, grid)
    _check_order(q, k, form, causal)
    from monarch_compile.attention import gradients
    from monarch_compile.attention.op import attention, attention_under_transforms, attention_with_lse

    key_mask = key_bias if key_padding_mask is None else ~key_padding_mask
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    arguments = (q, k, v, key_mask, float(scale), *form.arguments(), grid and list(grid), causal)
    if active_transform():
        return attention_under_transforms(*arguments)
    if gradients.are_wanted(arguments[:4], form, is_cross=q.shape[2] != k.shape[2], is_causal=causal):
        found: tuple[Tensor, Tensor] = attention_with_lse(*arguments)
        return found[0]
    output: Tensor = attention(*arguments)
    return output


def _check_grid(q: Tensor, k: Tensor, form: Form, grid: Sequence[int] | None) -> None:
    if (grid is None) != (form.tile is None):
        raise InputError(f"a grid needs a tile, and a tile a grid; found grid {grid} and tile {form.tile}")
    if grid is None or form.tile is None:
        return
    if len(grid) != len(form.tile) or any(size < 1 for size in grid):
        raise InputError(f"grid must have as many sizes as tile {form.tile}, each at least 1; found {tuple(grid)}")
    if q.shape[2] != k.shape[2] or form.prefix + math.prod(grid) != k.shape[2]:
        raise InputError(
            f"prefix and grid must make up the queries and the keys: {form.prefix} + {' * '.join(map(str, grid))} = "
            f"{form.prefix + math.prod(grid)} tokens; found {q.shape[2]} queries and {k.shape[2]} keys"
        )


def _check_order(q: Tensor, k: Tensor, form: Form, causal: bool) -> None:
    if not causal and not form.chosen:
        return
    if causal and q.shape[2] > k.shape[2]:
        raise InputError(f"'causal' needs a key for each query; found {q.shape[2]} queries and {k.shape[2]} keys")
    if not causal and q.shape[2] != k.shape[2]:
        raise InputError(f"'chosen' needs as many queries as keys; found {q.shape[2]} and {k.shape[2]}")
    if causal and not form.weighs_own_block_exactly:
        raise InputError(f"'causal' needs num_iters=1 and init='identity'; found {form}")
    if causal and form.prefix_at_end:
        raise InputError("'causal' needs its prefix at the start; found prefix_at_end=True")
    if causal and form.tile is not None:
        raise InputError(f"'causal' needs pieces of the sequence; found tile {form.tile}")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise InputError(f"q, k and v must be (batch, num_heads, seq_len, dim); found {shapes}")
    if not (q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]):
        raise InputError(
            f"q and k must agree in batch and head_dim, k and v in batch, num_heads and seq_len; found {shapes}"
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise InputError(f"no size may be 0; found {shapes}")
    if q.shape[1] % k.shape[1]:
        raise InputError(f"q's num_heads must be a multiple of k's; found {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise InputError(f"q, k and v must share one floating dtype; found {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise InputError(f"q, k and v must be on one device; found {q.device}, {k.device}, {v.device}")
    if mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if tuple(mask.shape) != expected or mask.dtype != torch.bool or mask.device != k.device:
        raise InputError(
            f"key_padding_mask must be bool {expected} on {k.device}, True where a key is ignored; "
            f"found {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )


def _check_bias(k: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    if bias is None:
        return
    if mask is not None:
        raise InputError("key_bias and key_padding_mask were both given; a key with a bias of -inf is hidden")
    expected = (k.shape[0], k.shape[2])
    if tuple(bias.shape) != expected or not bias.dtype.is_floating_point or bias.device != k.device:
        found = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise InputError(f"key_bias must be floating {expected} on {k.device}; found {found}")
