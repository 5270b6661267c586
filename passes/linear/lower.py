"""A legal region becomes an IR value, and the IR a node of the operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from monarch_compile.linear.ir import BLAST, MONARCH, BlockLinear
from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.passes.capture.enclosed import enclosing
from monarch_compile.passes.graph import aten, dim_of, dtype_of, shape_of, values_from
from monarch_compile.passes.linear.products import Labels
from monarch_compile.passes.linear.region import BlockLinearRegion
from monarch_compile.passes.memory import strides_are_seen
from monarch_compile.passes.replacing import current, nodes_between, replace_by, sizes_in, with_strides_of


def to_ir(region: BlockLinearRegion) -> BlockLinear:
    """The IR of a legal region. Raises IRError where a rule of the IR is broken."""
    return BlockLinear(
        kind=MONARCH if region.coupling is None else BLAST,
        tokens=dim_of(math.prod(region.token_sizes)),
        in_features=region.in_blocks * region.in_width,
        out_features=region.out_blocks * region.out_width,
        in_blocks=region.in_blocks,
        out_blocks=region.out_blocks,
        rank=region.rank,
        dtype=region.dtype,
        bias=region.ending.bias is not None,
        output_order=region.output_order,
        activation=region.ending.activation,
    )


def lower(region: BlockLinearRegion, ir: BlockLinear, form: str) -> Node:
    """Replace the region's output by the operator, with what is asked for its form; returns the operator's node."""
    output, graph = region.output, region.output.graph
    with graph.inserting_before(output):
        tensors = _tensors(graph, region)
        op: Node = graph.call_function(LINEAR_OP, (*tensors, ir.output_order, ir.activation, form))
        result = _in_place(graph, region, op)
        own = output.meta["val"].new_empty((*region.token_sizes, ir.out_features))
        lowered: torch.Tensor = values_from({op: own}, nodes_between(op, result)[1:])[result]
        if strides_are_seen(output, lowered, in_body=enclosing(graph) is not None):
            result = with_strides_of(graph, result, output)
    replace_by(output, result, op)
    return op


def _tensors(graph: Graph, region: BlockLinearRegion) -> tuple[Node | None, ...]:
    """x, first, second, coupling and bias, as the operator has them."""
    first, last, rank = region.first, region.last, region.rank
    ins, outs = region.in_blocks, region.out_blocks
    p, q = region.in_width, region.out_width
    x_dims = (*first.tokens, *first.batch, *first.sums)
    x = _arranged(graph, first.other_node, first.other_labels, x_dims, (*region.token_sizes, ins * p))
    own, other = (*first.batch, *first.columns, *first.sums), (*last.batch, *last.columns, *last.sums)
    coupling: Node | None = None
    if region.coupling is not None:
        middle = region.coupling
        one = _arranged(graph, first.weight_node, first.weight_labels, own, (ins, rank, p))
        two = _arranged(graph, last.weight_node, last.weight_labels, other, (outs, q, rank))
        dims = (*middle.columns, *middle.sums, *middle.batch)
        coupling = _arranged(graph, middle.weight_node, middle.weight_labels, dims, (outs, ins, rank))
    else:
        split = (ins, rank, outs, p) if region.columns_interleaved else (ins, outs, rank, p)
        one = _arranged(graph, first.weight_node, first.weight_labels, own, split)
        one = graph.call_function(aten.transpose.int, (one, 1, 2)) if region.columns_interleaved else one
        split = (outs, q, rank, ins) if region.sums_interleaved else (outs, q, ins, rank)
        two = _arranged(graph, last.weight_node, last.weight_labels, other, split)
        two = graph.call_function(aten.transpose.int, (two, 2, 3)) if region.sums_interleaved else two
    bias = region.ending.bias
    if bias is not None:
        own_bias = current(bias)
        bias = (
            own_bias if len(shape_of(bias)) == 1 else graph.call_function(aten.reshape.default, (own_bias, [outs * q]))
        )
    given = zip((x, one, two, coupling), (first.other_node, first.weight_node, last.weight_node, None), strict=True)
    made = [_cast(graph, node, source, region.dtype) for node, source in given]
    if coupling is not None and region.coupling is not None:
        made[3] = _cast(graph, coupling, region.coupling.weight_node, region.dtype)
    return (*made, bias)


def _cast(graph: Graph, node: Node | None, source: Node | None, dtype: torch.dtype) -> Node | None:
    """A tensor in the dtype that autocast makes of it."""
    if node is None or source is None or dtype_of(source) is dtype:
        return node
    cast: Node = graph.call_function(aten.to.dtype, (node, dtype))
    return cast


def _arranged(graph: Graph, node: Node, labels: Labels, order: Sequence[int], sizes: Sequence[Any]) -> Node:
    """An operand with its dims in the order of their labels, reshaped to `sizes`; other dims, of size 1, go."""
    dims = [dim for dim, label in enumerate(labels) if label not in order] + [labels.index(label) for label in order]
    shape = shape_of(node)
    made = current(node)
    if dims != list(range(len(dims))):
        made = graph.call_function(aten.permute.default, (made, dims))
    if str([shape[dim] for dim in dims]) != str([*sizes]):
        made = graph.call_function(aten.reshape.default, (made, sizes_in(graph, sizes)))
    return made


def _in_place(graph: Graph, region: BlockLinearRegion, op: Node) -> Node:
    """(tokens, out_features) in the dims of the region's output."""
    ending, last, result = region.ending, region.last, op
    is_product = ending.order is None
    tokens: Sequence[Any] = last.sizes(last.tokens) if is_product else shape_of(ending.output)[:-1]
    if ending.tokens is not None and ending.tokens != tuple(range(len(ending.tokens))):
        result = graph.call_function(aten.permute.default, (result, [*ending.tokens, len(ending.tokens)]))
    features = last.sizes((*last.batch, *last.columns)) if is_product else [region.out_blocks * region.out_width]
    if is_product or ending.tokens is None:
        result = graph.call_function(aten.reshape.default, (result, sizes_in(graph, (*tokens, *features))))
    if is_product:
        labels = (*last.tokens, *last.batch, *last.columns)
        order = [labels.index(label) for label in last.product.out]
        if order != list(range(len(order))):
            result = graph.call_function(aten.permute.default, (result, order))
    return result
