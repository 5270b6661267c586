"""Operands taken where they lie: the kernels read q, k and v by strides, so copies and scales before them can go."""

from __future__ import annotations

from dataclasses import replace

from torch.fx import GraphModule, Node

from monarch_compile.passes.attention import constant_of
from monarch_compile.passes.graph import aten, dtype_of, inputs, shape_of
from monarch_compile.passes.products import SCALES, simplify
from monarch_compile.passes.region import AttentionRegion, Operand

COPIES = frozenset({aten.contiguous.default, aten.clone.default})


def hoist_scales(gm: GraphModule) -> int:
    """Move a constant scale behind the reshape that follows it, so that it stands next to the product it belongs to."""
    changed = 0
    for node in list(gm.graph.nodes):
        while (moved := _swap_with_reshape(node)) is not None:
            node = moved
            changed += 1
    return changed


def _swap_with_reshape(scale: Node) -> Node | None:
    """scale -> reshape becomes reshape -> scale; returns the new scale."""
    if scale.op != "call_function" or scale.target not in SCALES or len(scale.users) != 1:
        return None
    (view,) = scale.users
    source, factor = inputs(scale)[:2]
    plain = isinstance(source, Node) and dtype_of(source) == dtype_of(scale)
    if (
        not callable(view.target)
        or view.target not in MOVABLE
        or not plain
        or str(shape_of(source)) != str(shape_of(scale))
    ):
        return None
    if constant_of(factor) is None:
        return None
    graph = scale.graph
    with graph.inserting_before(view):
        new_view = graph.call_function(view.target, (source, *inputs(view)[1:]), dict(view.kwargs))
        new_scale: Node = graph.create_node("call_function", scale.target, (new_view, factor))
    new_view.meta, new_scale.meta = dict(view.meta), dict(view.meta)
    view.replace_all_uses_with(new_scale)
    graph.erase_node(view)
    graph.erase_node(scale)
    return new_scale


MOVABLE = frozenset({aten.reshape.default, aten.view.default, aten.contiguous.default, aten.transpose.int})


def as_they_lie(region: AttentionRegion) -> AttentionRegion:
    """The region with copies, transposes and constant scales taken off its operands."""
    (q, q_scale), (k, k_scale) = _bare(region.q), _bare(region.k)
    v = _without_copies(region.v)
    return replace(region, q=q, k=k, v=v, scale=region.scale * q_scale * k_scale)


def _bare(operand: Operand) -> tuple[Operand, float]:
    total = 1.0
    while True:
        simple, factor = simplify(operand, constant_of)
        total *= factor
        bare = _without_copies(simple)
        if bare == operand:
            return bare, total
        operand = bare


def _without_copies(operand: Operand) -> Operand:
    while operand.node.target in COPIES:
        operand = simplify(Operand(inputs(operand.node)[0], operand.dims), lambda _: None)[0]
    return operand
