"""Operands by views: their dims squeezed, transposed, repeated and merged into those of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, Node

from monarch_compile.passes.convolution.region import Operand
from monarch_compile.passes.convolution.sizes import Sizes
from monarch_compile.passes.graph import aten, shape_of
from monarch_compile.passes.replacing import current


def placed(
    graph: Graph, operand: Operand, places: Sequence[int], wanted: Sequence[Any], merged: Sequence[Any], sizes: Sizes
) -> Node:
    """An operand with its dims at `places` of the product, of sizes `wanted`, reshaped to `merged`.

    All its other dims have size 1.
    """
    node, rank = current(operand.node), len(shape_of(operand.node))
    dims = [operand.dims[place] for place in places]
    kept = [dim for dim in dims if dim is not None]
    for dim in sorted(set(range(rank)) - {*kept}, reverse=True):
        node = graph.call_function(aten.squeeze.dim, (node, dim))
    order = [sorted(kept).index(dim) for dim in kept]
    if order != list(range(len(order))):
        node = graph.call_function(aten.permute.default, (node, order))
    for place, own_dim in enumerate(dims):
        if own_dim is None:
            node = graph.call_function(aten.unsqueeze.default, (node, place))
    own = [operand.size(place) for place in places]
    if str(own) != str([*wanted]):
        node = graph.call_function(aten.expand.default, (node, sizes.all_of(wanted)))
    if str([*wanted]) != str([*merged]):
        node = graph.call_function(aten.reshape.default, (node, sizes.all_of(merged)))
    return node
