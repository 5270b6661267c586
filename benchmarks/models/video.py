"""A diffusion transformer on videos, as of Wan: three axes, rotary positions, cross-attention to a text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.architectures import checked_grid, smooth_image, with_random_weights
from benchmarks.models.images import COARSE
from benchmarks.models.rotary import grid_positions, rotary_table, rotated


@dataclass(frozen=True)
class VideoDiffuser:
    """Blocks of Wan (arXiv 2503.20314) on latents of 16 channels, in patches of 1 x 2 x 2.

    grid: frames, rows and columns of patches. hidden: features inside of the MLP. text: tokens of the prompt.
    """

    name: str
    depth: int
    width: int
    num_heads: int
    hidden: int
    grid: tuple[int, int, int]
    text: int = 512
    channels: int = 16
    prefix: int = 0

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.width // self.num_heads

    @property
    def rotary_dims(self) -> tuple[int, int, int]:
        """Features of a head that turn with time, height and width."""
        spatial = 2 * (self.head_dim // 6)
        return self.head_dim - 2 * spatial, spatial, spatial

    def model(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with the same random weights at each call."""
        return with_random_weights(lambda: Video(self), device, dtype)

    def inputs(self, batch: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Latents (batch, channels, frames, height, width), a text (batch, text, width) and a time (batch, width)."""
        frames, rows, columns = checked_grid(self, tokens)
        generator = torch.Generator(device).manual_seed(tokens)
        coarse = tuple(-(-size // COARSE) + 1 for size in self.grid)
        shape = (batch, self.channels, frames, 2 * rows, 2 * columns)
        latents = smooth_image(shape, coarse, device, generator)
        text = torch.randn(batch, self.text, self.width, device=device, generator=generator)
        time = torch.randn(batch, self.width, device=device, generator=generator)
        return latents.to(dtype), text.to(dtype), time.to(dtype)


class RotaryAttention(nn.Module):
    """Attention with normed queries and keys: of itself with rotary positions, or to a text."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)

    def forward(self, x: Tensor, context: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """(batch, tokens, width), as is the output; context: (batch, keys, width), `x` itself or a text."""
        q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(context)))
        if table is not None:
            q, k = rotated(q, table), rotated(k, table)
        y = F.scaled_dot_product_attention(q, k, self._heads(self.v(context)))
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class VideoBlock(nn.Module):
    """Self-attention, cross-attention and an MLP; the time shifts, scales and gates the first and the last."""

    def __init__(self, architecture: VideoDiffuser) -> None:
        super().__init__()
        width, heads = architecture.width, architecture.num_heads
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width**0.5)
        self.norm, self.norm_text = nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(width)
        self.attention, self.cross = RotaryAttention(width, heads), RotaryAttention(width, heads)
        hidden = architecture.hidden
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor, text: Tensor, time: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x: (batch, tokens, width), as is the output; text: (batch, text, width); time: (batch, 6, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).chunk(6, dim=1)
        y = self.norm(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, table)
        x = x + self.cross(self.norm_text(x), text, None)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Video(nn.Module):
    """From latents to latents."""

    def __init__(self, architecture: VideoDiffuser) -> None:
        super().__init__()
        width, self.grid, self.dims = architecture.width, architecture.grid, architecture.rotary_dims
        self.patches = nn.Conv3d(architecture.channels, width, (1, 2, 2), (1, 2, 2))
        self.time = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(VideoBlock(architecture) for _ in range(architecture.depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, 4 * architecture.channels)

    def forward(self, latents: Tensor, text: Tensor, time: Tensor) -> Tensor:
        """(batch, channels, frames, height, width), as is the output; text: (batch, text, width); time: (batch,
        width)."""
        x = self.patches(latents).flatten(2).transpose(1, 2)
        table = rotary_table(grid_positions(0, self.grid, x.device), self.dims)
        time = self.time(F.silu(time)).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, text, time, table)
        x = self.out(self.norm(x)).unflatten(2, (2, 2, -1)).unflatten(1, self.grid)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
