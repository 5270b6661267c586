"""Small vision models whose token axes are grids, and what finds the grids in their graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.elements.token_grid import NoGrid, TokenGrid, token_grid
from monarch_compile.passes.graph import aten, inputs
from support.capture import run_passes

DIM = 8
SDPA = aten.scaled_dot_product_attention.default


def graph_of(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> Graph:
    """The graph that matching sees."""
    with torch.no_grad():
        _, (result,) = run_passes(fn, *args, dynamic=dynamic)
    return result.before.graph


def grids_of(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, of: int = 1) -> list[TokenGrid | NoGrid]:
    """What is found of the keys (of=1) or the queries (of=0) of every attention, in order."""
    graph, layouts = graph_of(fn, *args, dynamic=dynamic), Layouts()
    sites = [node for node in graph.nodes if node.target is SDPA]
    return [token_grid(inputs(node)[of], -2, layouts) for node in sites]


def told(found: TokenGrid | NoGrid) -> tuple[int | str, ...] | str:
    """(prefix, sizes) of a grid of static sizes, each read where the grid says; the reason if there is none.

    Tokens after the grid are told at the end: "then 7".
    """
    if isinstance(found, NoGrid):
        return found.reason
    for axis in found.axes:
        assert axis.node is None or str(axis.node.meta["val"].shape[axis.dim]) == str(axis.size)
    after = (f"then {found.suffix}",) if found.suffix else ()
    return (found.prefix, *(int(axis.size) for axis in found.axes), *after)


def split_heads(x: Tensor) -> Tensor:
    """(b, n, c) -> (b, 2, n, c / 2)."""
    return x.view(*x.shape[:2], 2, -1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (b, n, c) with two heads."""
    y = F.scaled_dot_product_attention(split_heads(q), split_heads(k), split_heads(v))
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention with a fused projection, or cross-attention to a context."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if context is None else context).chunk(2, dim=-1)
        return self.out(attend(self.q(x), k, v))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.attention = nn.LayerNorm(DIM), nn.LayerNorm(DIM), Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, DIM))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.first(x), context)
        return x + self.mlp(self.second(x))


class Patches(nn.Module):
    """Patch embedding by a convolution: (b, 3, h, w) -> (b, h/8 * w/8, c)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, DIM, 8, 8)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image).flatten(2).transpose(1, 2)


class Vit(nn.Module):
    """ViT with a class token, `registers` after it, and position embeddings resized to the image."""

    def __init__(self, registers: int = 0) -> None:
        super().__init__()
        self.patches, self.blocks = Patches(), nn.ModuleList(Block() for _ in range(2))
        self.cls, self.registers = nn.Parameter(torch.randn(1, 1, DIM)), nn.Parameter(torch.randn(1, registers, DIM))
        self.pos = nn.Parameter(torch.randn(1, 17, DIM))

    def forward(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2] // 8, image.shape[-1] // 8
        x = torch.cat([self.cls.expand(image.shape[0], -1, -1), self.patches(image)], 1)
        grid = self.pos[:, 1:].reshape(1, 4, 4, DIM).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic").permute(0, 2, 3, 1).reshape(1, h * w, DIM)
        x = x + torch.cat([self.pos[:, :1], grid], 1)
        if self.registers.shape[1]:
            x = torch.cat([x[:, :1], self.registers.expand(x.shape[0], -1, -1), x[:, 1:]], 1)
        for block in self.blocks:
            x = block(x)
        return x


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


def rotated_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of pairs, as complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).type_as(x)


class Joint(nn.Module):
    """Flux-like: text and image have streams of their own, joined in attention, then one stream.

    text_last: the text comes after the image, as in Stable Diffusion 3.
    """

    def __init__(self, text_last: bool = False) -> None:
        super().__init__()
        self.text_last = text_last
        self.patches, self.qkv, self.text_qkv = Patches(), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 3 * DIM)
        self.out, self.text_out, self.block = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), Block()
        self.modulation = nn.Linear(DIM, 2 * DIM)

    def forward(self, image: Tensor, text: Tensor, cond: Tensor) -> Tensor:
        x = self.patches(image)
        shift, scale = self.modulation(F.silu(cond))[:, None].chunk(2, dim=-1)
        own = self.qkv(F.layer_norm(x, (DIM,)) * (1 + scale) + shift).view(*x.shape[:2], 3, 2, -1)
        other = self.text_qkv(F.layer_norm(text, (DIM,))).view(*text.shape[:2], 3, 2, -1)
        both = zip(own.unbind(2), other.unbind(2), strict=True)
        q, k, v = (torch.cat(self._in_order(b, a), 1).transpose(1, 2) for a, b in both)
        angles = torch.arange(q.shape[2], dtype=torch.float32)[:, None] * torch.arange(2)
        angles = torch.cat([angles, angles], -1)
        q, k = rotated(q, angles.cos(), angles.sin()), rotated(k, angles.cos(), angles.sin())
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, DIM)
        sizes = [part.shape[1] for part in self._in_order(text, x)]
        y_text, y_image = self._in_order(*y.split(sizes, 1))
        x, text = x + self.out(y_image), text + self.text_out(y_text)
        y = self.block(torch.cat(self._in_order(text, x), 1))
        return y[:, : -text.shape[1]] if self.text_last else y[:, text.shape[1] :]

    def _in_order(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The two as they follow each other in the sequence; and back."""
        return (image, text) if self.text_last else (text, image)


class Video(nn.Module):
    """Wan-like: a video in patches of (1, 2, 2), rotary embeddings, cross-attention to a text."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv = nn.Conv3d(3, DIM, (1, 2, 2), (1, 2, 2)), nn.Linear(DIM, 3 * DIM)
        self.norm, self.cross, self.last = nn.RMSNorm(DIM), Attention(), Block()
        self.gate = nn.Parameter(torch.randn(1, 1, DIM))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patches(video).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (self.norm(y).unflatten(2, (2, -1)) for y in (q, k))
        angles = torch.arange(q.shape[1], dtype=torch.float32)[:, None, None] * torch.arange(2)
        q, k, v = rotated_pairs(q, angles), rotated_pairs(k, angles), v.unflatten(2, (2, -1))
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + y.transpose(1, 2).flatten(2, 3) * self.gate
        return self.last(x + self.cross(x, text))


def into_windows(x: Tensor, size: int) -> Tensor:
    """(b, h, w, c) -> (b * windows, size * size, c)."""
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def from_windows(x: Tensor, size: int, h: int, w: int) -> Tensor:
    """The inverse of into_windows."""
    x = x.view(-1, h // size, w // size, size, size, x.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


class Windows(nn.Module):
    """Swin- and ViTDet-like: attention in windows, in shifted windows, in padded windows, and of all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(3, DIM, 8, 8), nn.ModuleList(Block() for _ in range(4))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image).permute(0, 2, 3, 1)
        b, h, w, _ = x.shape
        x = from_windows(self.blocks[0](into_windows(x, 2)), 2, h, w)
        y = torch.roll(x, (-1, -1), (1, 2))
        y = from_windows(self.blocks[1](into_windows(y, 2)), 2, h, w)
        x = x + torch.roll(y, (1, 1), (1, 2))
        y = F.pad(x, (0, 0, 0, -w % 4, 0, -h % 4))
        y = from_windows(self.blocks[2](into_windows(y, 4)), 4, h + -h % 4, w + -w % 4)
        x = x + y[:, :h, :w]
        return self.blocks[3](x.reshape(b, h * w, DIM))


class Dit(nn.Module):
    """DiT: adaLN modulation, and patches put back into an image, which a second network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention, self.modulation = Patches(), Attention(), nn.Linear(DIM, 3 * DIM)
        self.last, self.again, self.block = nn.Linear(DIM, 3 * 64), Patches(), Block()
        self.register_buffer("pos", torch.randn(1, 48, DIM))

    def forward(self, image: Tensor, cond: Tensor) -> Tensor:
        b, _, h, w = image.shape
        x = self.patches(image) + self.pos
        shift, scale, gate = self.modulation(F.silu(cond)).chunk(3, dim=1)
        y = F.layer_norm(x, (DIM,)) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
        x = self.last(x + gate.unsqueeze(1) * self.attention(y))
        x = torch.einsum("nhwpqc->nchpwq", x.view(b, h // 8, w // 8, 8, 8, 3)).reshape(b, 3, h, w)
        return self.block(self.again(x))


class Pvt(nn.Module):
    """PVT: keys and values from a strided convolution of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.q, self.kv = Patches(), nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
        self.reduce, self.norm = nn.Conv2d(DIM, DIM, 2, 2), nn.LayerNorm(DIM)
        self.local = nn.Conv2d(DIM, DIM, 3, 1, 1, groups=DIM)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        b, _, h, w = image.shape
        grid = x.transpose(1, 2).view(b, DIM, h // 8, w // 8)
        x = x + self.local(grid).flatten(2).transpose(1, 2)
        small = self.norm(self.reduce(grid).reshape(b, DIM, -1).permute(0, 2, 1))
        k, v = self.kv(small).reshape(b, -1, 2, DIM).permute(2, 0, 1, 3)
        return attend(self.q(x), k, v)


class Perceiver(nn.Module):
    """Learned queries look at an image, then the image at them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.latents = Patches(), nn.Parameter(torch.randn(1, 5, DIM))
        self.read, self.write = Attention(), Attention()

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        latents = self.latents.expand(x.shape[0], -1, -1)
        return x + self.write(x, latents + self.read(latents, x))
