"""What dims are made of after an op that moves, takes or joins elements: a rule an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from monarch_compile.passes.elements.axes import (
    ONE,
    Axis,
    Factor,
    JoinedGrid,
    Kind,
    Layout,
    agreed,
    axis_of,
    cut_evenly,
    free,
    grid_of,
    is_one,
    is_placed,
    other,
    regrouped,
    same_size,
    total,
    whole_number,
    with_patches,
)
from monarch_compile.passes.graph import arg, aten, inputs, normal_dim, shape_of, value_of
from monarch_compile.passes.views import TRANSPOSES, source_dims

if TYPE_CHECKING:
    from monarch_compile.passes.elements.layouts import Layouts

Rule = Callable[["Layouts", Node], Layout | None]
"""The dims of an op's output, or None where the op is used in a way that is not understood."""
PartRule = Callable[["Layouts", Node, int, Node], Layout | None]
"""The same for one of an op's several outputs: given the op, which output, and the node that takes it."""


def moved(node: Node, dim: int, axis: Axis, why: str) -> Axis:
    """A dim after an op that moves along it: a spatial one is an axis of another image, any other is lost."""
    factor, size = axis.single, shape_of(node)[dim]
    if factor is not None and factor.kind in (Kind.SPATIAL, Kind.IMAGE):
        return axis_of(Factor((node, dim), factor.kind, size, factor.along))
    return other(node, dim, size, why)


# ---- reshapes and transposes -----------------------------------------------------------------------------------------


def _of_reshape(seen: Layouts, node: Node) -> Layout:
    source = inputs(node)[0]
    before, sizes = seen.layout(source), shape_of(node)
    if not isinstance(source, Node) or any(isinstance(s, int) and s == 0 for s in sizes):
        return seen.unknown(node, "it is empty")
    known = {axis.factors: axis for axis in before if len(axis.factors) > 1}
    found = []
    for dim, group in enumerate(regrouped([f for axis in before for f in axis.factors], sizes)):
        if group is None:
            why = "a reshape cuts and joins dims in a way that mixes their places"
            found.append(other(node, dim, sizes[dim], why))
        else:
            found.append(known.get(group) or Axis(group, node if len(group) > 1 else None))
    return with_patches(tuple(found))


def _of_transpose(seen: Layouts, node: Node) -> Layout:
    before = seen.layout(inputs(node)[0])
    return tuple(before[dim] for dim in source_dims(node))


def _of_expand(seen: Layouts, node: Node) -> Layout | None:
    source = inputs(node)[0]
    before, sizes = shape_of(source), shape_of(node)
    new = len(sizes) - len(before)
    found = []
    for dim, size in enumerate(sizes):
        if dim < new or (is_one(before[dim - new]) and not is_one(size)):
            found.append(free(node, dim, size, "one element is repeated along it"))
        elif same_size(before[dim - new], size):
            found.append(seen.layout(source)[dim - new])
        else:
            found.append(other(node, dim, size, "it is expanded from a size that may be 1"))
    return tuple(found)


def _of_repeat(seen: Layouts, node: Node) -> Layout:
    source, times = inputs(node)[:2]
    before, sizes = shape_of(source), shape_of(node)
    new, found = len(sizes) - len(before), []
    for dim, size in enumerate(sizes):
        if dim >= new and is_one(times[dim]):
            found.append(seen.layout(source)[dim - new])
        elif dim < new or is_one(before[dim - new]):
            found.append(free(node, dim, size, "one element is repeated along it"))
        else:
            found.append(other(node, dim, size, "it is repeated, one copy after another"))
    return tuple(found)


def _of_repeat_interleave(seen: Layouts, node: Node) -> Layout | None:
    """Each place is repeated along one dim; without a dim all are flattened first."""
    source, given = inputs(node)[0], arg(node, 2, "dim")
    if given is None:
        return None
    found, dim = [*seen.layout(source)], normal_dim(given, len(shape_of(node)))
    size, why = shape_of(node)[dim], "each place along it is repeated"
    is_alike = is_one(shape_of(source)[dim]) or found[dim].is_free
    found[dim] = free(node, dim, size, why) if is_alike else other(node, dim, size, why)
    return tuple(found)


def _of_complex(seen: Layouts, node: Node) -> Layout:
    return seen.layout(inputs(node)[0])[:-1]


def _of_real(seen: Layouts, node: Node) -> Layout:
    rank = len(shape_of(node))
    return (*seen.layout(inputs(node)[0]), other(node, rank - 1, 2, "it holds parts of complex numbers"))


def _of_windows(seen: Layouts, node: Node) -> Layout | None:
    """Tensor.unfold: windows of a dim, their places in a new last dim; side by side they cut it in two."""
    source, given, size, step = inputs(node)[:4]
    before = list(seen.layout(source))
    dim, rank = normal_dim(given, len(before)), len(before)
    count = shape_of(node)[dim]
    factor, width = before[dim].single, shape_of(source)[dim]
    halves = cut_evenly(factor, size) if factor is not None and size == step and size > 1 else None
    if halves is not None and same_size(count * size, width):
        before[dim], last = axis_of(halves[0]), axis_of(halves[1])
    else:
        before[dim] = moved(node, dim, before[dim], "windows are taken along it")
        last = other(node, rank, size, "it holds places of windows")
    return with_patches((*before, last))


# ---- parts -----------------------------------------------------------------------------------------------------------


def _taken(node: Node, dim: int, axis: Axis, before: Any, start: int | None) -> Axis:
    """What is left of a dim of size `before`, taken without gaps from `start`, None if that is unknown."""
    size = shape_of(node)[dim]
    factor = axis.single
    if same_size(size, before):
        return axis
    if factor is not None and factor.kind in (Kind.SPATIAL, Kind.IMAGE):
        return moved(node, dim, axis, "")
    if axis.is_free:
        return free(node, dim, size)
    if factor is not None and factor.kind is Kind.JOINED and start is not None:
        end = whole_number(before - start - size)
        if start <= factor.prefix and end is not None and 0 <= end <= factor.suffix:
            grid = JoinedGrid(factor.prefix - start, factor.suffix - end, factor.inner)
            return _beside(node, dim, grid, factor.node)
        if isinstance(size, int) and (start + size <= factor.prefix or (end == 0 and size <= factor.suffix)):
            return other(node, dim, size, "it holds no more than the tokens beside a grid")
    where = "a grid" if is_placed(axis) else "the token axis"
    return other(node, dim, size, f"a part of {where} is taken")


def _beside(node: Node, dim: int, grid: JoinedGrid, source: Node | None) -> Axis:
    """A grid with the tokens before and after it, if there are any; source: the node that flattened it."""
    prefix, suffix, factors = grid
    if prefix == suffix == 0:
        return Axis(factors, source)
    size = prefix + total(factors) + suffix
    return Axis((Factor((node, dim), Kind.JOINED, size, prefix=prefix, suffix=suffix, inner=factors, node=source),))


def _of_slice(seen: Layouts, node: Node) -> Layout:
    source, rank = inputs(node)[0], len(shape_of(node))
    dim = normal_dim(arg(node, 1, "dim", 0), rank)
    start, stop, step = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
    found, before, after = [*seen.layout(source)], shape_of(source)[dim], shape_of(node)[dim]
    if step != 1:
        found[dim] = moved(node, dim, found[dim], "every other token is taken")
        return tuple(found)
    found[dim] = _taken(node, dim, found[dim], before, _start_of(start, stop, before, after))
    return tuple(found)


def _start_of(start: Any, stop: Any, before: Any, after: Any) -> int | None:
    """How many are left out at the front, as a number."""
    if start is None or (isinstance(start, int) and start >= 0):
        return start or 0
    is_to_the_end = stop is None or (isinstance(stop, int) and stop >= 2**62)
    return whole_number(before - after) if is_to_the_end else None


def _of_narrow(seen: Layouts, node: Node) -> Layout:
    source, given, start = inputs(node)[:3]
    dim = normal_dim(given, len(shape_of(node)))
    found = [*seen.layout(source)]
    known = start if isinstance(start, int) and start >= 0 else None
    found[dim] = _taken(node, dim, found[dim], shape_of(source)[dim], known)
    return tuple(found)


def _of_select(seen: Layouts, node: Node) -> Layout:
    before = seen.layout(inputs(node)[0])
    dim = normal_dim(inputs(node)[1], len(before))
    return (*before[:dim], *before[dim + 1 :])


def _part_of_split(seen: Layouts, op: Node, place: int, node: Node) -> Layout:
    source, dim = inputs(op)[0], normal_dim(arg(op, 2, "dim", 0), len(shape_of(node)))
    sizes = [value.shape[dim] for value in value_of(op)]
    found = [*seen.layout(source)]
    start = whole_number(sum(sizes[:place]))
    found[dim] = _taken(node, dim, found[dim], shape_of(source)[dim], start)
    return tuple(found)


def _part_of_unbind(seen: Layouts, op: Node, place: int, node: Node) -> Layout:
    before = seen.layout(inputs(op)[0])
    dim = normal_dim(arg(op, 1, "dim", 0), len(before))
    return (*before[:dim], *before[dim + 1 :])


def _of_index(seen: Layouts, node: Node) -> Layout | None:
    """x[:, index]: dims that are not indexed stay; places of those that are depend on numbers."""
    source, indices = inputs(node)[0], inputs(node)[1]
    given = [place for place, index in enumerate(indices) if index is not None]
    if len(given) != 1 or value_of(indices[given[0]]).dtype.is_floating_point:
        return None
    (dim,), before = given, seen.layout(source)
    new = len(shape_of(node)) - len(before) + 1
    if new < 1:  # a mask of several dims
        return None
    why = "tokens are taken by index, in an order that is not known"
    made = [other(node, dim + i, shape_of(node)[dim + i], why) for i in range(new)]
    return (*before[:dim], *made, *before[dim + 1 :])


def _of_index_select(seen: Layouts, node: Node) -> Layout:
    found, why = [*seen.layout(inputs(node)[0])], "tokens are taken by index, in an order that is not known"
    dim = normal_dim(inputs(node)[1], len(found))
    found[dim] = other(node, dim, shape_of(node)[dim], why)
    return tuple(found)


def _of_gather(seen: Layouts, node: Node) -> Layout:
    """The index has a place for each element: along other dims it is an operand like the source."""
    source, given, index = inputs(node)[:3]
    before, rank = seen.layout(source), len(shape_of(node))
    at, why = normal_dim(given, rank), "tokens are gathered by index, in an order that is not known"
    found = []
    for dim, size in enumerate(shape_of(node)):
        stays = dim != at and same_size(shape_of(source)[dim], size)
        axes = [before[dim], seen.layout(index)[dim]]
        kept = agreed(axes, node, dim, size)
        takes_content = kept.is_free and bool(kept.factors)  # each place along it takes another token
        found.append(kept if stays and not takes_content else other(node, dim, size, why))
    return tuple(found)


# ---- joins -----------------------------------------------------------------------------------------------------------


def _of_cat(seen: Layouts, node: Node) -> Layout | None:
    rank, sizes = len(shape_of(node)), shape_of(node)
    parts = [x for x in inputs(node)[0] if len(shape_of(x)) == rank]
    if len(parts) != len(inputs(node)[0]):
        return None
    at = normal_dim(arg(node, 1, "dim", 0), rank)
    layouts = [seen.layout(x) for x in parts]
    found = [agreed([x[dim] for x in layouts], node, dim, sizes[dim]) if dim != at else ONE for dim in range(rank)]
    found[at] = _one_after_another(node, at, [x[at] for x in layouts], [shape_of(x)[at] for x in parts])
    return tuple(found)


def _one_after_another(node: Node, dim: int, axes: Sequence[Axis], sizes: Sequence[Any]) -> Axis:
    """Tokens, a grid, tokens: proven where one part alone has places in an image, and the others known numbers."""
    size = shape_of(node)[dim]
    if len(axes) == 1:
        return axes[0]
    placed = [at for at, axis in enumerate(axes) if is_placed(axis)]
    if len(placed) > 1:
        return other(node, dim, size, "two grids are joined one after the other")
    at = placed[0] if placed else len(axes) - 1
    grid, numbers = grid_of(axes[at]), [whole_number(s) for s in sizes]
    if grid is None:
        blamed = axes[at].explained
        why = blamed.why if blamed and blamed.kind is Kind.OTHER else "tokens are joined without a grid among them"
        return other(node, dim, size, why, blamed.node if blamed and blamed.kind is Kind.OTHER else None)
    before, after = numbers[:at], numbers[at + 1 :]
    if None in (*before, *after):
        return other(node, dim, size, "the number of tokens beside a grid is not known until it runs")
    joined = JoinedGrid(
        grid.prefix + sum(n for n in before if n is not None),
        grid.suffix + sum(n for n in after if n is not None),
        grid.factors,
    )
    return _beside(node, dim, joined, axes[at].flattened_by)


def _of_stack(seen: Layouts, node: Node) -> Layout:
    sizes = shape_of(node)
    at, layouts = normal_dim(arg(node, 1, "dim", 0), len(sizes)), [seen.layout(x) for x in inputs(node)[0]]
    found = []
    for dim, size in enumerate(sizes):
        own = dim - (dim > at)
        stacked = other(node, dim, size, "tensors are stacked along it")
        found.append(stacked if dim == at else agreed([x[own] for x in layouts], node, dim, size))
    return tuple(found)


RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.ravel.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)

CATS = (aten.cat.default, aten.concat.default, aten.concatenate.default)

MOVES: dict[object, Rule] = {
    **dict.fromkeys(RESHAPES, _of_reshape),
    **dict.fromkeys(TRANSPOSES, _of_transpose),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), _of_expand),
    aten.repeat.default: _of_repeat,
    **dict.fromkeys((aten.repeat_interleave.self_int, aten.repeat_interleave.self_Tensor), _of_repeat_interleave),
    aten.view_as_complex.default: _of_complex,
    aten.view_as_real.default: _of_real,
    aten.unfold.default: _of_windows,
    aten.slice.Tensor: _of_slice,
    aten.narrow.default: _of_narrow,
    aten.select.int: _of_select,
    aten.index.Tensor: _of_index,
    aten.index_select.default: _of_index_select,
    aten.gather.default: _of_gather,
    **dict.fromkeys(CATS, _of_cat),
    aten.stack.default: _of_stack,
}

PARTS: dict[object, PartRule] = {
    **dict.fromkeys(
        (
            aten.split.Tensor,
            aten.split.sizes,
            aten.split_with_sizes.default,
            aten.chunk.default,
            aten.tensor_split.sections,
        ),
        _part_of_split,
    ),
    aten.unbind.int: _part_of_unbind,
}
