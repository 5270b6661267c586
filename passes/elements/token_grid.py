"""Is a token axis some tokens beside a grid: the rows of an image or a video, flattened one after another?

Proven by where the axis comes from. A grid begins where two or three spatial dims become one; from there the axis is
followed through the ops that keep it. What is not known to be a grid is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from monarch_compile.passes.elements.axes import Axis, Factor, Kind, grid_of
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.graph import normal_dim, shape_of


@dataclass(frozen=True, eq=False)
class GridAxis:
    """An axis of a grid, and where its size is read: `dim` of the output of `node`.

    node is None where no tensor has such a dim, as after F.unfold: the size is an int then. along: which axis of its
    image it is, outermost 0. is_inner: whether it counts places in a window, not windows or places in the whole image.
    """

    node: Node | None
    dim: int
    size: Any
    along: int
    is_inner: bool


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """`prefix` tokens, then a grid in row-major order: the token at (y, x) stands at prefix + y * width + x.

    suffix: tokens after the grid; there are tokens on one side alone. source: the node that flattened the axes.
    """

    prefix: int
    suffix: int
    axes: tuple[GridAxis, ...]
    source: Node

    @property
    def order(self) -> tuple[tuple[int, bool], ...]:
        """For each axis, its place among those of its image and whether it lies in a window."""
        alongs = sorted(axis.along for axis in self.axes)
        return tuple((alongs.index(axis.along), axis.is_inner) for axis in self.axes)


@dataclass(frozen=True, eq=False)
class NoGrid:
    """Why a token axis is not known to be a grid, in a sentence, and the node that is in the way."""

    reason: str
    node: Node | None


def token_grid(node: Node, dim: int, layouts: Layouts | None = None) -> TokenGrid | NoGrid:
    """The grid that a dim of a node's output is.

    layouts: keeps what is found, for calls with other nodes of a graph that does not change.
    """
    known = Layouts() if layouts is None else layouts
    if not shape_of(node):
        return NoGrid("this is no tensor with a token axis", node)
    axis = known.layout(node)[normal_dim(dim, len(shape_of(node)))]
    found = grid_of(axis)
    if found is None:
        return _why_not(axis, node)
    if found.prefix and found.suffix:
        return NoGrid("tokens stand before a grid and after it, where those on one side alone have a form", node)
    write = known.harmful_write(node)
    if write is not None:
        return NoGrid("memory that the token axis comes from is written in place", write)
    axes = tuple(_axis(factor, known, node) for factor in found.factors)
    source = axis.flattened_by
    if source is None or any(a.node is None and not isinstance(a.size, int) for a in axes):
        return NoGrid("the size of an axis of the grid cannot be read", source or node)
    return TokenGrid(found.prefix, found.suffix, axes, source)


def _axis(factor: Factor, layouts: Layouts, reader: Node) -> GridAxis:
    """The axis, its size read from a tensor that is there before `reader` is."""
    place, is_inner = layouts.place(factor), any(not is_outer for is_outer, _ in factor.cuts)
    node, dim = (None, 0) if place is None or reader < place[0] else place
    return GridAxis(node, dim, factor.size, factor.along, is_inner)


def _why_not(axis: Axis, node: Node) -> NoGrid:
    factors, blamed = axis.factors, axis.explained
    if not factors:
        return NoGrid("there is one token", node)
    if blamed is not None and (len(factors) == 1 or all(f.kind is not Kind.SPATIAL for f in factors)):
        return NoGrid(f"the token axis is no known grid: {blamed.why}", blamed.node)
    kinds = {f.kind for f in factors}
    if Kind.SPATIAL not in kinds:
        return NoGrid("the token axis is made of an argument's dims, which no convolution shows to be spatial", node)
    if len(factors) == 1:
        return NoGrid("the token axis is one spatial axis, not two or three", factors[0].origin[0])
    if kinds != {Kind.SPATIAL}:
        what = f": {blamed.why}" if blamed is not None else ", such as the batch"
        return NoGrid(f"spatial axes are flattened together with another dim{what}", axis.source)
    return NoGrid("parts of spatial axes are flattened in an order that is no grid", axis.source)
