"""Models on images: an encoder as of DINOv2, with a class token, and a diffusion transformer as of DiT."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models.architectures import (
    EncoderBlock,
    ModulatedBlock,
    checked_grid,
    smooth_image,
    with_random_weights,
)

COARSE = 4
"""Images are interpolated from one random value for each so many patches along an axis: neighbours are alike."""


@dataclass(frozen=True)
class ImageEncoder:
    """A vision transformer as of DINOv2 (arXiv 2304.07193): `prefix` class tokens or registers, then the patches."""

    name: str
    depth: int
    width: int
    num_heads: int
    grid: tuple[int, int]
    patch: int = 14
    prefix: int = 1

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.width // self.num_heads

    def model(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with the same random weights at each call."""
        return with_random_weights(lambda: Encoder(self), device, dtype)

    def inputs(self, batch: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Images (batch, 3, height, width)."""
        rows, columns = checked_grid(self, tokens)
        generator = torch.Generator(device).manual_seed(tokens)
        shape = (batch, 3, rows * self.patch, columns * self.patch)
        coarse = (-(-rows // COARSE) + 1, -(-columns // COARSE) + 1)
        return (smooth_image(shape, coarse, device, generator).to(dtype),)


class ScaledBlock(EncoderBlock):
    """A block whose branches are scaled by learned numbers, one for each feature (LayerScale)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__(width, num_heads)
        self.scale1, self.scale2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width), as is the output."""
        x = x + self.scale1 * self.attention(self.norm1(x))
        return x + self.scale2 * self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """From pixels to features."""

    def __init__(self, architecture: ImageEncoder) -> None:
        super().__init__()
        width, (rows, columns) = architecture.width, architecture.grid
        self.patches = nn.Conv2d(3, width, architecture.patch, architecture.patch)
        self.leading = nn.Parameter(0.02 * torch.randn(1, architecture.prefix, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, rows * columns, width))
        self.blocks = nn.ModuleList(ScaledBlock(width, architecture.num_heads) for _ in range(architecture.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, prefix + patches, width)."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        x = torch.cat([self.leading.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@dataclass(frozen=True)
class ImageDiffuser:
    """A diffusion transformer as of DiT-XL/2 (arXiv 2212.09748), on latents of `channels`, in patches of 2 x 2."""

    name: str
    depth: int
    width: int
    num_heads: int
    grid: tuple[int, int]
    channels: int = 4
    patch: int = 2
    prefix: int = 0

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.width // self.num_heads

    def model(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with the same random weights at each call."""
        return with_random_weights(lambda: Diffuser(self), device, dtype)

    def inputs(self, batch: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Latents (batch, channels, height, width) and a condition (batch, width)."""
        rows, columns = checked_grid(self, tokens)
        generator = torch.Generator(device).manual_seed(tokens)
        shape = (batch, self.channels, rows * self.patch, columns * self.patch)
        coarse = (-(-rows // COARSE) + 1, -(-columns // COARSE) + 1)
        latents = smooth_image(shape, coarse, device, generator)
        return latents.to(dtype), torch.randn(batch, self.width, device=device, generator=generator).to(dtype)


class Diffuser(nn.Module):
    """From latents to noise and variance, each of as many channels."""

    def __init__(self, architecture: ImageDiffuser) -> None:
        super().__init__()
        width, patch, (rows, columns) = architecture.width, architecture.patch, architecture.grid
        self.patch, self.grid = patch, architecture.grid
        self.patches = nn.Conv2d(architecture.channels, width, patch, patch)
        self.register_buffer("positions", 0.5 * torch.randn(1, rows * columns, width))
        self.blocks = nn.ModuleList(ModulatedBlock(width, architecture.num_heads) for _ in range(architecture.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(width, patch**2 * 2 * architecture.channels)

    def forward(self, latents: Tensor, condition: Tensor) -> Tensor:
        """(batch, channels, height, width) and (batch, width) -> (batch, 2 channels, height, width)."""
        x = self.patches(latents).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        x = self.out(self.norm(x)).unflatten(2, (self.patch, self.patch, -1)).unflatten(1, self.grid)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
