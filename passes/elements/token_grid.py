"""The token grid behind an axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node


@dataclass(frozen=True, eq=False)
class GridAxis:
    """One axis of a grid: size `dim` of the output of `node`."""

    node: Node
    dim: int
    size: Any


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """`prefix` tokens, then a grid whose axes `source` flattened row by row."""

    prefix: int
    axes: tuple[GridAxis, ...]
    source: Node


@dataclass(frozen=True, eq=False)
class NoGrid:
    """Why no grid is known."""

    reason: str
    node: Node | None


def token_grid(node: Node, dim: int) -> TokenGrid | NoGrid:
    """The grid that the axis flattens."""
    return NoGrid("not looked for yet", node)
