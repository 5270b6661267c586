"""The input and the filters of a convolution, taken before casts, padding and a gate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.convolution.reach import Reach
from monarch_compile.passes.convolution.region import Operand
from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, normal_dim, same_shape, shape_of
from monarch_compile.passes.memory import is_written
from monarch_compile.passes.views import CASTS

HALVES = frozenset({torch.float16, torch.bfloat16})
PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})


@dataclass(frozen=True)
class Taken:
    """An operand taken further up.

    inside: nodes that are no longer read. gate: what it is multiplied by. gated: the product, and what is computed of
    that before the transform; empty without a gate.
    """

    operand: Operand
    inside: tuple[Node, ...] = ()
    gate: Operand | None = None
    gated: tuple[Node, ...] = ()


def before_cast(node: Node) -> Node | None:
    """What a cast that loses nothing casts: one to its own dtype, or from 16 bits to float32."""
    if node.target not in CASTS and node.target is not aten.alias.default:
        return None
    source: Node = inputs(node)[0]
    widens = dtype_of(source) in HALVES and dtype_of(node) is torch.float32
    return source if widens or dtype_of(source) is dtype_of(node) else None


def before_casts(node: Node) -> Node:
    """The same of all casts above a node."""
    while (source := before_cast(node)) is not None:
        node = source
    return node


def before_padding(node: Node, dim: int) -> Node | None:
    """What is padded with zeros at the end of `dim`, and nowhere else."""
    if node.target in PADS:
        return _before_pad(node, dim)
    if node.target is aten.cat.default:
        return _before_zeros(node, dim)
    return None


def _before_pad(node: Node, dim: int) -> Node | None:
    source, pads = inputs(node)[:2]
    place = 3 if node.target is aten.pad.default else 2
    is_constant = node.target is aten.constant_pad_nd.default or arg(node, 2, "mode", "constant") == "constant"
    if not is_constant or constant_of(arg(node, place, "value", 0) or 0) != 0:
        return None
    own = 2 * (len(shape_of(source)) - 1 - dim)
    others = [pad for i, pad in enumerate(pads) if i != own + 1]
    if any(isinstance(pad, Node) or pad != 0 for pad in others):
        return None
    grows = own + 1 < len(pads) and (isinstance(pads[own + 1], Node) or pads[own + 1] >= 0)
    return source if grows and _is_longer(node, source, dim) else None


def _is_longer(node: Node, source: Node, dim: int) -> bool:
    """Whether padding takes nothing away; of symbolic sizes it is asked without a guard."""

    return bool(statically_known_true(shape_of(node)[dim] >= shape_of(source)[dim]))


def _before_zeros(node: Node, dim: int) -> Node | None:
    parts = inputs(node)[0]
    along = normal_dim(arg(node, 1, "dim", 0), len(shape_of(node)))
    if along != dim or len(parts) != 2 or dtype_of(parts[0]) is not dtype_of(node):
        return None
    return parts[0] if _is_zero(parts[1]) else None


FILLS: dict[Any, int] = {
    aten.full.default: 1,
    aten.zeros.default: 0,
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
}
"""Ops that make a tensor of one number, and the place of the number; 0 where it is zero."""


def _is_zero(node: Node) -> bool:
    if node.target not in FILLS or is_written(node):
        return False
    place = FILLS[node.target]
    return not place or constant_of(inputs(node)[place]) == 0


def taken(operand: Operand, axis: int, reach: Reach) -> Taken:
    """An operand before casts and padding of the product's dim `axis`."""
    inside: list[Node] = []
    while True:
        node, dim = operand.node, operand.dims[axis]
        source = before_cast(node)
        if source is None and dim is not None:
            source = before_padding(node, dim)
        if source is None or not reach.covers(node):
            return Taken(operand, tuple(inside))
        inside.append(node)
        operand = replace(operand, node=source)


def taken_with_gate(operand: Operand, axis: int, reach: Reach) -> Taken:
    """The same of the input of a convolution, also before a gate: a tensor of its shape that it is multiplied by.

    Padding at the end of both factors is padding of their product.
    """
    first = taken(operand, axis, reach)
    product, dim = first.operand.node, first.operand.dims[axis]
    if not _is_gated(product) or dim is None or not reach.covers(product):
        return first
    one, other = (taken(replace(first.operand, node=x), axis, reach) for x in inputs(product)[:2])
    if not same_shape(one.operand.node, other.operand.node):
        one, other = (Taken(replace(first.operand, node=x)) for x in inputs(product)[:2])
    if dtype_of(one.operand.node) is not dtype_of(other.operand.node):
        return first
    gated = (product, *first.inside)
    return Taken(one.operand, (*gated, *one.inside, *other.inside), other.operand, gated)


def _is_gated(node: Node) -> bool:
    """Whether a node is the product of two tensors of its own shape and of floating dtypes."""
    if node.target is not aten.mul.Tensor:
        return False
    factors = inputs(node)[:2]
    if not all(isinstance(x, Node) and same_shape(x, node) for x in factors):
        return False
    dtypes = {dtype_of(x) for x in factors}
    return all(dtype is not None and dtype.is_floating_point for dtype in dtypes)
