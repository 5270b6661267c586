"""Ops that only move, cast or take a part of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from monarch_compile.passes.graph import aten, inputs, shape_of

TRANSPOSES = frozenset(
    {
        aten.transpose.int,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.permute.default,
        aten.t.default,
        aten.mT.default,
        aten.adjoint.default,
        aten.matrix_H.default,
        aten.numpy_T.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.moveaxis.int,
        aten.moveaxis.intlist,
    }
)

CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default})
VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)


PARTS = frozenset({aten.slice.Tensor, aten.select.int, aten.narrow.default})


def viewed(node: Any) -> Any:
    """What a node is a view, a part, a copy or a cast of; the node itself, if of nothing."""
    while isinstance(node, Node) and node.target in VIEWS | CASTS | TRANSPOSES | PARTS:
        node = inputs(node)[0]
    return node


def swaps_matrix(node: Node) -> bool:
    """Whether a transposing op swaps the last two dims and no others."""
    rank = len(shape_of(node))
    return rank >= 2 and source_dims(node) == [*range(rank - 2), rank - 1, rank - 2]


def source_dims(node: Node) -> list[int]:
    """For each dim of a transposing op's output, the input's dim it is."""
    rank = len(shape_of(node))
    if node.target is aten.numpy_T.default:  # warns of ranks other than 2
        return [*range(rank)][::-1]
    probe = torch.empty([*range(1, rank + 1)], device="meta")
    target: Any = node.target
    return [size - 1 for size in target(probe, *node.args[1:], **node.kwargs).shape]
