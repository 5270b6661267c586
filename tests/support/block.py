"""The smallest model with attention, as a transformer would write it, and the same by the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from monarch_compile.attention.functional import monarch_attention


class Block(nn.Module):
    """Self-attention with a packed projection."""

    def __init__(self, dim: int = 24, num_heads: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        batch, seq_len, dim = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if visible is None else visible[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, seq_len, dim))

    def by_reference(self, x: Tensor, visible: Tensor | None = None, **options: object) -> Tensor:
        """The same layer with Monarch attention by hand."""
        batch, seq_len, dim = x.shape
        q, k, v = self.qkv(x).view(batch, seq_len, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        padding = None if visible is None else ~visible
        y = monarch_attention(q, k, v, key_padding_mask=padding, **options)
        return self.out(y.transpose(1, 2).reshape(batch, seq_len, dim))


def key_padding(batch: int, seq_len: int) -> Tensor:
    """Rows of falling length; the last sequence of several is nearly empty."""
    lengths = torch.linspace(seq_len, 2, batch).long()
    return torch.arange(seq_len)[None] < lengths[:, None]
