"""A diffusion transformer as of Flux: text and image joined in one sequence, the text first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.architectures import Mlp, checked_grid, smooth_image, with_random_weights
from benchmarks.models.images import COARSE
from benchmarks.models.rotary import grid_positions, rotary_table, rotated


@dataclass(frozen=True)
class JointDiffuser:
    """Blocks of FLUX.1 (https://github.com/black-forest-labs/flux) on latents of 16 channels, packed 2 x 2.

    depth: blocks. double: those in which text and image have weights of their own; the others follow, with one set.
    prefix: tokens of the text, of `text_width` features. rotary_dims: features of a head that turn with each axis; of
    the first axis, which counts images, every position is 0.
    """

    name: str
    depth: int
    double: int
    width: int
    num_heads: int
    grid: tuple[int, int]
    rotary_dims: tuple[int, int, int]
    prefix: int = 512
    text_width: int = 4096
    channels: int = 16

    @property
    def head_dim(self) -> int:
        """Of queries, keys and values."""
        return self.width // self.num_heads

    def model(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with the same random weights at each call."""
        return with_random_weights(lambda: Joint(self), device, dtype)

    def inputs(self, batch: int, tokens: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Latents (batch, channels, height, width), a text (batch, prefix, text_width), a condition (batch, width)."""
        rows, columns = checked_grid(self, tokens)
        generator = torch.Generator(device).manual_seed(tokens)
        coarse = (-(-rows // COARSE) + 1, -(-columns // COARSE) + 1)
        latents = smooth_image((batch, self.channels, 2 * rows, 2 * columns), coarse, device, generator)
        text = torch.randn(batch, self.prefix, self.text_width, device=device, generator=generator)
        condition = torch.randn(batch, self.width, device=device, generator=generator)
        return latents.to(dtype), text.to(dtype), condition.to(dtype)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(batch, tokens, width) normed, then scaled and shifted by (batch, 1, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Stream(nn.Module):
    """The weights of a double block for the text or for the image."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation, self.qkv = nn.Linear(width, 6 * width), nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // num_heads, eps=1e-6) for _ in range(2))
        self.out, self.mlp = nn.Linear(width, width), Mlp(width)

    def parts(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate, twice, (batch, 1, width) each, from (batch, width)."""
        return self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (batch, heads, tokens, head_dim) of (batch, tokens, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.norm_q(q), self.norm_k(k), v

    def after(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The stream (batch, tokens, width) with its attention and MLP added."""
        _, _, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.out(attended)
        return x + gate2 * self.mlp(modulated(x, shift2, scale2))


class DoubleBlock(nn.Module):
    """Two streams that meet in attention, the text first."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.text, self.image = Stream(width, num_heads), Stream(width, num_heads)

    def forward(
        self, text: Tensor, image: Tensor, condition: Tensor, table: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """text, image: (batch, tokens, width), as are the outputs; condition: (batch, width)."""
        of_text, of_image = self.text.parts(condition), self.image.parts(condition)
        heads = self.text.heads(modulated(text, *of_text[:2])), self.image.heads(modulated(image, *of_image[:2]))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*heads, strict=True))
        y = F.scaled_dot_product_attention(rotated(q, table), rotated(k, table), v).transpose(1, 2).flatten(2)
        first, last = y.split([text.shape[1], image.shape[1]], dim=1)
        return self.text.after(text, first, of_text), self.image.after(image, last, of_image)


class SingleBlock(nn.Module):
    """Attention and an MLP side by side, over text and image alike."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.modulation, self.into = nn.Linear(width, 3 * width), nn.Linear(width, 7 * width)
        self.norm_q, self.norm_k = (nn.RMSNorm(width // num_heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, condition: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x: (batch, tokens, width), as is the output; condition: (batch, width)."""
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, dim=-1)
        packed, hidden = self.into(modulated(x, shift, scale)).split([3 * self.width, 4 * self.width], dim=-1)
        q, k, v = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = rotated(self.norm_q(q), table), rotated(self.norm_k(k), table)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + gate * self.out(torch.cat([y, F.gelu(hidden, approximate="tanh")], dim=-1))


class Joint(nn.Module):
    """From latents to latents."""

    def __init__(self, architecture: JointDiffuser) -> None:
        super().__init__()
        width, heads = architecture.width, architecture.num_heads
        self.grid, self.dims = architecture.grid, architecture.rotary_dims
        self.image = nn.Linear(4 * architecture.channels, width)
        self.text = nn.Linear(architecture.text_width, width)
        self.doubles = nn.ModuleList(DoubleBlock(width, heads) for _ in range(architecture.double))
        self.singles = nn.ModuleList(SingleBlock(width, heads) for _ in range(architecture.depth - architecture.double))
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, 4 * architecture.channels)

    def forward(self, latents: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        """(batch, channels, height, width), as is the output; text: (batch, prefix, text_width); condition: (batch,
        width)."""
        image, text = self.image(self._packed(latents)), self.text(text)
        table = rotary_table(grid_positions(text.shape[1], (1, *self.grid), image.device), self.dims)
        for double in self.doubles:
            text, image = double(text, image, condition, table)
        x = torch.cat([text, image], dim=1)
        for single in self.singles:
            x = single(x, condition, table)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        return self._unpacked(self.out(modulated(x[:, text.shape[1] :], shift, scale)))

    def _packed(self, latents: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, tokens, 4 channels): patches of 2 x 2."""
        batch, channels, _, _ = latents.shape
        rows, columns = self.grid
        patches = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(batch, rows * columns, 4 * channels)

    def _unpacked(self, x: Tensor) -> Tensor:
        """The inverse of `_packed`."""
        rows, columns = self.grid
        patches = x.reshape(len(x), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(len(x), -1, 2 * rows, 2 * columns)
