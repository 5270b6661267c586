"""A legal region becomes an IR value, and the IR a node of the operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.op import CONVOLUTION_OP
from monarch_compile.passes.capture.enclosed import enclosing
from monarch_compile.passes.convolution.filters import FilterBuilder, filter_dtype_of, filter_len_of
from monarch_compile.passes.convolution.placing import placed
from monarch_compile.passes.convolution.region import ConvolutionRegion, Operand, Part
from monarch_compile.passes.convolution.scales import scales_of
from monarch_compile.passes.convolution.sizes import Sizes
from monarch_compile.passes.graph import ORIGIN, aten, dim_of, dtype_of, value_of, values_from
from monarch_compile.passes.memory import strides_are_seen
from monarch_compile.passes.replacing import nodes_between, replace_by, with_strides_of


def to_ir(region: ConvolutionRegion) -> LongConvolution:
    """The IR of a legal region; of its first part where it has two. Raises IRError where a rule of the IR is broken."""
    part = region.parts[0]
    u_dtype, out_dtype = dtype_of(region.u.node), dtype_of(region.output)
    assert u_dtype is not None
    assert out_dtype is not None
    return LongConvolution(
        batch=dim_of(region.frame.batch_size),
        channels=dim_of(region.frame.num_channels),
        seq_len=dim_of(seq_len_of(region)),
        filter_len=dim_of(filter_len_of(region, part)),
        transform_len=dim_of(region.points),
        out_len=dim_of(region.ending.length),
        lag=dim_of(lag_of(region, part)),
        dtype=u_dtype,
        filter_dtype=filter_dtype_of(region, part),
        out_dtype=out_dtype if len(region.parts) == 1 else region.dtype,
        scale=scales_of(region, part).result.number,
        skip=region.ending.skip is not None,
        pre_gate=region.pre_gate is not None,
        post_gate=region.ending.post_gate is not None,
    )


def seq_len_of(region: ConvolutionRegion) -> Any:
    """The length of the input as the operator has it: what goes beyond the transform is cut off before."""
    length, points = region.seq_len, region.points
    return min(length, points) if isinstance(length, int) and isinstance(points, int) else length


def lag_of(region: ConvolutionRegion, part: Part) -> Any:
    """The first point that a part's convolution puts out; what is read backwards begins with the last one."""
    lag, points = region.ending.lag, region.points
    if part.reversed:
        lag = 1 - lag - region.ending.length
        lag = lag if isinstance(lag, int) and isinstance(points, int) else lag + points
    return lag % points if isinstance(lag, int) and isinstance(points, int) else lag


def lower(region: ConvolutionRegion, ir: LongConvolution) -> Node:
    """Replace the region's output by the operator; returns the operator's node, the first where there are two."""
    output = region.output
    graph = output.graph
    with graph.inserting_before(output):
        sizes = Sizes(output, region.inside)
        tensors = _Tensors(graph, region, sizes)
        ops = [_op(graph, region, part, ir, tensors, sizes) for part in region.parts]
        joined = _joined(graph, region, ops)
        result = _in_place(graph, region, joined, sizes)
        if dtype_of(output) is not ir.out_dtype:
            result = graph.call_function(aten.to.dtype, (result, dtype_of(output)))
        lowered = _lowered_value(region, joined, result)
        in_body = enclosing(graph) is not None
        if _order(lowered) != _order(value_of(output)) and strides_are_seen(output, lowered, in_body=in_body):
            result = with_strides_of(graph, result, output)
    origin = {key: output.meta[key] for key in ORIGIN if key in output.meta}
    replace_by(output, result, ops[0])
    for op in ops[1:]:
        op.meta = origin
    return ops[0]


class _Tensors:
    """The operator's tensors but for the filter, made once."""

    def __init__(self, graph: Graph, region: ConvolutionRegion, sizes: Sizes) -> None:
        frame, ending = region.frame, region.ending
        lead = [frame.sizes[place] for place in (*frame.batch, *frame.channels)]
        whole = (frame.batch_size, frame.num_channels)

        def sequence(operand: Operand, kept: Any) -> Node:
            """(batch, channels, kept)."""
            length = operand.size(frame.axis)
            node = placed(graph, operand, frame.order, (*lead, length), (*whole, length), sizes)
            return node if str(kept) == str(length) else _cut(graph, node, sizes(kept))

        seq_len = seq_len_of(region)
        self.u = sequence(region.u, seq_len)
        self.pre_gate = None if region.pre_gate is None else sequence(region.pre_gate, seq_len)
        self.post_gate = None if ending.post_gate is None else sequence(ending.post_gate, ending.length)
        self.skip: Node | None = None
        if ending.skip is not None:
            channels = [frame.sizes[place] for place in frame.channels]
            self.skip = placed(graph, ending.skip, frame.channels, channels, (frame.num_channels,), sizes)


def _cut(graph: Graph, node: Node, length: Any) -> Node:
    cut: Node = graph.call_function(aten.slice.Tensor, (node, 2, 0, length))
    return cut


def _op(
    graph: Graph, region: ConvolutionRegion, part: Part, ir: LongConvolution, tensors: _Tensors, sizes: Sizes
) -> Node:
    """The operator for one part; what is read backwards is turned by its reader."""
    scale = scales_of(region, part).result
    h = FilterBuilder(graph, region, sizes).filter_of(part, scale.power)
    length = region.ending.length
    options = (*sizes.all_of((region.points, length, lag_of(region, part))), scale.number, ir.out_dtype)
    given = (tensors.u, h, tensors.skip, tensors.pre_gate, tensors.post_gate, *options)
    op: Node = graph.call_function(CONVOLUTION_OP, given)
    return op


def _joined(graph: Graph, region: ConvolutionRegion, ops: Sequence[Node]) -> Node:
    """(batch, channels, out_len): the parts turned and added."""
    turned = [
        graph.call_function(aten.flip.default, (op, [-1])) if part.reversed else op
        for op, part in zip(ops, region.parts, strict=True)
    ]
    result = turned[0]
    for other in turned[1:]:
        result = graph.call_function(aten.add.Tensor, (result, other))
    return result


def _in_place(graph: Graph, region: ConvolutionRegion, result: Node, sizes: Sizes) -> Node:
    """(batch, channels, out_len) in the dims of the region's output."""
    frame, ending = region.frame, region.ending
    if len(frame.batch) != 1 or len(frame.channels) != 1:
        lead = (frame.sizes[place] for place in (*frame.batch, *frame.channels))
        result = graph.call_function(aten.reshape.default, (result, sizes.all_of((*lead, ending.length))))
    order = [frame.order.index(place) for place in ending.dims]
    if order != list(range(len(order))):
        result = graph.call_function(aten.permute.default, (result, order))
    return result


def _lowered_value(region: ConvolutionRegion, joined: Node, result: Node) -> torch.Tensor:
    """A fake tensor with the strides that `result` has, made from those of the operator's results, which are joined."""
    like, frame = region.output.meta["val"], region.frame
    own = like.new_empty((frame.batch_size, frame.num_channels, region.ending.length))
    found: torch.Tensor = values_from({joined: own}, nodes_between(joined, result)[1:])[result]
    return found


def _order(value: torch.Tensor) -> list[int]:
    """The dims that are not of size 1, from the largest stride to the smallest."""
    steps: Iterable[Any] = (n if isinstance(n, int) else n.node.hint or 0 for n in value.stride())
    strides = [int(step) for step in steps]
    dims = [dim for dim, size in enumerate(value.shape) if not (isinstance(size, int) and size == 1)]
    return sorted(dims, key=lambda dim: -strides[dim])
