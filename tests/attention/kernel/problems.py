"""Problems for the kernels, and how one is run against the float64 reference."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from tolerances import assert_close
from torch import Tensor

from monarch_compile.attention.form import as_arguments
from monarch_compile.attention.op import attention
from monarch_compile.attention.reference import reference
from monarch_compile.codegen.attention.launch import launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One attention. mask: "none", "some" keys hidden, "blocks" (and one whole batch entry) hidden, "bias"."""

    seq_len: int
    block_size: int
    head_dim: int
    value_dim: int
    num_iters: int = 1
    init: str = "identity"
    pad: str = "post"
    mask: str = "none"
    layout: str = "contiguous"
    batch: int = 2
    num_heads: int = 1
    window: int | tuple[int, ...] | None = None
    prefix: int = 0
    group: int = 1  # query heads that share a key head
    queries: int | None = None  # how many, where not as many as keys (seq_len)
    grid: tuple[int, ...] | None = None  # what the tokens outside of the prefix lie on
    tile: tuple[int, ...] | None = None
    window_shape: str = "box"
    prefix_at_end: bool = False
    chosen: int = 0
    causal: bool = False

    @staticmethod
    def tiled(grid: tuple[int, ...], tile: tuple[int, ...], head_dim: int, value_dim: int, **more: Any) -> Case:
        """One whose blocks are tiles of a grid."""
        seq_len = more.get("prefix", 0) + math.prod(grid)
        return Case(seq_len, math.prod(tile), head_dim, value_dim, grid=grid, tile=tile, **more)

    def __str__(self) -> str:
        rows = "" if self.queries is None else f"q{self.queries}"
        size = f"{rows}n{self.seq_len}b{self.block_size}d{self.head_dim}e{self.value_dim}"
        window = "x".join(map(str, self.window)) if isinstance(self.window, tuple) else self.window
        groups = (
            "" if self.window is None and not self.prefix else f"-w{window}p{self.prefix}{'end' * self.prefix_at_end}"
        )
        shared = "" if self.group == 1 else f"-g{self.group}"
        listed = f"{'-causal' if self.causal else ''}{f'-k{self.chosen}' if self.chosen else ''}"
        tiles = ""
        if self.grid is not None and self.tile is not None:
            grid, tile = ("x".join(map(str, sizes)) for sizes in (self.grid, self.tile))
            tiles = f"-{grid}by{tile}{self.window_shape}"
        return (
            f"{size}-t{self.num_iters}-{self.init}-{self.pad}-{self.mask}-{self.layout}{groups}{shared}{tiles}{listed}"
        )

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments of `launch` and of `reference`."""
        return {
            "block_size": self.block_size,
            "scale": self.head_dim**-0.5,
            "num_iters": self.num_iters,
            "init": self.init,
            "pad": self.pad,
            "window": self.window,
            "prefix": self.prefix,
            "tile": self.tile,
            "window_shape": self.window_shape,
            "prefix_at_end": self.prefix_at_end,
            "chosen": self.chosen,
            "grid": self.grid,
            "causal": self.causal,
        }


def in_every_layout(count: int) -> list[Case]:
    """Some of all combinations of layouts, row lengths, blocks that fill tiles and do not, and exact groups."""
    combinations = itertools.product(
        ("packed", "transposed", "unaligned"),
        (777, 1024),
        (45, 64, 200),
        ((64, 64), (25, 80), (65, 65), (128, 128)),
        ((None, 0), (1, 0), (1, 4)),
    )
    return [
        Case(seq_len, block_size, *dims, num_heads=2, layout=kind, window=window, prefix=prefix)
        for kind, seq_len, block_size, dims, (window, prefix) in random.Random(0).sample([*combinations], count)
    ]


def tensors(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Standard normal q, k, v in the case's layout, and its key mask."""
    generator = torch.Generator().manual_seed(case.seq_len)
    heads = (case.num_heads, case.num_heads // case.group)

    def random(heads: int, dim: int, seq_len: int = case.seq_len) -> Tensor:
        values = torch.randn(case.batch, heads, seq_len, dim, generator=generator)
        return layout(values.to(device, dtype), case.layout)

    q = random(heads[0], case.head_dim, case.queries or case.seq_len)
    k, v = (random(heads[1], dim) for dim in (case.head_dim, case.value_dim))
    return q, k, v, key_mask(case, device)


def layout(x: Tensor, kind: str) -> Tensor:
    """The same values in other memory: packed (one projection), transposed (features outside rows), unaligned."""
    batch, heads, rows, dim = x.shape
    if kind == "packed":
        wide = x.new_zeros(batch, rows, 3, heads, dim)
        wide[:, :, 1] = x.transpose(1, 2)
        return wide[:, :, 1].transpose(1, 2)
    if kind == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "unaligned":
        flat = x.new_zeros(x.numel() + 1)[1:]
        return flat.copy_(x.flatten()).view_as(x)
    return x


def key_mask(case: Case, device: str) -> Tensor | None:
    """(batch, seq_len): bool, True where a key is visible, or what is added to its scores."""
    if case.mask == "none":
        return None
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(case.batch, case.seq_len, generator=generator) > 0.3
    mask[0, 0] = True
    if case.mask == "bias":
        return torch.randn(mask.shape, generator=generator).mul(3).masked_fill(~mask, float("-inf")).to(device)
    if case.mask == "blocks":
        mask[0, case.seq_len // 3 :] = False
        mask[-1] = False
    return mask.to(device)


def run(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The kernels: through the operator on CUDA, called directly where they are interpreted (there the operator
    runs the reference)."""
    return through_operator(case, q, k, v, mask) if q.is_cuda else launch(q, k, v, mask, **case.options)


def through_operator(case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What the operator gives."""
    options = case.options
    return attention(q, k, v, mask, **dict(zip(options, as_arguments(options), strict=True)))


def check(case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """Run the kernels of `case`, compare with the float64 reference, return their output."""
    q, k, v, mask = tensors(case, dtype, device)
    found = run(case, q, k, v, mask)
    expected = reference(q.double(), k.double(), v.double(), mask, **case.options)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert found.transpose(1, 2).is_contiguous()
    assert_close(found, expected, case.num_iters)
    if case.mask == "blocks":
        assert (found[-1] == 0).all(), "rows that see no key must be 0"
    return found
