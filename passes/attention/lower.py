"""A legal region becomes an IR value, and the IR a node of the Monarch attention op."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Graph, Node

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention, differentiated_by_kernels
from monarch_compile.attention.op import ATTENTION_OP, ATTENTION_WITH_LSE_OP
from monarch_compile.passes.attention.masks import MaskFact
from monarch_compile.passes.attention.region import AttentionRegion, Factor, MaskTerm, Operand
from monarch_compile.passes.capture.enclosed import enclosing
from monarch_compile.passes.graph import FLOATS, aten, dim_of, dtype_of, shape_of, values_from
from monarch_compile.passes.memory import strides_are_seen
from monarch_compile.passes.replacing import current, nodes_between, replace_by, sizes_in, with_strides_of


def to_ir(region: AttentionRegion, facts: Iterable[MaskFact], form: Form) -> MonarchAttention:
    """The IR of a legal region. Raises IRError when the options break one of its rules."""
    facts = tuple(facts)
    kinds = {"key_padding" if fact.hides_keys else fact.kind for fact in facts}
    return MonarchAttention(
        batch=dim_of(region.q_shape[0]),
        num_heads=dim_of(region.q_shape[1]),
        num_kv_heads=dim_of(region.k_shape[1]),
        seq_len_q=dim_of(region.q_shape[2]),
        seq_len_k=dim_of(region.k_shape[2]),
        head_dim=int(region.q_shape[3]),
        value_dim=int(region.v_shape[3]),
        dtype=region.dtype,
        form=form,
        grid=None if region.grid is None else tuple(dim_of(size) for size in region.grid.sizes),
        scale=region.scale,
        is_causal=region.is_causal,
        mask=next((kind for kind in (MaskKind.KEY_BIAS, MaskKind.KEY_PADDING) if kind.value in kinds), MaskKind.NONE),
    )


def lower(region: AttentionRegion, facts: Iterable[MaskFact], ir: MonarchAttention, *, trains: bool = False) -> Node:
    """Replace the region's output by the Monarch attention op; returns the op's node.

    trains: a backward pass follows. Where that has kernels, the op is the one that keeps what they need.
    """
    graph, output = region.output.graph, region.output
    with graph.inserting_before(output):
        frame = region.kv_lead(region.lead)
        q = _operand(graph, region.q, region.qk_lead, region.lead)
        k = _operand(graph, region.k, region.kv_lead(region.qk_lead), frame)
        v = _operand(graph, region.v, region.kv_lead(region.pv_lead), frame)
        operands = zip((q, k, v), (region.q, region.k, region.v), strict=True)
        q, k, v = (_as_dtype(graph, x, operand, ir.dtype) for x, operand in operands)
        q = _scaled(graph, q, region.factors)
        shapes = (region.q_shape, region.k_shape, region.v_shape)
        q, k, v = (_split_packed(graph, x, region, shape) for x, shape in zip((q, k, v), shapes, strict=True))
        pairs = zip(region.masks, facts, strict=True)
        masks = [(m, fact) for m, fact in pairs if fact.kind in ("key_padding", "key_bias") or fact.hides_keys]
        key_mask = _key_mask(graph, masks, region, ir.mask is MaskKind.KEY_BIAS)
        keeps_lse = trains and differentiated_by_kernels(ir.form, is_cross=ir.is_cross, is_causal=ir.is_causal)
        target = ATTENTION_WITH_LSE_OP if keeps_lse else ATTENTION_OP
        op: Node = graph.call_function(target, (q, k, v, key_mask, *_options(graph, ir, region)))
        result = graph.call_function(operator.getitem, (op, 0)) if keeps_lse else op
        result = _join_packed(graph, result, region, ir.value_dim)
        if len(region.pv_lead) != 2 or str(region.pv_lead) != str(region.lead):
            sizes = [*sizes_in(graph, region.pv_lead), *sizes_in(graph, (region.rows,)), ir.value_dim]
            result = graph.call_function(aten.reshape.default, (result, sizes))
        if region.out_dims != tuple(range(len(region.out_dims))):
            result = graph.call_function(aten.permute.default, (result, list(region.out_dims)))
        if dtype_of(output) != ir.dtype:
            result = graph.call_function(aten.to.dtype, (result, dtype_of(output)))
        lowered = _lowered_value(op, result, region)
        if strides_are_seen(output, lowered, in_body=enclosing(graph) is not None):
            result = with_strides_of(graph, result, output)
    replace_by(output, result, op)
    return op


def _options(graph: Graph, ir: MonarchAttention, region: AttentionRegion) -> tuple[Any, ...]:
    """The operator's arguments after the tensors, in its order."""
    tiled = ir.form.tile is not None and region.grid is not None
    grid = sizes_in(graph, region.grid.sizes) if tiled and region.grid is not None else None
    return (ir.scale, *ir.form.arguments(), grid, ir.is_causal)


def as_op_gives(like: torch.Tensor, shape: Iterable[Any]) -> torch.Tensor:
    """A fake tensor of `shape` (batch, heads, seq_len, dim) with the strides of the attention op's result: the memory
    order is (batch, seq_len, heads, dim)."""
    batch, heads, seq_len, dim = shape
    return like.new_empty((batch, seq_len, heads, dim)).transpose(1, 2)


def _lowered_value(op: Node, result: Node, region: AttentionRegion) -> torch.Tensor:
    """A fake tensor with the strides that `result` has, computed from those of the op."""
    own = as_op_gives(region.output.meta["val"], (*region.q_shape[:3], region.v_shape[3]))
    known = {op: own if op.target is ATTENTION_OP else (own,)}
    value: torch.Tensor = values_from(known, nodes_between(op, result)[1:])[result]
    return value


def _operand(graph: Graph, operand: Operand, lead: tuple[Any, ...], frame: tuple[Any, ...]) -> Node:
    """The operand as (batch, heads, seq_len, dim), by views wherever its layout allows."""
    node, own = current(operand.node), shape_of(operand.node)
    order = [dim for dim in operand.dims if dim is not None]
    result = node if order == list(range(len(own))) else graph.call_function(aten.permute.default, (node, order))
    for place, dim in enumerate(operand.dims):
        if dim is None:
            result = graph.call_function(aten.unsqueeze.default, (result, place))
    leads = [1 if dim is None else own[dim] for dim in operand.dims[:-2]]
    tail = [own[dim] for dim in operand.dims[-2:] if dim is not None]
    if str(leads) != str(list(lead)):
        result = graph.call_function(aten.expand.default, (result, [*sizes_in(graph, lead), -1, -1]))
    if str(list(lead)) != str(list(frame)):
        sizes = [*sizes_in(graph, frame), *sizes_in(graph, tail)]
        result = graph.call_function(aten.reshape.default, (result, sizes))
    return result


def _as_dtype(graph: Graph, x: Node, operand: Operand, dtype: torch.dtype) -> Node:
    """The operand as autocast has it, which made the products give `dtype`."""
    if dtype_of(operand.node) == dtype:
        return x
    cast: Node = graph.call_function(aten.to.dtype, (x, dtype))
    return cast


def _split_packed(graph: Graph, x: Node, region: AttentionRegion, shape: tuple[Any, ...]) -> Node:
    """(batch, heads, seq_len, dim) in the region's shape: packed sequences in the batch, a view where rows lie as
    (batch, seq_len) in memory, or the batch is 1."""
    if region.length is None:
        return x
    batch, heads, length, dim = shape
    split = graph.call_function(aten.reshape.default, (x, [region.lead[0], heads, -1, length, dim]))
    turned = graph.call_function(aten.transpose.int, (split, 1, 2))
    parts: Node = graph.call_function(aten.reshape.default, (turned, [batch, heads, length, dim]))
    return parts


def _join_packed(graph: Graph, attended: Node, region: AttentionRegion, dim: int) -> Node:
    """The op's result, (batch, heads, seq_len, dim) of the region as it was written."""
    if region.length is None:
        return attended
    sizes = [region.lead[0], -1, *region.q_shape[1:3], dim]
    split = graph.call_function(aten.reshape.default, (attended, sizes))
    turned = graph.call_function(aten.transpose.int, (split, 1, 2))
    joined: Node = graph.call_function(aten.reshape.default, (turned, [*region.lead, region.rows, dim]))
    return joined


def _scaled(graph: Graph, q: Node, factors: Iterable[Factor]) -> Node:
    """The queries times the scales that are known at run time only."""
    for factor in factors:
        target = aten.div.Tensor if factor.divides else aten.mul.Tensor
        q = graph.call_function(target, (q, current(factor.node)))
    return q


def _key_mask(
    graph: Graph, masks: list[tuple[MaskTerm, MaskFact]], region: AttentionRegion, biased: bool
) -> Node | None:
    """(batch, seq_len_k): the one bias's first row; or each mask's, joined, bool and True where a key is visible."""
    joined: Node | None = None
    for mask, fact in masks:
        row = _row(graph, mask, region, biased, query=-1 if fact.is_triangle else 0)
        joined = row if joined is None else graph.call_function(aten.bitwise_and.Tensor, (joined, row))
    return joined


def _as_bias(graph: Graph, row: Node, mask: MaskTerm) -> Node:
    """What is added to the scores, in a floating dtype: a bool key mask would mean another thing."""
    if dtype_of(mask.node) not in FLOATS:
        row = graph.call_function(aten.to.dtype, (row, torch.float64))  # keeps large integers distinct
    return row if mask.gain == 1 else graph.call_function(aten.mul.Scalar, (row, mask.gain))


def _row(graph: Graph, mask: MaskTerm, region: AttentionRegion, biased: bool, query: int) -> Node:
    """The mask read at one query and head 0, which the mask pass has proved to stand for all: under a triangle the
    last query, which sees every key."""
    row, rank = current(mask.node), len(shape_of(mask.node))
    queries = rank - (1 if mask.swapped else 2)
    if rank and queries >= 0:
        row = graph.call_function(aten.select.int, (row, queries, query))
    if rank >= 3 and mask.score_rank >= 4:
        row = graph.call_function(aten.select.int, (row, rank - 3, 0))
    if mask.role == "drop":
        row = graph.call_function(aten.logical_not.default, (row,))
    elif biased:
        row = _as_bias(graph, row, mask)
    elif mask.role == "add":
        row = graph.call_function(aten.eq.Scalar, (row, 0))
    elif dtype_of(mask.node) != torch.bool:
        row = graph.call_function(aten.ne.Scalar, (row, 0))
    sizes = sizes_in(graph, (region.lead[0], region.k_shape[2]))
    if mask.score_rank > 4:
        row = graph.call_function(aten.expand.default, (row, [*mask.lead[:-1], sizes[-1]]))
        return graph.call_function(aten.reshape.default, (row, sizes))
    return graph.call_function(aten.expand.default, (row, sizes))
