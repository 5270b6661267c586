"""Operands taken where they lie: the kernels read q, k and v by strides, so copies and scales before them can go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from monarch_compile.passes.attention.products import SCALES, Simplified, simplify
from monarch_compile.passes.attention.region import AttentionRegion, Operand
from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.graph import aten, dtype_of, inputs, same_shape, switches_mode, value_of
from monarch_compile.passes.memory import storages_of, writes_of

COPIES = frozenset({aten.contiguous.default, aten.clone.default})


def hoist_scales(gm: GraphModule) -> int:
    """Move a constant scale behind the reshape that follows it, so that it stands next to the product it belongs to."""
    changed = 0
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    events = _events(gm, order)
    for node in list(gm.graph.nodes):
        while (moved := _swap_with_reshape(node, order, events)) is not None:
            node = moved
            changed += 1
    return changed


def _swap_with_reshape(scale: Node, order: dict[Node, int], events: list[tuple[int, frozenset[int]]]) -> Node | None:
    """scale -> reshape becomes reshape -> scale; returns the new scale."""
    if scale.op != "call_function" or scale.target not in SCALES or len(scale.users) != 1:
        return None
    (view,) = scale.users
    source, factor = inputs(scale)[:2]
    if view.target not in MOVABLE or not isinstance(source, Node) or constant_of(factor) is None:
        return None
    if dtype_of(source) != dtype_of(scale) or not same_shape(source, scale):
        return None
    if any(order[scale] < at < order[view] and (not own or own & storages_of(source)) for at, own in events):
        return None
    graph, rest = scale.graph, inputs(view)[1:]
    with graph.inserting_before(view):
        new_view = graph.call_function(view.target, (source, *rest), dict(view.kwargs))
        new_scale: Node = graph.create_node("call_function", scale.target, (new_view, factor))
    new_view.meta, new_scale.meta = dict(view.meta), dict(view.meta)
    # The new view shares the source's memory, as the old one shared the scaled copy's: its fake tensor has to say so.
    new_view.meta["val"] = view.target(value_of(source), *map_arg(rest, value_of), **map_arg(view.kwargs, value_of))
    order[new_view] = order[new_scale] = order[view]
    view.replace_all_uses_with(new_scale)
    graph.erase_node(view)
    graph.erase_node(scale)
    return new_scale


def _events(gm: GraphModule, order: dict[Node, int]) -> list[tuple[int, frozenset[int]]]:
    """What no read may be moved across: writes, with the memory they reach, and switches of a mode (none given)."""
    writes = [(w.place, w.storages) for w in writes_of(gm.graph)]
    return writes + [(order[n], frozenset()) for n in gm.graph.nodes if switches_mode(n)]


MOVABLE = frozenset({aten.reshape.default, aten.view.default, aten.contiguous.default, aten.transpose.int})


def without_copies(region: AttentionRegion) -> AttentionRegion:
    """The region with copies, transposes and constant scales taken off its operands."""
    q, k = _bare(region.q, constant_of), _bare(region.k, constant_of)
    v = _bare(region.v, lambda _: None)
    skipped = (*region.skipped, *q.skipped, *k.skipped, *v.skipped)
    scale = region.scale * q.factor * k.factor
    return replace(region, q=q.operand, k=k.operand, v=v.operand, scale=scale, skipped=skipped)


def _bare(operand: Operand, constant_of: Callable[[object], float | None]) -> Simplified:
    bare = simplify(operand, constant_of)
    while bare.operand.node.target in COPIES:
        copy = bare.operand.node
        below = simplify(Operand(inputs(copy)[0], bare.operand.dims), constant_of)
        bare = Simplified(below.operand, bare.factor * below.factor, (*bare.skipped, copy, *below.skipped))
    return bare
