"""What dims are made of after an op that computes: elementwise, a norm, a product, a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.elements.axes import (
    ONE,
    Axis,
    Layout,
    agreed,
    is_one,
    other,
    same_size,
)
from monarch_compile.passes.elements.axis_moves import PartRule, Rule
from monarch_compile.passes.elements.values import CASTS_AND_COPIES
from monarch_compile.passes.graph import arg, aten, inputs, normal_dim, shape_of

if TYPE_CHECKING:
    from monarch_compile.passes.elements.layouts import Layouts


def of_elementwise(seen: Layouts, node: Node) -> Layout:
    """Operands broadcast from the right; those of size 1 say nothing of a larger dim."""
    return _broadcast(seen, node, [x for x in node.all_input_nodes if shape_of(x)], len(shape_of(node)))


def _broadcast(seen: Layouts, node: Node, tensors: Sequence[Node], num_dims: int, skip: int = 0) -> Layout:
    """The first `num_dims` dims of a node, as its operands broadcast without their last `skip` dims."""
    found = []
    for dim in range(num_dims):
        size, place = shape_of(node)[dim], dim - num_dims - skip
        axes, unclear = [], False
        for x in tensors:
            own = len(shape_of(x)) + place
            if own >= 0 and not (is_one(shape_of(x)[own]) and not is_one(size)):
                axes.append(seen.layout(x)[own])
                unclear |= not same_size(shape_of(x)[own], size)
        why = "operands have sizes that may differ"
        found.append(other(node, dim, size, why) if unclear else agreed(axes, node, dim, size))
    return tuple(found)


def _same(seen: Layouts, node: Node) -> Layout:
    return seen.layout(inputs(node)[0])


def _part_same(seen: Layouts, op: Node, place: int, node: Node) -> Layout | None:
    found = seen.layout(inputs(op)[0])
    return found if place == 0 else None


def _without_channels(seen: Layouts, node: Node) -> Layout:
    """Norms with numbers for each channel, the second dim: a token axis there would be taken for features."""
    found = [*seen.layout(inputs(node)[0])]
    found[1] = other(node, 1, shape_of(node)[1], "a norm takes it for channels")
    return tuple(found)


def _of_gate(seen: Layouts, node: Node) -> Layout:
    found = [*seen.layout(inputs(node)[0])]
    dim = normal_dim(arg(node, 1, "dim", -1), len(found))
    found[dim] = other(node, dim, shape_of(node)[dim], "its second half gates the first")
    return tuple(found)


def _of_embedding(seen: Layouts, node: Node) -> Layout:
    index, rank = inputs(node)[1], len(shape_of(node))
    features = other(node, rank - 1, shape_of(node)[-1], "it holds features of an embedding")
    return (*(made_of(node, dim, axis) for dim, axis in enumerate(seen.layout(index))), features)


def made_of(node: Node, dim: int, axis: Axis) -> Axis:
    """A dim of a product. What says nothing as it stands would be content now."""
    if axis.is_free and axis.factors:
        return other(node, dim, shape_of(node)[dim], f"it comes from a tensor without a grid: {axis.factors[0].why}")
    return axis


# ---- reductions ------------------------------------------------------------------------------------------------------


def _without(before: Layout, given: Any, node: Node) -> Layout | None:
    """The dims that are left. A sum over what has an order is a product: one that said nothing has content then."""
    rank = len(before)
    dims = [given] if isinstance(given, int) else given
    if not isinstance(dims, (list, tuple)) or not dims or not all(isinstance(d, int) for d in dims):
        return None
    gone = {normal_dim(d, rank) for d in dims}
    is_kept = len(shape_of(node)) == rank
    left = [ONE if dim in gone else axis for dim, axis in enumerate(before) if is_kept or dim not in gone]
    if all(before[dim].is_free for dim in gone):
        return tuple(left)
    return tuple(made_of(node, dim, axis) for dim, axis in enumerate(left))


def _of_reduction(seen: Layouts, node: Node) -> Layout | None:
    return _without(seen.layout(inputs(node)[0]), arg(node, REDUCTIONS[node.target], "dim"), node)


def _part_of_reduction(seen: Layouts, op: Node, place: int, node: Node) -> Layout | None:
    return _without(seen.layout(inputs(op)[0]), arg(op, 1, "dim"), node)


# ---- products --------------------------------------------------------------------------------------------------------


def _of_linear(seen: Layouts, node: Node) -> Layout | None:
    x, rank = inputs(node)[0], len(shape_of(node))
    if len(shape_of(x)) != rank:
        return None
    rows = [made_of(node, dim, axis) for dim, axis in enumerate(seen.layout(x)[:-1])]
    return (*rows, other(node, rank - 1, shape_of(node)[-1], "a linear layer makes it: it holds features"))


def _of_matmul(seen: Layouts, node: Node, first: int = 0) -> Layout | None:
    lhs, rhs = inputs(node)[first : first + 2]
    rank = len(shape_of(node))
    if len(shape_of(lhs)) < 2 or len(shape_of(rhs)) < 2:
        return None
    lead = _broadcast(seen, node, (lhs, rhs), rank - 2, skip=2)
    made = (*lead, seen.layout(lhs)[-2], seen.layout(rhs)[-1])
    return tuple(made_of(node, dim, axis) for dim, axis in enumerate(made))


def _of_added_matmul(seen: Layouts, node: Node) -> Layout | None:
    """A bias of the output's shape is an operand as any other; a smaller one is added to all rows alike."""
    made, bias = _of_matmul(seen, node, first=1), inputs(node)[0]
    if made is None:
        return None
    own, rank = seen.layout(bias), len(made)
    skipped = rank - len(own)
    found = []
    for dim, axis in enumerate(made):
        is_full = dim >= skipped and not (is_one(shape_of(bias)[dim - skipped]) and not is_one(shape_of(node)[dim]))
        found.append(agreed([axis, own[dim - skipped]], node, dim, shape_of(node)[dim]) if is_full else axis)
    return tuple(found)


def _of_outer(seen: Layouts, node: Node) -> Layout:
    """Each of one with each of the other: as elementwise, for nothing is summed."""
    first, last = inputs(node)[:2]
    return (*seen.layout(first), *seen.layout(last))


def _of_einsum(seen: Layouts, node: Node) -> Layout | None:
    named, out = einsum_letters(node)
    if not named:
        return None
    found = []
    for dim, letter in enumerate(out):
        axes = [seen.layout(x)[letters.index(letter)] for x, letters in named if letter in letters]
        found.append(made_of(node, dim, agreed(axes, node, dim, shape_of(node)[dim])))
    return tuple(found)


def _of_attention(seen: Layouts, node: Node) -> Layout | None:
    """Rows are those of the queries."""
    q, k, v = inputs(node)[:3]
    rank = len(shape_of(node))
    if len(shape_of(q)) != rank or len(shape_of(v)) < 2:
        return None
    grouped = node.kwargs.get("enable_gqa", False)
    lead = seen.layout(q)[:-2] if grouped else _broadcast(seen, node, (q, k, v), rank - 2, skip=2)
    made = (*lead, seen.layout(q)[-2], seen.layout(v)[-1])
    return tuple(made_of(node, dim, axis) for dim, axis in enumerate(made))


REDUCTIONS: dict[object, int] = {
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.var.dim: 1,
    aten.var.correction: 1,
    aten.std.dim: 1,
    aten.std.correction: 1,
    aten.argmax.default: 1,
    aten.argmin.default: 1,
    aten.logsumexp.default: 1,
    aten.any.dim: 1,
    aten.all.dim: 1,
    aten.prod.dim_int: 1,
    aten.linalg_vector_norm.default: 2,
    aten.norm.ScalarOpt_dim: 2,
}
"""Ops that take dims away, and the place of their argument that says which."""

SAME = (
    *CASTS_AND_COPIES,
    aten.dropout.default,
    aten.dropout_.default,
    aten.feature_dropout.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten.prelu.default,
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.log_softmax.int,
    aten.layer_norm.default,
    aten.rms_norm.default,
)
"""Ops whose output has the places of their first input, whatever they compute along them."""

SUMS: dict[object, Rule] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys((aten.batch_norm.default, aten.group_norm.default, aten.instance_norm.default), _without_channels),
    aten.glu.default: _of_gate,
    aten.embedding.default: _of_embedding,
    **dict.fromkeys(REDUCTIONS, _of_reduction),
    aten.linear.default: _of_linear,
    **dict.fromkeys((aten.matmul.default, aten.mm.default, aten.bmm.default), _of_matmul),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _of_added_matmul),
    **dict.fromkeys((aten.outer.default, aten.ger.default), _of_outer),
    aten.einsum.default: _of_einsum,
    aten.scaled_dot_product_attention.default: _of_attention,
}

SUM_PARTS: dict[object, PartRule] = {
    **dict.fromkeys((aten.native_layer_norm.default, aten.native_dropout.default), _part_same),
    **dict.fromkeys((aten.max.dim, aten.min.dim), _part_of_reduction),
}
