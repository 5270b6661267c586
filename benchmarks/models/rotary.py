"""Rotary position embedding along the axes of a grid (as Flux and Wan have it), on neighbouring pairs of features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASE = 10000.0


def grid_positions(prefix: int, grid: Sequence[int], device: torch.device) -> Tensor:
    """Positions (prefix + tokens, axes) along each axis of a grid, row by row; those of the prefix are 0."""
    axes = torch.meshgrid(*(torch.arange(size, device=device) for size in grid), indexing="ij")
    positions = torch.stack(axes, -1).flatten(0, -2).float()
    return torch.cat([torch.zeros(prefix, len(grid), device=device), positions])


def rotary_table(positions: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens, head_dim) for positions (tokens, axes): `dims` features turn with each axis."""
    found = []
    for axis, dim in enumerate(dims):
        frequencies = BASE ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
        found.append(positions[:, axis, None] * frequencies)
    angles = torch.cat(found, dim=-1)
    return angles.cos().repeat_interleave(2, dim=1), angles.sin().repeat_interleave(2, dim=1)


def rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys (batch, heads, tokens, head_dim), turned pair by pair in float32."""
    cosines, sines = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * cosines + turned * sines).to(x.dtype)
