"""What follows an inverse transform: crop, scale, casts, a skip term and a gate, as far as the operator has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.convolution.inputs import before_cast
from monarch_compile.passes.convolution.reach import Reach
from monarch_compile.passes.convolution.region import Ending, Frame, Operand
from monarch_compile.passes.convolution.spectra import Dims
from monarch_compile.passes.convolution.transforms import Transform, is_complex, is_same, number_of
from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, normal_dim, same_shape, shape_of
from monarch_compile.passes.views import CASTS, TRANSPOSES, source_dims
from monarch_compile.refusal import Refused


@dataclass(frozen=True)
class Context:
    """What steps may look at. skipped: the input as a skip term has it; None where none can be folded.

    plain: whether the result may be put through a skip term and a gate at all.
    """

    points: Any
    frame: Frame
    reach: Reach
    skipped: Operand | None
    seq_len: Any
    plain: bool


Step = Callable[[Ending, Node, Context], Ending | None]


def ending_of(inverse: Transform, context: Context) -> Ending:
    """Follow the result of an inverse transform as far as each node has one reader, which is understood.

    Raises:
        Refused: the result is complex, and its real part is not taken.
    """
    node = inverse.node
    dims = tuple(range(len(shape_of(node))))
    found = Ending(node, dims, 0, context.points, 1.0, inverse.power)
    while (following := _next(found, context)) is not None:
        found = following
    if is_complex(found.output):
        raise Refused("complex_result", "the inverse transform is read as a complex tensor", found.output)
    return found


def _next(ending: Ending, context: Context) -> Ending | None:
    readers = list(ending.output.users)
    if len(readers) != 1 or readers[0].target not in STEPS or not context.reach.covers(readers[0]):
        return None
    reader = readers[0]
    if reader.target not in OF_TWO and inputs(reader)[0] is not ending.output:
        return None
    following = STEPS[reader.target](ending, reader, context)
    if following is None or not _keeps_precision(ending.output, following.output):
        return None
    return replace(following, inside=(*ending.inside, ending.output, *following.inside[len(ending.inside) :]))


def _keeps_precision(before: Node, after: Node) -> bool:
    """Whether a step has its input's dtype, or one of fewer bits: nothing is rounded that is then widened."""
    old, new = dtype_of(before), dtype_of(after)
    if old is None or new is None:
        return False
    old, new = (dtype.to_real() if dtype.is_complex else dtype for dtype in (old, new))
    return new == old or (new.is_floating_point and new.itemsize < old.itemsize)


def _real(ending: Ending, node: Node, context: Context) -> Ending | None:
    return replace(ending, output=node)


def _real_of_pair(ending: Ending, node: Node, context: Context) -> Ending | None:
    """`view_as_real(y)[..., 0]`."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].target is not aten.select.int:
        return None
    _, dim, index = inputs(readers[0])
    if normal_dim(dim, len(shape_of(node))) != len(shape_of(node)) - 1 or index != 0:
        return None
    return replace(ending, output=readers[0], inside=(*ending.inside, node))


def _crop(ending: Ending, node: Node, context: Context) -> Ending | None:
    dim = normal_dim(arg(node, 1, "dim", 0), len(shape_of(node)))
    if arg(node, 4, "step", 1) != 1:
        return None
    if same_shape(node, ending.output):
        return replace(ending, output=node)
    if ending.dims[dim] != context.frame.axis:
        return None
    return _cropped(ending, node, dim, number_of(arg(node, 2, "start")) or 0)


def _narrow(ending: Ending, node: Node, context: Context) -> Ending | None:
    dim = normal_dim(inputs(node)[1], len(shape_of(node)))
    start = number_of(inputs(node)[2])
    if ending.dims[dim] != context.frame.axis or not isinstance(start, (int, torch.SymInt)):
        return None
    return _cropped(ending, node, dim, start)


def _cropped(ending: Ending, node: Node, dim: int, start: Any) -> Ending | None:
    size = shape_of(ending.output)[dim]
    if isinstance(start, int) and isinstance(size, int):
        start = max(0, start + size) if start < 0 else min(start, size)
    elif statically_known_true(start < 0) and statically_known_true(start + size >= 0):
        start = start + size
    elif not (statically_known_true(start >= 0) and statically_known_true(start <= size)):
        return None
    if ending.skip is not None or (ending.post_gate is not None and not is_same(start, 0)):
        return None  # a skip term is of the whole input, and a gate begins with the first point that is put out
    return replace(ending, output=node, lag=ending.lag + start, length=shape_of(node)[dim])


def _roll(ending: Ending, node: Node, context: Context) -> Ending | None:
    """A roll of all points, which are periodic; a skip term and a gate would be rolled with them."""
    if ending.skip is not None or ending.post_gate is not None:
        return None
    shifts, dims = inputs(node)[1], arg(node, 2, "dims", ())
    if len(shifts) != 1 or len(dims) != 1 or not is_same(ending.length, context.points):
        return None
    dim = normal_dim(dims[0], len(shape_of(node)))
    numbers = (ending.lag, shifts[0], context.points)
    if ending.dims[dim] != context.frame.axis or not all(isinstance(n, int) for n in numbers):
        return None
    return replace(ending, output=node, lag=ending.lag - shifts[0])


def _mul(ending: Ending, node: Node, context: Context) -> Ending | None:
    one, other = inputs(node)[:2]
    if other is ending.output:
        one, other = other, one
    if other is ending.output or not isinstance(one, Node):
        return None
    return _scaled(ending, node, other, 1, context) or _gated(ending, node, other, context)


def _div(ending: Ending, node: Node, context: Context) -> Ending | None:
    one, other = inputs(node)[:2]
    return None if one is not ending.output or node.kwargs else _scaled(ending, node, other, -1, context)


def _scaled(ending: Ending, node: Node, factor: Any, sign: int, context: Context) -> Ending | None:
    if ending.skip is not None or ending.post_gate is not None:
        return None
    if is_complex(factor) or not same_shape(node, ending.output):
        return None
    size = number_of(factor)
    if isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) and is_same(size, context.points):
        return replace(ending, output=node, power=ending.power + 2 * sign)
    number = constant_of(factor)
    if number is None or (sign < 0 and number == 0):
        return None
    return replace(ending, output=node, number=ending.number * (number if sign > 0 else 1 / number))


def _gated(ending: Ending, node: Node, gate: Any, context: Context) -> Ending | None:
    allowed = context.plain and ending.post_gate is None and not is_complex(ending.output)
    if not allowed or not isinstance(gate, Node) or not same_shape(gate, ending.output):
        return None
    dtype = dtype_of(gate)
    if dtype is None or not dtype.is_floating_point:
        return None
    return replace(ending, output=node, post_gate=_in_product(Operand(gate, tuple(range(len(ending.dims)))), ending))


def _add(ending: Ending, node: Node, context: Context) -> Ending | None:
    one, other = inputs(node)[:2]
    if other is ending.output:
        one, other = other, one
    allowed = context.plain and ending.skip is None and ending.post_gate is None and not is_complex(ending.output)
    fits = isinstance(other, Node) and same_shape(other, ending.output) and other is not ending.output
    whole = context.skipped is not None and is_same(ending.length, context.seq_len)
    if not (allowed and fits and whole) or arg(node, 2, "alpha", 1) != 1:
        return None
    inside = [other]
    while (source := before_cast(other)) is not None:
        other = source
        inside.append(other)
    skip = _skip_of(ending, other, context)
    if skip is None or any(len(n.users) != 1 for n in inside):
        return None
    return replace(ending, output=node, skip=skip, inside=(*ending.inside, *inside))


def _skip_of(ending: Ending, node: Node, context: Context) -> Operand | None:
    """The channels' factors in `u * factors`, a product in the dims of the ending."""
    if node.target is aten.mul.Tensor:
        pairs = [_aligned(x, node) for x in inputs(node)[:2] if isinstance(x, Node)]
    elif node.target is aten.einsum.default:
        named, out = einsum_letters(node)
        if any(c not in out for _, letters in named for c in letters):
            return None
        pairs = [Operand(x, tuple(letters.index(c) if c in letters else None for c in out)) for x, letters in named]
    else:
        return None
    if len(pairs) != 2:
        return None
    for one, other in (pairs, pairs[::-1]):
        if _is_input(one, ending, context) and _is_of_channels(other, ending, context):
            return _in_product(other, ending)
    return None


def _in_product(operand: Operand, ending: Ending) -> Operand:
    """An operand in the dims of the ending, as it is in those of the product."""
    return Operand(operand.node, tuple(operand.dims[ending.dims.index(i)] for i in range(len(ending.dims))))


def _aligned(node: Node, result: Node) -> Operand:
    """A tensor as it is broadcast to a result."""
    missing = len(shape_of(result)) - len(shape_of(node))
    return Operand(node, (*[None] * missing, *range(len(shape_of(node)))))


def _is_input(operand: Operand, ending: Ending, context: Context) -> bool:
    """Whether a factor is the input of the convolution, moved and cast."""
    skipped = context.skipped
    assert skipped is not None
    node, dims = operand.node, operand.dims
    while node is not skipped.node:
        moved = _moved(node)
        if moved is None:
            return False
        node, places = moved
        dims = tuple(None if dim is None else places[dim] for dim in dims)
    wanted = [skipped.dims[place] for place in ending.dims]
    sizes = shape_of(node)
    return all(
        dim == want
        or (dim is None and want is not None and _is_one(sizes[want]))
        or (want is None and _is_one_dim(sizes, dim))
        for dim, want in zip(dims, wanted, strict=True)
    )


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _is_one_dim(sizes: tuple[Any, ...], dim: int | None) -> bool:
    return dim is None or _is_one(sizes[dim])


def _moved(node: Node) -> tuple[Node, Dims] | None:
    """What a cast, a transpose or an unsqueeze moves, and its dim for each of the node's."""
    rank = len(shape_of(node))
    source = before_cast(node)
    if source is not None:
        return source, tuple(range(rank))
    if node.target in TRANSPOSES:
        return inputs(node)[0], tuple(source_dims(node))
    if node.target is aten.unsqueeze.default:
        place = normal_dim(inputs(node)[1], rank)
        return inputs(node)[0], (*range(place), None, *range(place, rank - 1))
    return None


def _is_of_channels(operand: Operand, ending: Ending, context: Context) -> bool:
    dtype = dtype_of(operand.node)
    if dtype is None or not dtype.is_floating_point:
        return False
    places = (ending.dims[i] for i in range(len(ending.dims)) if operand.varies(i))
    return all(place in context.frame.channels for place in places)


def _cast(ending: Ending, node: Node, context: Context) -> Ending | None:
    return None if is_complex(node) != is_complex(ending.output) else replace(ending, output=node)


def _transposed(ending: Ending, node: Node, context: Context) -> Ending | None:
    if is_complex(node) and node.target in (aten.adjoint.default, aten.matrix_H.default):
        return None
    return replace(ending, output=node, dims=tuple(ending.dims[i] for i in source_dims(node)))


def _same(ending: Ending, node: Node, context: Context) -> Ending | None:
    return replace(ending, output=node)


STEPS: dict[Any, Step] = {
    aten.real.default: _real,
    aten.view_as_real.default: _real_of_pair,
    aten.slice.Tensor: _crop,
    aten.narrow.default: _narrow,
    aten.roll.default: _roll,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.add.Tensor: _add,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(TRANSPOSES, _transposed),
}
"""Ops after an inverse transform, and what they make of its ending."""

OF_TWO = frozenset({aten.mul.Tensor, aten.add.Tensor})
"""Those that may have the result for their second operand."""
