"""How the tokens of a sequence are cut into blocks: pieces of the sequence, or tiles of the grid that it flattens.

Eager semantics, for `reference`. A blocking says where each token is in its block, which places hold no token, and
which blocks are neighbours. Index letters as in `reference`: l, b blocks; j, i offsets in a block.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Steps = tuple[tuple[int, ...], ...]
"""Steps along each axis from a tile to others."""

Window = int | tuple[int, ...]
"""Blocks on each side of a row's own that are in its window: along every axis, or along each."""


def plain_window(window: int | Sequence[int] | None) -> Window | None:
    """A window in the one way to write it: a number where it is the same along all axes."""
    if window is None or not isinstance(window, (tuple, list)):
        return window  # type: ignore[return-value]
    sizes = tuple(window)
    return sizes[0] if len(set(sizes)) == 1 else sizes


def along_axes(window: Window, num_axes: int) -> tuple[int, ...]:
    """A window's blocks on each side along each of the axes."""
    return window if isinstance(window, tuple) else (window,) * num_axes


class Blocking(Protocol):
    """The blocks of one sequence, whose prefix is cut off already."""

    @property
    def num_blocks(self) -> Any:
        """Blocks of the sequence, an int or a symbolic one."""

    @property
    def size(self) -> Any:
        """Places in a block."""

    def split(self, x: Tensor) -> Tensor:
        """From (E, H, N, D) to (E, H, b, i, D), with zeros where a block holds no token."""

    def joined(self, x: Tensor) -> Tensor:
        """From (E, b * i, H, D) to (E, N, H, D), contiguous: the tokens in their order, without the places between."""

    def may_pad(self) -> bool:
        """Whether a block may hold places without a token; symbolic sizes take no guard."""

    def is_token(self, device: torch.device) -> Tensor:
        """(b, i) bool: whether a place in a block holds a token."""

    def with_neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks (E, H, b, i, D), and each with those of its window: (E * H * b, keys, D)."""

    def of_neighbours(self, of_keys: Tensor) -> Tensor:
        """A number of each key (E, 1, b, 1, i) for the keys of each window (E, 1, l, 1, keys); 0 beyond the edges."""

    @property
    def own_place(self) -> int:
        """The place of a block itself among those of its window."""

    def is_far(self, device: torch.device) -> Tensor:
        """(b, l) bool: whether block b is in the far field of the rows of block l, outside their window."""

    def all_have_far(self) -> bool:
        """Whether each block is known to have others in its far field; symbolic counts take no guard."""


def may_pad(missing: Any) -> bool:
    """Whether whole blocks may hold more than the sequence: always so for a symbolic length, which takes no guard."""
    return not isinstance(missing, int) or missing > 0


def padded(x: Tensor, padding: tuple[Any, ...]) -> Tensor:
    """`x` with zeros (False) around it, contiguous: padding by a symbolic number that is 0 would keep x's strides."""
    if x.dtype == torch.bool:  # as numbers: Inductor's C++ for padded comparisons does not compile (torch 2.13)
        return padded(x.to(torch.float32), padding) > 0
    return F.pad(x if all(isinstance(n, int) for n in padding) else x.contiguous(), padding)


@dataclass(frozen=True)
class Pieces:
    """`num_blocks` pieces of `size` of a sequence, padded to whole pieces after ("post") or before it ("pre").

    window: pieces on each side of a row's own that it attends to exactly.
    """

    seq_len: Any
    num_blocks: Any
    size: Any
    pad: str = "post"
    window: int = 0

    @property
    def missing(self) -> Any:
        """Places without a token."""
        return self.num_blocks * self.size - self.seq_len

    def may_pad(self) -> bool:
        return may_pad(self.missing)

    def split(self, x: Tensor) -> Tensor:
        if self.may_pad():
            x = padded(x, (0, 0, 0, self.missing) if self.pad == "post" else (0, 0, self.missing, 0))
        return x.reshape(x.shape[0], x.shape[1], self.num_blocks, self.size, x.shape[3])

    def joined(self, x: Tensor) -> Tensor:
        if isinstance(self.missing, int):
            start = 0 if self.pad == "post" else self.missing
            return x[:, start : start + self.seq_len].contiguous()  # no hole after each sequence
        crop = (0, -self.missing) if self.pad == "post" else (-self.missing, 0)
        # a slice would be guarded on, for its layout
        cropped: Tensor = F.pad(x, (0, 0, 0, 0, *crop)).clone(memory_format=torch.contiguous_format)
        return cropped

    def is_token(self, device: torch.device) -> Tensor:
        start = 0 if self.pad == "post" else self.missing
        index = torch.arange(self.num_blocks * self.size, device=device).view(self.num_blocks, self.size)
        inside: Tensor = (index >= start) & (index < start + self.seq_len)
        return inside

    @property
    def _beside(self) -> int:
        """The window, but no more pieces than there are beside one."""
        return min(self.window, self.num_blocks - 1) if isinstance(self.num_blocks, int) else self.window

    @property
    def own_place(self) -> int:
        return self._beside

    def with_neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks with contiguous rows; what stands beside a head's first and last block has to be masked."""
        return _joined_pieces(x, self._beside) if x.requires_grad else _overlapping_pieces(x, self._beside)

    def of_neighbours(self, of_keys: Tensor) -> Tensor:
        beside = self._beside
        found = F.pad(of_keys.transpose(2, 3), (0, 0, beside, beside))  # (E, 1, 1, b, i)
        near = found.unfold(3, 2 * beside + 1, 1)  # (E, 1, 1, l, i, neighbour)
        return near.transpose(-1, -2).flatten(-2).transpose(2, 3)

    def is_far(self, device: torch.device) -> Tensor:
        block = torch.arange(self.num_blocks, device=device)
        far: Tensor = (block[:, None] - block[None, :]).abs() > self.window
        return far

    def all_have_far(self) -> bool:
        return _reaches_beyond(self.num_blocks, self.window)


def _overlapping_pieces(x: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Two views of one padded copy, in which neighbours overlap; beside a head's ends they show other heads.

    as_strided is safe under Inductor here: it materializes the padded copy and fixes its layout as contiguous, which is
    the layout that these strides assume.
    """
    batch, heads, num_blocks, size, dim = x.shape
    beside = window * size
    rows = F.pad(x.reshape(-1, dim), (0, 0, beside, beside))
    blocks = rows.as_strided(x.shape, _contiguous_strides(x.shape), beside * dim)
    near = rows.as_strided((batch * heads * num_blocks, 2 * beside + size, dim), (size * dim, dim, 1))
    return blocks, near


def _joined_pieces(x: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """The same by copies of the neighbours, zeros beside a head's ends.

    Used where a gradient is wanted: the backward pass of overlapping views is an index_add, which is not deterministic
    on CUDA and whose indices, for symbolic sizes, are those of the captured call.
    """
    num_blocks = x.shape[2]
    beside = F.pad(x, (0, 0, 0, 0, window, window))
    near = torch.cat([beside.narrow(2, shift, num_blocks) for shift in range(2 * window + 1)], 3)
    return x.contiguous(), near.flatten(0, 2)


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, size * strides[0])
    return strides


def count_tiles(grid: Sequence[Any], tile: Sequence[int]) -> tuple[Any, ...]:
    """Tiles along each axis of a grid, the last of which may reach beyond its edge."""
    return tuple((size + extent - 1) // extent for size, extent in zip(grid, tile, strict=True))


def steps_to_neighbours(window: Window, window_shape: str, num_axes: int) -> Steps:
    """Steps from a tile to those of its window, the tile itself (no step) among them, in the order of the keys.

    "box": every tile at most `window` away along each axis. "plus": those of them that lie along one axis alone.
    """
    steps = itertools.product(*(range(-reach, reach + 1) for reach in along_axes(window, num_axes)))
    return tuple(step for step in steps if window_shape == "box" or sum(map(bool, step)) <= 1)


@dataclass(frozen=True)
class Tiles:
    """Tiles of a grid whose tokens are flattened row by row; tiles at the far edges may reach beyond the grid.

    grid: tokens along each axis. tile: those of a block. window, window_shape: see `steps_to_neighbours`.
    """

    grid: tuple[Any, ...]
    tile: tuple[int, ...]
    window: Window = 0
    window_shape: str = "box"

    @property
    def reaches(self) -> tuple[int, ...]:
        """The window's tiles on each side along each axis."""
        return along_axes(self.window, len(self.grid))

    @property
    def counts(self) -> tuple[Any, ...]:
        """Tiles along each axis."""
        return count_tiles(self.grid, self.tile)

    @property
    def num_blocks(self) -> Any:
        return math.prod(self.counts)

    @property
    def size(self) -> int:
        return math.prod(self.tile)

    @property
    def _missing(self) -> tuple[Any, ...]:
        sides = zip(self.counts, self.tile, self.grid, strict=True)
        return tuple(count * extent - size for count, extent, size in sides)

    def may_pad(self) -> bool:
        return any(map(may_pad, self._missing))

    @property
    def _gathers(self) -> bool:
        """Whether tokens are moved by their numbers: Inductor simplifies indices of symbolic views for minutes."""
        return not all(isinstance(size, int) for size in self.grid)

    def _tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(b * i) each: the token at a place of a tile, clipped to the grid, and whether it is on the grid."""
        place = torch.arange(self.num_blocks * self.size, device=device)
        tile, inside = place // self.size, place % self.size
        token, is_token = torch.zeros_like(place), torch.ones_like(place, dtype=torch.bool)
        step = 1
        for count, extent, size in reversed(list(zip(self.counts, self.tile, self.grid, strict=True))):
            along = tile % count * extent + inside % extent
            tile, inside = tile // count, inside // extent
            token, step = token + along.clamp(max=size - 1) * step, step * size
            is_token = is_token & (along < size)
        return token, is_token

    def _places(self, device: torch.device) -> Tensor:
        """(N): the place of each token among those of all tiles."""
        rest = torch.arange(math.prod(self.grid), device=device)
        tile, inside = torch.zeros_like(rest), torch.zeros_like(rest)
        tiles, places = 1, 1
        for count, extent, size in reversed(list(zip(self.counts, self.tile, self.grid, strict=True))):
            along, rest = rest % size, rest // size
            tile, inside = tile + along // extent * tiles, inside + along % extent * places
            tiles, places = tiles * count, places * extent
        return tile * self.size + inside

    def split(self, x: Tensor) -> Tensor:
        axes = len(self.grid)
        if self._gathers and not x.requires_grad:
            token, is_token = self._tokens(x.device)
            moved = torch.where(is_token[:, None], x.index_select(2, token), x.new_zeros(()))
            return torch.unflatten(moved, 2, (self.num_blocks, self.size))
        x = torch.unflatten(x, 2, self.grid)  # (E, H, *grid, D)
        if self.may_pad():
            x = padded(x, (0, 0, *(n for missing in reversed(self._missing) for n in (0, missing))))
        sides = [n for pair in zip(self.counts, self.tile, strict=True) for n in pair]
        x = x.reshape(*x.shape[:2], *sides, x.shape[-1])
        order = (0, 1, *range(2, 2 + 2 * axes, 2), *range(3, 2 + 2 * axes, 2), 2 + 2 * axes)
        return x.permute(order).reshape(*x.shape[:2], self.num_blocks, self.size, x.shape[-1])

    def joined(self, x: Tensor) -> Tensor:
        axes = len(self.grid)
        if self._gathers and not x.requires_grad:
            return x.index_select(1, self._places(x.device))
        x = x.reshape(x.shape[0], *self.counts, *self.tile, *x.shape[2:])
        order = (0, *(place for axis in range(axes) for place in (1 + axis, 1 + axes + axis)))
        x = x.permute(*order, 1 + 2 * axes, 2 + 2 * axes)
        whole = [count * extent for count, extent in zip(self.counts, self.tile, strict=True)]
        x = x.reshape(x.shape[0], *whole, *x.shape[-2:])
        if self.may_pad():
            x = F.pad(x, (0, 0, 0, 0, *(n for missing in reversed(self._missing) for n in (0, -missing))))
        tokens: Tensor = x.flatten(1, axes).clone(memory_format=torch.contiguous_format)
        return tokens

    def is_token(self, device: torch.device) -> Tensor:
        if self._gathers:
            return self._tokens(device)[1].view(self.num_blocks, self.size)
        axes, inside = len(self.grid), []
        for axis, (count, extent, size) in enumerate(zip(self.counts, self.tile, self.grid, strict=True)):
            shape: list[Any] = [1] * (2 * axes)
            shape[axis], shape[axes + axis] = count, extent
            inside.append((torch.arange(count * extent, device=device) < size).view(shape))
        every: Tensor = functools.reduce(torch.logical_and, inside)
        return every.expand(*self.counts, *self.tile).reshape(self.num_blocks, self.size)

    @property
    def steps(self) -> Steps:
        """Steps from a tile to those of its window, without steps that lead out of the grid from every tile."""
        steps = steps_to_neighbours(self.window, self.window_shape, len(self.grid))
        return tuple(step for step in steps if all(map(_may_lead_inside, step, self.counts)))

    @property
    def own_place(self) -> int:
        return self.steps.index((0,) * len(self.grid))

    def with_neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self._near(x).flatten(0, 2)

    def of_neighbours(self, of_keys: Tensor) -> Tensor:
        return self._near(of_keys.transpose(3, 4)).transpose(3, 4)

    def _near(self, x: Tensor) -> Tensor:
        """From (E, H, b, i, D) to (E, H, b, keys, D): the keys of each tile's window, zeros beyond the edges."""
        axes, reaches = len(self.grid), self.reaches
        if not any(reaches):
            return x
        beside = [reach for reach in reversed(reaches) for _ in range(2)]
        x = F.pad(torch.unflatten(x, 2, self.counts), (0, 0, 0, 0, *beside))
        near = []
        for step in self.steps:
            tiles = x
            for axis, (move, reach, count) in enumerate(zip(step, reaches, self.counts, strict=True)):
                tiles = tiles.narrow(2 + axis, reach + move, count)
            near.append(tiles)
        return torch.cat(near, 2 + axes).flatten(2, 1 + axes)

    def is_far(self, device: torch.device) -> Tensor:
        apart, rest = [], torch.arange(self.num_blocks, device=device)
        for count in reversed(self.counts):
            place, rest = rest % count, rest // count
            apart.append((place[:, None] - place[None, :]).abs())
        sides = zip(apart, reversed(self.reaches), strict=True)
        near = functools.reduce(torch.logical_and, [x <= reach for x, reach in sides])
        if self.window_shape == "plus":
            near = near & (functools.reduce(torch.add, [(x > 0).to(torch.int32) for x in apart]) <= 1)
        far: Tensor = ~near
        return far

    def all_have_far(self) -> bool:
        return any(map(_reaches_beyond, self.counts, self.reaches))


def _reaches_beyond(count: Any, reach: int) -> bool:
    """Whether each of `count` blocks in a row has one that is further away than `reach`."""
    return isinstance(count, int) and count >= 2 * reach + 2


def _may_lead_inside(step: int, count: Any) -> bool:
    """Whether some of `count` tiles may have another so many steps away; symbolic counts take no guard."""
    return not isinstance(count, int) or abs(step) < count


def blocking_of(
    seq_len: Any,
    block_size: int,
    pad: str,
    window: int | Sequence[int] | None,
    *,
    tile: Sequence[int] | None = None,
    window_shape: str = "box",
    grid: Sequence[Any] | None = None,
) -> Blocking:
    """The blocks of the `seq_len` keys that follow the prefix; options as in `Form`."""
    beside = plain_window(window) or 0
    if tile is None or grid is None:
        assert isinstance(beside, int), "pieces lie along one axis"
        return Pieces(seq_len, -(-seq_len // block_size), block_size, pad, beside)
    return Tiles(tuple(grid), tuple(tile), beside, window_shape)
