"""May a region be lowered? A table of checks; each refusal has a code, a reason and a node."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.passes.capture.enclosed import enclosing
from monarch_compile.passes.checks import CONTEXT, DEVICE, MUTATION, STRIDED, TRANSFORMED, Check, Found
from monarch_compile.passes.convolution.lower import lag_of, seq_len_of
from monarch_compile.passes.convolution.region import ConvolutionRegion
from monarch_compile.passes.convolution.scales import all_scales
from monarch_compile.passes.convolution.sizes import Sizes
from monarch_compile.passes.graph import FLOATS, dtype_of, value_of
from monarch_compile.passes.memory import sharing_is_seen, sharing_leaves
from monarch_compile.passes.safety import Order


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a region."""

    all: tuple[object, ...]

    @staticmethod
    def of(region: ConvolutionRegion) -> _Sizes:
        frame, ending = region.frame, region.ending
        lead = [frame.sizes[place] for place in (*frame.batch, *frame.channels)]
        lengths = [operand.size(frame.axis) for operand in (region.u, *region.filters)]
        lags = [lag_of(region, part) for part in region.parts]
        return _Sizes((*lead, *lengths, region.points, ending.length, *lags))


def _check_subclass(region: ConvolutionRegion, order: Order) -> Found:
    wrapped = [node for node in region.read if is_traceable_wrapper_subclass(value_of(node))]
    if not wrapped:
        return None
    kind = type(value_of(wrapped[0])).__name__
    return f"the convolution is of {kind}s, a tensor subclass whose kernels are its own", wrapped[0]


def _check_empty(region: ConvolutionRegion, order: Order) -> Found:
    shapes = [tuple(value_of(node).shape) for node in (*region.read, region.output)]
    if any(isinstance(size, int) and size == 0 for shape in shapes for size in shape):
        return "a tensor of the convolution is empty"
    return None


def _check_data_dependent(region: ConvolutionRegion, order: Order) -> Found:
    for size in _Sizes.of(region).all:
        if isinstance(size, torch.SymInt) and not size.node.has_hint():
            return f"the size {size} follows from data"
    return None


def _check_symbolic(region: ConvolutionRegion, order: Order) -> Found:
    sizes = Sizes(region.output, region.inside)
    for size in _Sizes.of(region).all:
        if isinstance(size, torch.SymInt) and not sizes.can_give(size):
            return f"the symbolic size {size} cannot be computed before the transforms"
    return None


def _check_cut(region: ConvolutionRegion, order: Order) -> Found:
    """An input longer than the transform is cut, which the operator's gradients do not know of."""
    length = seq_len_of(region)
    if isinstance(length, int) and isinstance(region.points, int):
        return None
    if not statically_known_true(length <= region.points):
        return f"the input, of {length} points, may be longer than the transform of {region.points}"
    return None


def _check_dtype(region: ConvolutionRegion, order: Order) -> Found:
    for node in (*region.read, region.output):
        if dtype_of(node) not in FLOATS:
            return f"dtype {dtype_of(node)}", node
    inputs = (region.u.node, *(operand.node for operand in region.filters))
    if region.dtype is torch.float64 and all(dtype_of(node) is not torch.float64 for node in inputs):
        return "the transforms are in float64, and neither the input nor a filter is", region.anchor
    return None


def _check_scale(region: ConvolutionRegion, order: Order) -> Found:
    if any(scale.power % 2 for scale in all_scales(region)):
        return f"a scale is a power of the square root of {region.points}, a symbolic size"
    return None


def _check_finite(region: ConvolutionRegion, order: Order) -> Found:
    found = [scale.number for scale in all_scales(region) if not math.isfinite(scale.number)]
    return f"it is scaled by {found[0]}" if found else None


def _check_sharing(region: ConvolutionRegion, order: Order) -> Found:
    """The result is contiguous, and may have been a part of another tensor: a reshape of it may copy or not."""
    if sharing_is_seen(region.output):
        return "a write reaches what may or may not be a view of the result, depending on its strides"
    if sharing_leaves(region.output):
        return "two results of the graph may or may not share memory, depending on the strides of the convolution's"
    return None


def _check_body(region: ConvolutionRegion, order: Order) -> Found:
    """What leaves the body of a higher-order op must lie in memory as the op expects, gaps included."""
    value = value_of(region.output)
    if enclosing(region.output.graph) is None or value.is_contiguous():
        return None
    return "it stands in the body of a higher-order op, and its result is a part of another tensor"


CHECKS = (
    Check("tensor_subclass", _check_subclass),
    TRANSFORMED,
    Check("empty", _check_empty),
    Check("data_dependent", _check_data_dependent),
    Check("symbolic_dims", _check_symbolic),
    Check("symbolic_dims", _check_cut),
    DEVICE,
    Check("dtype", _check_dtype),
    Check("scale_not_constant", _check_scale),
    Check("scale", _check_finite),
    MUTATION,
    Check("mutation", _check_sharing),
    CONTEXT,
    STRIDED,
    Check("in_body", _check_body),
)
