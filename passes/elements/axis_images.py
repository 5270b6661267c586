"""What dims are made of after an op on images: padding, rolling, resizing, cutting into patches, a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from monarch_compile.passes.elements.axes import (
    Axis,
    Factor,
    Kind,
    Layout,
    axis_of,
    is_one,
    other,
    same_size,
    spatial,
)
from monarch_compile.passes.elements.axis_moves import PartRule, Rule, moved
from monarch_compile.passes.elements.axis_sums import made_of
from monarch_compile.passes.graph import arg, aten, inputs, normal_dim, shape_of

if TYPE_CHECKING:
    from monarch_compile.passes.elements.layouts import Layouts


def _of_pad(seen: Layouts, node: Node) -> Layout:
    """Padding, and cropping by a negative number."""
    source, pads = inputs(node)[:2]
    before = seen.layout(source)
    padded = {len(before) - 1 - i // 2 for i, pad in enumerate(pads) if not (isinstance(pad, int) and pad == 0)}
    why = "tokens are padded"
    return tuple(moved(node, dim, axis, why) if dim in padded else axis for dim, axis in enumerate(before))


def _of_roll(seen: Layouts, node: Node) -> Layout:
    """A roll of a spatial axis moves the image; one of a part of an axis, or of flattened tokens, is another order.

    Without dims all are flattened first: what leaves a row comes in on the next.
    """
    source, dims = inputs(node)[0], arg(node, 2, "dims", [])
    if not dims:
        return seen.unknown(node, "tokens are rolled")
    before = seen.layout(source)
    rolled = {normal_dim(d, len(before)) for d in dims}
    found = []
    for dim, axis in enumerate(before):
        factor = axis.single
        stays = dim not in rolled or (factor is not None and factor.kind is Kind.SPATIAL and not factor.cuts)
        found.append(axis if stays else moved(node, dim, axis, "tokens are rolled"))
    return tuple(found)


def _of_resized(seen: Layouts, node: Node) -> Layout:
    """Pooling and interpolation: all dims after the first two."""
    before, rank = seen.layout(inputs(node)[0]), len(shape_of(node))
    first = rank - int(RESIZES[node.target])
    why = "tokens are pooled or interpolated"
    return tuple(moved(node, dim, axis, why) if dim >= first else axis for dim, axis in enumerate(before))


def _part_of_pool(seen: Layouts, op: Node, place: int, node: Node) -> Layout:
    before, rank = seen.layout(inputs(op)[0]), len(shape_of(node))
    why = "tokens are pooled"
    return tuple(moved(node, dim, axis, why) if dim >= rank - 2 else axis for dim, axis in enumerate(before))


def _of_pixel_shuffle(seen: Layouts, node: Node) -> Layout:
    before, sizes = seen.layout(inputs(node)[0]), shape_of(node)
    rank = len(sizes)
    along = alongs(before[-2:])
    made = [_new_spatial(node, dim, before[dim], a) for dim, a in ((rank - 2, along[0]), (rank - 1, along[1]))]
    return (*before[:-3], other(node, rank - 3, sizes[-3], "it holds features of pixels"), *made)


def _new_spatial(node: Node, dim: int, axis: Axis, along: int) -> Axis:
    size = shape_of(node)[dim]
    if is_whole(axis):
        return spatial(node, dim, size, along)
    return other(node, dim, size, "an op on images is applied to flattened tokens")


def image_axis(axis: Axis) -> Factor | None:
    """The axis of an image that a dim may be; with features behind it, these are its pixels, as patches hold them."""
    if not axis.factors:
        return None
    first, *rest = axis.factors
    if rest and not (first.kind is Kind.SPATIAL and all(f.kind is Kind.OTHER for f in rest)):
        return None
    return None if first.kind is Kind.JOINED else first


def is_whole(axis: Axis) -> bool:
    """Whether a dim may be an axis of an image: it is not known to be several, or tokens and then several."""
    return not axis.factors or image_axis(axis) is not None


def alongs(axes: Sequence[Axis]) -> list[int]:
    """Which spatial axes some dims are: those that they were before, else as they stand."""
    leading = [image_axis(axis) for axis in axes]
    known = [f.along for f in leading if f is not None and f.kind in (Kind.SPATIAL, Kind.IMAGE)]
    if len(known) != len(axes) or len({*known}) != len(known):
        return [*range(len(axes))]
    if all(f is not None and f.kind is Kind.SPATIAL for f in leading):
        return known
    order = sorted(known)
    return [order.index(along) for along in known]


def _of_im2col(seen: Layouts, node: Node) -> Layout | None:
    """F.unfold: (b, c, h, w) becomes (b, c * kernel, places), the places row by row."""
    source, kernel, dilation, padding, stride = inputs(node)[:5]
    before, sizes = seen.layout(source), shape_of(node)
    if len(sizes) != 3 or not all(is_whole(axis) for axis in before[-2:]) or not all(k > 1 for k in kernel):
        return None
    factors = []
    for i, along in enumerate(alongs(before[-2:])):
        count = (shape_of(source)[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        factors.append(Factor((node, 2), Kind.SPATIAL, count, along, ((True, f"window {i}"),)))
    grid = tuple(f for f in factors if not is_one(f.size))
    places = Axis(grid, node) if same_size(math.prod(f.size for f in grid), sizes[2]) else None
    lost = other(node, 2, sizes[2], "the number of its windows is not understood")
    return (before[0], other(node, 1, sizes[1], "it holds features of pixels"), places or lost)


# ---- convolutions ----------------------------------------------------------------------------------------------------


def _of_convolution(seen: Layouts, node: Node) -> Layout | None:
    """Where it slides along a dim, that is spatial: its kernel is longer than 1 there, or along two other dims."""
    x, weight = inputs(node)[:2]
    kernel, rank = shape_of(weight)[2:], len(shape_of(node))
    if len(shape_of(x)) != rank or not all(isinstance(k, int) for k in kernel):
        return None
    first = rank - len(kernel)
    before = seen.layout(x)
    lead = [made_of(node, dim, axis) for dim, axis in enumerate(before[: first - 1])]
    made = [other(node, first - 1, shape_of(node)[first - 1], "a convolution makes it: it holds features")]
    num_slid = sum(k > 1 for k in kernel)
    for along, dim, k in zip(alongs(before[first:]), range(first, rank), kernel, strict=True):
        made.append(_slid(node, dim, before[dim], along, slides=k > 1 or num_slid > 1, before=shape_of(x)[dim]))
    return (*lead, *made)


def _slid(node: Node, dim: int, axis: Axis, along: int, *, slides: bool, before: Any) -> Axis:
    size, factor = shape_of(node)[dim], axis.single
    if not slides and same_size(size, before):
        return made_of(node, dim, axis)
    if (slides and is_whole(axis)) or (factor is not None and factor.kind is Kind.SPATIAL):
        return spatial(node, dim, size, along)
    if not slides and factor is not None and factor.kind is Kind.IMAGE:
        return axis_of(Factor((node, dim), Kind.IMAGE, size, factor.along))
    return other(node, dim, size, "a convolution slides along flattened tokens")


RESIZES: dict[object, int] = {
    aten.max_pool2d.default: 2,
    aten.avg_pool2d.default: 2,
    aten.adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.max_pool1d.default: 1,
    aten.adaptive_avg_pool1d.default: 1,
    **{
        getattr(aten, name).vec: 3 if "3d" in name or "trilinear" in name else 2
        for name in (
            "upsample_nearest2d",
            "_upsample_nearest_exact2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
            "_upsample_bilinear2d_aa",
            "_upsample_bicubic2d_aa",
            "upsample_nearest3d",
            "_upsample_nearest_exact3d",
            "upsample_trilinear3d",
        )
    },
}
"""Ops that change the sizes of an image, and how many spatial dims they have, the last."""

IMAGES: dict[object, Rule] = {
    **dict.fromkeys(
        (
            aten.constant_pad_nd.default,
            aten.pad.default,
            aten.reflection_pad2d.default,
            aten.replication_pad2d.default,
            aten.reflection_pad3d.default,
            aten.replication_pad3d.default,
        ),
        _of_pad,
    ),
    aten.roll.default: _of_roll,
    **dict.fromkeys(RESIZES, _of_resized),
    **dict.fromkeys((aten.pixel_unshuffle.default, aten.pixel_shuffle.default), _of_pixel_shuffle),
    aten.im2col.default: _of_im2col,
    **dict.fromkeys(
        (
            aten.conv1d.default,
            aten.conv1d.padding,
            aten.conv2d.default,
            aten.conv2d.padding,
            aten.conv3d.default,
            aten.conv3d.padding,
            aten.convolution.default,
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        ),
        _of_convolution,
    ),
}

IMAGE_PARTS: dict[object, PartRule] = {aten.max_pool2d_with_indices.default: _part_of_pool}
