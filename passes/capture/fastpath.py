"""torch.nn's fused inference layers, opened: one op that hides attention is traced as the steps it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encoder_layer(
    x: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor | None,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor | None,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor | None,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor | None,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd` of x (batch, seq_len, embed_dim), by its public definition.

    A nonzero element of `mask` hides: mask_type 0 is (seq_len, seq_len), 1 (batch, seq_len), 2 broadcasts to
    (batch, num_heads, seq_len, seq_len). A row that sees no key gives 0.
    """
    hidden = None if mask is None else mask.to(torch.bool)
    if hidden is not None:
        hidden = hidden[:, None, None, :] if mask_type == 1 else hidden

    def attend(x: Tensor) -> Tensor:
        batch, seq_len, _ = x.shape
        packed = F.linear(x, qkv_weight, qkv_bias).view(batch, seq_len, 3, num_heads, embed_dim // num_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if hidden is None else ~hidden)
        return F.linear(y.transpose(1, 2).reshape(batch, seq_len, embed_dim), out_weight, out_bias)

    def feed_forward(x: Tensor) -> Tensor:
        activation: Callable[[Tensor], Tensor] = F.gelu if use_gelu else F.relu
        return F.linear(activation(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = x + attend(norm_1(x))
        return x + feed_forward(norm_2(x))
    x = norm_1(x + attend(x))
    return norm_2(x + feed_forward(x))


OPENED: dict[object, Callable[..., Any]] = {torch._transformer_encoder_layer_fwd: encoder_layer}
"""Fused ops as Dynamo's graphs call them, and what is traced instead."""


def opened(target: object, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The open form of a call; None where there is none, or its input is a nested tensor."""
    return None if not args or getattr(args[0], "is_nested", False) else OPENED.get(target)
