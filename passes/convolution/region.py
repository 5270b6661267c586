"""What matching finds of a long convolution: the region of the graph that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.passes.convolution.spectra import Dims
from monarch_compile.passes.graph import shape_of
from monarch_compile.passes.state import RefusedSite


@dataclass(frozen=True)
class Operand:
    """A real tensor as it lies in the product: dim i of that is the node's dim dims[i], or broadcast (None)."""

    node: Node
    dims: Dims

    def size(self, place: int) -> Any:
        """Its size in a dim of the product."""
        dim = self.dims[place]
        return 1 if dim is None else shape_of(self.node)[dim]

    def varies(self, place: int) -> bool:
        """Whether it differs along a dim of the product, as far as sizes tell."""
        size = self.size(place)
        return not (isinstance(size, int) and size == 1)


@dataclass(frozen=True)
class FilterTerm:
    """A filter times number * sqrt(points) ** power, reversed in time (modulo points) where `reversed`."""

    operand: Operand
    number: float
    power: int
    reversed: bool


@dataclass(frozen=True)
class Part:
    """One convolution with the sum of some filters; `reversed`: what is read of it runs backwards in time."""

    reversed: bool
    terms: tuple[FilterTerm, ...]


@dataclass(frozen=True)
class Frame:
    """How the product's dims become (batch, channels, length).

    sizes: of the product; that of dim `axis` is of no account. batch, channels: dims of the product, in order.
    """

    sizes: tuple[Any, ...]
    axis: int
    batch: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The product's dims in the operator's order."""
        return (*self.batch, *self.channels, self.axis)

    @property
    def batch_size(self) -> Any:
        """Of the operator."""
        return math.prod(self.sizes[i] for i in self.batch)

    @property
    def num_channels(self) -> Any:
        """Of the operator."""
        return math.prod(self.sizes[i] for i in self.channels)


@dataclass(frozen=True)
class Ending:
    """What is computed of the inverse transform, up to the region's output.

    dims: of the product, that those of the output are. lag, length: the points that are read, of those of the
    transform. number, power: scale, as in a term. skip, post_gate: in the dims of the product.
    """

    output: Node
    dims: tuple[int, ...]
    lag: Any
    length: Any
    number: float
    power: int
    inside: tuple[Node, ...] = ()
    skip: Operand | None = None
    post_gate: Operand | None = None


@dataclass(frozen=True)
class ConvolutionRegion:
    """A long convolution, as found in the graph.

    anchor: the inverse transform. u, pre_gate: in the dims of the product, padding and casts taken off. points: of the
    transform. inside: nodes that the rewrite replaces or looks through; spectra: those of them that are made of the
    transform of u, which nothing else may read. dtype: what the graph computes in, float32 at least.
    """

    anchor: Node
    u: Operand
    pre_gate: Operand | None
    parts: tuple[Part, ...]
    points: Any
    frame: Frame
    ending: Ending
    inside: tuple[Node, ...]
    spectra: tuple[Node, ...]
    dtype: torch.dtype

    @property
    def output(self) -> Node:
        """The node to replace."""
        return self.ending.output

    @property
    def replaced(self) -> tuple[Node, ...]:
        """What follows the inverse transform, and it."""
        return (*self.ending.inside, self.ending.output)

    @property
    def seq_len(self) -> Any:
        """Of the input."""
        return self.u.size(self.frame.axis)

    @property
    def filters(self) -> tuple[Operand, ...]:
        """Every filter."""
        return tuple(term.operand for part in self.parts for term in part.terms)

    @property
    def read(self) -> tuple[Node, ...]:
        """The tensors that the lowered form reads."""
        ending = self.ending
        operands = (self.u, self.pre_gate, ending.skip, ending.post_gate, *self.filters)
        return tuple(x.node for x in operands if x is not None)


Site = ConvolutionRegion | RefusedSite
