"""Models on sequences of tokens: an encoder as of ViT, and the blocks of a diffusion transformer (DiT).

Weights are random. Those on images and videos are in `images`, `video` and `joint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTH = 16
"""Neighbouring tokens are interpolated from one random token for each so many: as in images, neighbours are alike."""


class Described(Protocol):
    """What a model is made of: a frozen dataclass, whose fields are kept with its results.

    grid: sizes of the axes that its tokens flatten, outermost first; None: a sequence. prefix: tokens before the grid.
    depth: layers with self-attention.
    """

    @property
    def name(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def prefix(self) -> int: ...
    @property
    def grid(self) -> tuple[int, ...] | None: ...

    def model(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with the same random weights at each call."""

    def inputs(self, batch: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What it is called with; of a grid, `tokens` must be the number of all."""


@dataclass(frozen=True)
class Architecture:
    """A stack of equal blocks. modulated: shifted, scaled and gated by a condition (adaLN), as in DiT."""

    name: str
    depth: int
    width: int
    num_heads: int
    modulated: bool
    grid: ClassVar[tuple[int, ...] | None] = None
    prefix: ClassVar[int] = 0

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.width // self.num_heads

    def model(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with the same random weights at each call; every layer keeps the size of what it is given."""
        return with_random_weights(lambda: Stack(self), device, dtype)

    def inputs(self, batch: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Tokens (batch, tokens, width) and, for a modulated stack, a condition (batch, width)."""
        generator = torch.Generator(device).manual_seed(tokens)
        coarse = torch.randn(batch, self.width, -(-tokens // SMOOTH) + 1, device=device, generator=generator)
        smooth = F.interpolate(coarse, size=tokens, mode="linear", align_corners=True).transpose(1, 2).contiguous()
        if not self.modulated:
            return (smooth.to(dtype),)
        return smooth.to(dtype), torch.randn(batch, self.width, device=device, generator=generator).to(dtype)


def with_random_weights(make: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> nn.Module:
    """The module that `make` makes, in eval mode; linear layers keep the size of what they are given."""
    torch.manual_seed(0)
    with torch.device(device):
        made = make().eval()
    for linear in made.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
    return made.to(dtype)


def smooth_image(shape: Sequence[int], coarse: Sequence[int], device: str, generator: torch.Generator) -> Tensor:
    """A random image or video of `shape` (batch, channels, *sizes), interpolated from one of sizes `coarse`."""
    values = torch.randn(*shape[:2], *coarse, device=device, generator=generator)
    mode = "bilinear" if len(coarse) == 2 else "trilinear"
    return F.interpolate(values, size=tuple(shape[2:]), mode=mode, align_corners=True)


def num_tokens(architecture: Described) -> int:
    """Tokens of the prefix and of the grid.

    Raises:
        ValueError: the architecture has no grid.
    """
    if architecture.grid is None:
        raise ValueError(f"{architecture.name} has no grid: it takes any number of tokens")
    return architecture.prefix + math.prod(architecture.grid)


def checked_grid(architecture: Described, tokens: int) -> tuple[int, ...]:
    """The grid of an architecture that has one.

    Raises:
        ValueError: prefix and grid do not make up `tokens`.
    """
    found = num_tokens(architecture)
    if tokens != found:
        raise ValueError(f"{architecture.name} has {found} tokens, its prefix among them; found {tokens}")
    assert architecture.grid is not None
    return architecture.grid


class Attention(nn.Module):
    """Bidirectional self-attention from one packed projection."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), as is the output."""
        packed = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    """Two layers, four times as wide in between."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


class EncoderBlock(nn.Module):
    """A pre-norm block of ViT."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.mlp = Attention(width, num_heads), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), as is the output."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ModulatedBlock(nn.Module):
    """A block of DiT: the condition shifts, scales and gates both branches."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention, self.mlp = Attention(width, num_heads), Mlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: (batch, tokens, width), as is the output; condition: (batch, width)."""
        parts = self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class Stack(nn.Module):
    """The blocks and a norm; no embedding and no head."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        kind = ModulatedBlock if architecture.modulated else EncoderBlock
        sizes = architecture.width, architecture.num_heads
        self.blocks = nn.ModuleList(kind(*sizes) for _ in range(architecture.depth))
        self.norm = nn.LayerNorm(architecture.width)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        """(batch, tokens, width), as is the output."""
        for block in self.blocks:
            x = block(x, *condition)
        return self.norm(x)
