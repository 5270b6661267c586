"""Where a dim of a tensor comes from: followed up, op by op, to the operand of a product whose dim it is."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.fx import Node

from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.graph import arg, aten, inputs, normal_dim, shape_of
from monarch_compile.passes.views import TRANSPOSES, source_dims

Sources = list[tuple[Node, int]]
"""Inputs of an op, each with the dim of it that a dim of the output is; none for a dim that the op itself makes."""


def sources_of(node: Node, dim: int) -> Sources | None:
    """The inputs that a dim of a node's output comes from; None where that is not known."""
    rule = RULES.get(node.target)
    if rule is not None:
        return rule(node, dim)
    tensors = [n for n in node.all_input_nodes if shape_of(n)]
    if len(tensors) == 1:
        (source,) = tensors
        before, after = shape_of(source), shape_of(node)
        is_view = _has_as_many_elements(source, node)
        if is_view and (node.target in RESHAPES or len(before) != len(after)):
            return [(source, place) for place in _reshaped(before, after, dim)]
        if node.target in RESHAPES:  # symbolic sizes, written in two ways
            place = dim - len(after)
            return [(source, len(before) + place)] if str(before[place:]) == str(after[place:]) else None
        if len(before) > len(after):
            return _of_reduction(node, source, dim)
    return _of_elementwise(node, tensors, dim)


def _of_elementwise(node: Node, tensors: Sequence[Node], dim: int) -> Sources | None:
    """Dims of tensors that are broadcast, counted from the right; those of size 1 are no source of larger ones."""
    rank = len(shape_of(node))
    if any(len(shape_of(x)) > rank for x in tensors):
        return None
    return _broadcast(tensors, dim - rank, shape_of(node)[dim])


def _broadcast(tensors: Sequence[Node], place: int, size: Any) -> Sources:
    """The dims, `place` counted from the right (negative), that give one of `size`."""
    own = [(x, len(shape_of(x)) + place) for x in tensors]
    return [(x, dim) for x, dim in own if dim >= 0 and (str(shape_of(x)[dim]) != "1" or str(size) == "1")]


def _unknown(node: Node, dim: int) -> None:
    return None


# ---- views -----------------------------------------------------------------------------------------------------------

RESHAPES = frozenset({aten.reshape.default, aten.view.default, aten._unsafe_view.default})


def _has_as_many_elements(before: Node, after: Node) -> bool:
    return str(math.prod(shape_of(before))) == str(math.prod(shape_of(after)))


def _reshaped(before: tuple[Any, ...], after: tuple[Any, ...], dim: int) -> Iterator[int]:
    """The dims of `before` among which a dim of `after` lies: those between the nearest places where both begin."""
    starts, ends = _prefixes(before), _prefixes(after)
    first = next(i for i in range(dim, -1, -1) if ends[i] in starts)
    last = next(i for i in range(dim + 1, len(ends)) if ends[i] in starts)
    low = len(starts) - 1 - starts[::-1].index(ends[first])
    yield from range(low, starts.index(ends[last])) if ends[first] != ends[last] else ()


def _prefixes(shape: tuple[Any, ...]) -> list[str]:
    return [str(math.prod(shape[:i])) for i in range(len(shape) + 1)]


def _of_reduction(node: Node, source: Node, dim: int) -> Sources | None:
    """Of an op that takes away the dims that it is given."""
    given, rank = arg(node, 1, "dim"), len(shape_of(source))
    gone = [given] if isinstance(given, int) else given
    if not isinstance(gone, (list, tuple)) or not all(isinstance(d, int) for d in gone):
        return None
    left = [d for d in range(rank) if d not in {normal_dim(d, rank) for d in gone}]
    return [(source, left[dim])] if len(left) == len(shape_of(node)) else None


def _of_transpose(node: Node, dim: int) -> Sources:
    return [(inputs(node)[0], source_dims(node)[dim])]


def _of_part(node: Node, dim: int) -> Sources | None:
    """Of one of an op's several outputs: a part of a tensor, or numbers for each of its elements."""
    op = inputs(node)[0]
    source = next((n for n in op.all_input_nodes if shape_of(n)), None)
    if source is None or (op.target is not aten.unbind.int and len(shape_of(source)) != len(shape_of(node))):
        return None
    gone = normal_dim(arg(op, 1, "dim", 0), len(shape_of(source))) if op.target is aten.unbind.int else math.inf
    return [(source, dim + (dim >= gone))]


# ---- products --------------------------------------------------------------------------------------------------------


def _of_matmul(node: Node, dim: int, first: int = 0) -> Sources:
    lhs, rhs = inputs(node)[first : first + 2]
    left, right, place = len(shape_of(lhs)), len(shape_of(rhs)), dim - len(shape_of(node))
    if right == 1:
        return [(lhs, dim)]
    if left == 1:
        return [(rhs, right - 1 if place == -1 else dim)]
    if place >= -2:
        return [(rhs, right - 1)] if place == -1 else [(lhs, left - 2)]
    return _broadcast((lhs, rhs), place, shape_of(node)[dim])


def _of_added_matmul(node: Node, dim: int) -> Sources:
    return _of_matmul(node, dim, first=1)


def _of_einsum(node: Node, dim: int) -> Sources | None:
    named, out = einsum_letters(node)
    return [(n, letters.index(out[dim])) for n, letters in named if out[dim] in letters] if named else None


def _of_linear(node: Node, dim: int) -> Sources:
    x, weight = inputs(node)[:2]
    is_feature = dim == len(shape_of(node)) - 1 and len(shape_of(weight)) == 2
    return [(weight, 0)] if is_feature else [(x, dim)]


def _of_convolution(node: Node, dim: int) -> Sources:
    x, weight = inputs(node)[:2]
    channels = len(shape_of(node)) - len(shape_of(weight)) + 1
    return [(weight, 0)] if dim == channels else [(x, dim)]


def _of_tensordot(node: Node, dim: int) -> Sources:
    x, y, x_summed, y_summed = inputs(node)[:4]
    free = [
        (n, d)
        for n, summed in ((x, x_summed), (y, y_summed))
        for d in range(len(shape_of(n)))
        if d not in {normal_dim(s, len(shape_of(n))) for s in summed}
    ]
    return [free[dim]]


def _of_inner(node: Node, dim: int) -> Sources:
    x, y = inputs(node)[:2]
    return [[(n, d) for n in (x, y) for d in range(len(shape_of(n)) - 1)][dim]]


def _of_chain(node: Node, dim: int) -> Sources:
    first, *_, last = inputs(node)[0]
    return [(last, len(shape_of(last)) - 1)] if dim == len(shape_of(node)) - 1 else [(first, dim)]


def _of_distances(node: Node, dim: int) -> Sources:
    x, y = inputs(node)[:2]
    place = dim - len(shape_of(node))
    if place >= -2:
        chosen = y if place == -1 else x
        return [(chosen, len(shape_of(chosen)) - 2)]
    return _broadcast((x, y), place, shape_of(node)[dim])


def _of_cosines(node: Node, dim: int) -> Sources:
    rank = len(shape_of(node)) + 1
    place = dim + (dim >= normal_dim(arg(node, 2, "dim", 1), rank)) - rank
    return _broadcast(inputs(node)[:2], place, shape_of(node)[dim])


def _of_matrix_vector(node: Node, dim: int) -> Sources:
    return [(inputs(node)[0], dim)]


RULES: dict[object, Callable[[Node, int], Sources | None]] = {
    operator.getitem: _of_part,
    aten.stack.default: _unknown,
    **dict.fromkeys(TRANSPOSES, _of_transpose),
    **dict.fromkeys((aten.matmul.default, aten.matmul.out, aten.mm.default, aten.mm.out), _of_matmul),
    **dict.fromkeys((aten.bmm.default, aten.bmm.out), _of_matmul),
    **dict.fromkeys((aten.addmm.default, aten.addmm.out), _of_added_matmul),
    **dict.fromkeys((aten.baddbmm.default, aten.baddbmm.out), _of_added_matmul),
    aten.einsum.default: _of_einsum,
    aten.linear.default: _of_linear,
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.convolution.default), _of_convolution),
    aten.tensordot.default: _of_tensordot,
    aten.inner.default: _of_inner,
    aten.linalg_multi_dot.default: _of_chain,
    aten.mv.default: _of_matrix_vector,
    **dict.fromkeys((aten.cdist.default, aten._cdist_forward.default), _of_distances),
    aten.cosine_similarity.default: _of_cosines,
}
