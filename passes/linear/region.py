"""What matching finds of a block linear: the region of the graph that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.linear.ir import BLOCKED
from monarch_compile.passes.linear.products import Roles
from monarch_compile.passes.state import RefusedSite


@dataclass(frozen=True)
class Ending:
    """What follows the last product and becomes part of the operator.

    output: the node to replace. order: of its last dim, as in the IR; None: the output is the last product itself, in
    dims of its own. tokens: for each token dim of the input, in its order, the dim of the output that it is; None where
    the output's leading dims are those of the input merged or split, in the same order.
    """

    output: Node
    order: str | None
    tokens: tuple[int, ...] | None
    inside: tuple[Node, ...] = ()
    bias: Node | None = None
    activation: str = "none"


@dataclass(frozen=True)
class BlockLinearRegion:
    """A block linear, as found in the graph.

    first, last: the products with the first and with the second factor. coupling: that between, of BLAST.
    columns_interleaved: whether a column c of the first factor is j * L + l, else l * rank + j, of output block l.
    sums_interleaved: whether what the last product sums over is j * K + k, else k * rank + j, of input block k.
    rank: of each block, or BLAST's. inside: nodes that the rewrite replaces or looks through, the first product first.
    dtype: of the products.
    """

    first: Roles
    last: Roles
    coupling: Roles | None
    columns_interleaved: bool
    sums_interleaved: bool
    rank: int
    ending: Ending
    inside: tuple[Node, ...]
    dtype: torch.dtype

    @property
    def anchor(self) -> Node:
        """The last product; it names the site."""
        return self.last.product.node

    @property
    def output(self) -> Node:
        """The node to replace."""
        return self.ending.output

    @property
    def token_sizes(self) -> list[Any]:
        """Of the input's token dims."""
        return self.first.sizes(self.first.tokens)

    @property
    def in_blocks(self) -> int:
        return math.prod(self.first.sizes(self.first.batch))

    @property
    def out_blocks(self) -> int:
        last = self.last
        return math.prod(last.sizes(last.batch))

    @property
    def in_width(self) -> int:
        """Features of an input block."""
        return math.prod(self.first.sizes(self.first.sums))

    @property
    def out_width(self) -> int:
        """Features of an output block."""
        return math.prod(self.last.sizes(self.last.columns))

    @property
    def output_order(self) -> str:
        return self.ending.order or BLOCKED

    @property
    def read(self) -> tuple[Node, ...]:
        """The tensors that the lowered form reads."""
        coupling = None if self.coupling is None else self.coupling.weight_node
        found = (self.first.other_node, self.first.weight_node, self.last.weight_node, coupling, self.ending.bias)
        return tuple(node for node in found if node is not None)


Site = BlockLinearRegion | RefusedSite
