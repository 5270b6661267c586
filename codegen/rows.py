"""Exact attention of the few rows of a prefix to every key: what no kernel of ours does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from monarch_compile.groups import split_mask

FEW_HEADS, FEW_ROWS = 64, 64
"""Up to so many heads of all batch entries, and rows of each, leave most of a GPU idle, unless the keys of a head are
shared out."""

ENABLED: dict[SDPBackend, Callable[[], bool]] = {
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: cuda.math_sdp_enabled,
}
"""The order in which a few rows of few heads are best served: FlashAttention alone shares out the keys of a head."""


def exact_rows(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Exact attention of rows q (E, H, P, D) to every key: (E, H, P, D_v); 0 where a row sees none.

    k (E, H_kv, N_k, D), v (E, H_kv, N_k, D_v), key_mask (E, N_k), bool or added to the scores.
    """
    if scale <= 0:  # some kernels take the largest score before they scale
        q, scale = q * scale, 1.0
    grouped = bool(q.shape[1] != k.shape[1])
    with _backends(q):
        if key_mask is None:
            return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        key_mask = key_mask.unsqueeze(1).unsqueeze(1)
        seen, bias = split_mask(key_mask, q.dtype)
        mask = key_mask if bias is None else bias.masked_fill(~seen, float("-inf"))
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return torch.where(seen.any(-1, keepdim=True), found, 0.0)


def _backends(q: Tensor) -> contextlib.AbstractContextManager[object]:
    """The order of SDPA's backends for rows q; torch's own for a single row, which cuDNN does best."""
    batch, heads, rows, _ = q.shape
    known = all(isinstance(size, int) for size in (batch, heads, rows))
    if q.device.type != "cuda" or not known or not 1 < rows <= FEW_ROWS or batch * heads > FEW_HEADS:
        return contextlib.nullcontext()
    return sdpa_kernel([backend for backend, is_on in ENABLED.items() if is_on()], set_priority=True)
