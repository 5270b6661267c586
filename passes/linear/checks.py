"""May a region be lowered? A table of checks; each refusal has a code, a reason and a node."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.calls import active_transform
from monarch_compile.passes.graph import FLOATS, dtype_of, value_of
from monarch_compile.passes.linear.region import BlockLinearRegion
from monarch_compile.passes.memory import sharing_is_seen, sharing_leaves
from monarch_compile.passes.safety import Footprint, Order, mode_switch, strided_read, write_between
from monarch_compile.refusal import Refusal

Found = str | tuple[str, Node] | None


class Check(NamedTuple):
    """`refuse` returns None, or the reason (and the culprit, else the region's output)."""

    code: str
    refuse: Callable[[BlockLinearRegion, Order], Found]


def first_refusal(region: BlockLinearRegion) -> Refusal | None:
    """The first check that refuses the region."""
    order = Order.of(region.output.graph)
    for check in CHECKS:
        found = check.refuse(region, order)
        if found is not None:
            reason, node = found if isinstance(found, tuple) else (found, region.output)
            return Refusal(check.code, reason, node)
    return None


def _check_subclass(region: BlockLinearRegion, order: Order) -> Found:
    wrapped = [node for node in region.read if is_traceable_wrapper_subclass(value_of(node))]
    if not wrapped:
        return None
    return f"it is of {type(value_of(wrapped[0])).__name__}s, a tensor subclass whose kernels are its own", wrapped[0]


def _check_transformed(region: BlockLinearRegion, order: Order) -> Found:
    transform = active_transform()
    return f"it is called inside of {transform}" if transform else None


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


def _check_device(region: BlockLinearRegion, order: Order) -> Found:
    devices = sorted({str(value_of(node).device) for node in region.read})
    return f"its tensors are on {', '.join(devices)}" if len(devices) > 1 else None


def _check_dtype(region: BlockLinearRegion, order: Order) -> Found:
    for node in (*region.read, region.output):
        if dtype_of(node) not in FLOATS:
            return f"dtype {dtype_of(node)}", node
    return None


def _footprint(region: BlockLinearRegion) -> Footprint:
    return Footprint(region.output, region.inside, region.read)


def _check_mutation(region: BlockLinearRegion, order: Order) -> Found:
    return write_between(_footprint(region), order)


def _check_sharing(region: BlockLinearRegion, order: Order) -> Found:
    """The result is contiguous, and may have had other strides: a reshape of it may copy or not."""
    if sharing_is_seen(region.output):
        return "a write reaches what may or may not be a view of the result, depending on its strides"
    if sharing_leaves(region.output):
        return "two results of the graph may or may not share memory, depending on the strides of the result"
    return None


def _check_context(region: BlockLinearRegion, order: Order) -> Found:
    return mode_switch(_footprint(region), order)


def _check_strided(region: BlockLinearRegion, order: Order) -> Found:
    return strided_read(_footprint(region))


CHECKS = (
    Check("tensor_subclass", _check_subclass),
    Check("transformed", _check_transformed),
    Check("empty", _check_empty),
    Check("data_dependent", _check_data_dependent),
    Check("device", _check_device),
    Check("dtype", _check_dtype),
    Check("mutation", _check_mutation),
    Check("mutation", _check_sharing),
    Check("context", _check_context),
    Check("as_strided", _check_strided),
)
