"""May a region be lowered? A table of checks; each refusal has a code, a reason and a node."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.passes.checks import CONTEXT, DEVICE, MUTATION, STRIDED, TRANSFORMED, Check, Found
from monarch_compile.passes.graph import FLOATS, dtype_of, value_of
from monarch_compile.passes.linear.region import BlockLinearRegion
from monarch_compile.passes.memory import sharing_is_seen, sharing_leaves
from monarch_compile.passes.safety import Order


def _check_subclass(region: BlockLinearRegion, order: Order) -> Found:
    wrapped = [node for node in region.read if is_traceable_wrapper_subclass(value_of(node))]
    if not wrapped:
        return None
    return f"it is of {type(value_of(wrapped[0])).__name__}s, a tensor subclass whose kernels are its own", wrapped[0]


def _check_empty(region: BlockLinearRegion, order: Order) -> Found:
    shapes = [tuple(value_of(node).shape) for node in (*region.read, region.output)]
    if any(isinstance(size, int) and size == 0 for shape in shapes for size in shape):
        return "a tensor of it is empty"
    return None


def _check_data_dependent(region: BlockLinearRegion, order: Order) -> Found:
    for size in region.token_sizes:
        if isinstance(size, torch.SymInt) and not size.node.has_hint():
            return f"the size {size} follows from data"
    return None


def _check_dtype(region: BlockLinearRegion, order: Order) -> Found:
    for node in (*region.read, region.output):
        if dtype_of(node) not in FLOATS:
            return f"dtype {dtype_of(node)}", node
    return None


def _check_sharing(region: BlockLinearRegion, order: Order) -> Found:
    """The result is contiguous, and may have had other strides: a reshape of it may copy or not."""
    if sharing_is_seen(region.output):
        return "a write reaches what may or may not be a view of the result, depending on its strides"
    if sharing_leaves(region.output):
        return "two results of the graph may or may not share memory, depending on the strides of the result"
    return None


CHECKS = (
    Check("tensor_subclass", _check_subclass),
    TRANSFORMED,
    Check("empty", _check_empty),
    Check("data_dependent", _check_data_dependent),
    DEVICE,
    Check("dtype", _check_dtype),
    MUTATION,
    Check("mutation", _check_sharing),
    CONTEXT,
    STRIDED,
)
