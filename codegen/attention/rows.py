"""Exact attention of the few rows of a prefix to every key: what no kernel of ours does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

from monarch_compile.attention.groups import HIDDEN, split_mask
from monarch_compile.codegen.attention.specialization import is_known_to_be

FEW_HEADS, FEW_ROWS = 64, 64
"""Up to so many heads of all batch entries, and rows of each, leave most of a GPU idle, unless the keys of a head are
shared out."""

WHOLE_VECTORS = 8
"""FlashAttention copies tensors whose heads are no multiple of this."""

VECTOR_BYTES = 16
"""torch's kernels of exact attention load so many bytes at once, and not all of them look where a tensor begins: on an
H100 a float32 tensor that begins 4 bytes into its memory ends the process (torch 2.11, misaligned address)."""


def exact_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    *,
    causal: bool = False,
    cached: Any = 0,
) -> Tensor:
    """Exact attention of rows q (E, H, P, D) to every key: (E, H, P, D_v); 0 where a row sees none.

    k (E, H_kv, N_k, D), v (E, H_kv, N_k, D_v), key_mask (E, N_k), bool or added to the scores. Where it is `causal`,
    the rows are those of the sequence after its `cached` first ones, and see no key after their own.
    """
    q, k, v = _aligned(q, k, v)
    if scale <= 0:  # some kernels take the largest score before they scale
        q, scale = q * scale, 1.0
    if causal:
        return _causal_rows(q, k, v, key_mask, scale, cached)
    grouped = bool(q.shape[1] != k.shape[1])
    if key_mask is None and _is_to_share(q) and _flash_takes(q, k, v, grouped):
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
        return found
    if key_mask is None:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    return _masked_rows(q, k, v, key_mask, None, scale, grouped)


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that begin where a GPU's vectors do; others are copied. A CPU does not mind."""
    return tuple(
        x
        if x.device.type != "cuda" or is_known_to_be(x.storage_offset() * x.element_size() % VECTOR_BYTES, 0)
        else x.clone(memory_format=torch.contiguous_format)
        for x in tensors
    )


def _causal_rows(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, cached: Any) -> Tensor:
    count, grouped = q.shape[2], bool(q.shape[1] != k.shape[1])
    begins = isinstance(cached, int) and cached == 0
    if begins:
        k, v = (torch.ops.aten.slice.Tensor(x, 2, 0, count) for x in (k, v))
        if key_mask is None:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        key_mask = torch.ops.aten.slice.Tensor(key_mask, 1, 0, count)
    place = torch.arange(k.shape[2], device=q.device)
    triangle = place <= torch.arange(count, device=q.device)[:, None] + cached
    if key_mask is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=triangle, scale=scale, enable_gqa=grouped)
    return _masked_rows(q, k, v, key_mask, triangle, scale, grouped)


def _masked_rows(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, triangle: Tensor | None, scale: float, grouped: bool
) -> Tensor:
    """Rows that see the keys which both masks show; triangle (P, N_k): those that each may see, None: all."""
    mask, bias = split_mask(key_mask[:, None, None, :], torch.float32)
    seen = mask = mask if triangle is None else mask & triangle
    if bias is not None:  # 0 for the largest that a row sees: 16 bits hold large biases badly, or not at all
        top = bias.masked_fill(~seen, HIDDEN).amax(-1, keepdim=True)
        mask = (bias - top).to(q.dtype).masked_fill(~seen, float("-inf"))
    found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return torch.where(seen.any(-1, keepdim=True), found, 0.0)


def _is_to_share(q: Tensor) -> bool:
    """Whether rows q are best served by FlashAttention, which alone shares out the keys of a head.

    A single row is not: cuDNN, torch's first choice, does those well.
    """
    batch, heads, rows, dim = q.shape
    known = all(isinstance(size, int) for size in (batch, heads, rows))
    few = known and batch * heads <= FEW_HEADS and 1 < rows <= FEW_ROWS
    return few and q.device.type == "cuda" and dim % WHOLE_VECTORS == 0


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """Whether FlashAttention takes these tensors, and the caller lets it.

    It is called by name: to put it first in SDPA's own order (`sdpa_kernel`) would be seen by all of the process, and
    if no attention ran before, what is restored is not the order that torch would have settled on.
    """
    return can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped))
