"""Numbers known before anything runs: literals, and closed expressions of one element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.passes.capture.enclosed import given_value
from monarch_compile.passes.graph import FLOATS, aten, dtype_of, inputs, shape_of
from monarch_compile.passes.memory import is_written

DROPPED = -1e4
"""A score at or below this hides a key: exp() of it is 0 beside any visible score."""

IGNORED = 1e2
"""A constant this small, added to all scores, leaves hidden keys hidden."""


def constant_of(value: Any) -> float | None:
    """The value of a number, or of a closed expression of one element; None when it depends on an input."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if isinstance(value, float) or int(float(value)) == value else None
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        return _attribute_constant(value)
    if value.op == "placeholder":
        return constant_of(given_value(value))
    if value.op != "call_function" or not (value.target is FULL or shape_of(value) in ((), (1,))):
        return None
    if value.target is FULL:
        fill = inputs(value)[1]
        number = float(fill) if isinstance(fill, bool) else constant_of(fill)
    else:
        operands = [constant_of(a) for a in inputs(value) if isinstance(a, (Node, int, float))]
        rule = CONSTANT_OPS.get(value.target)
        number = rule(operands) if rule is not None and None not in operands else None
    return None if number is None or is_written(value) else held_by(number, dtype_of(value))


def held_by(number: float, dtype: torch.dtype | None) -> float | None:
    """What a tensor of a dtype makes of a number: rounded to the dtype; None where an int or bool would change it."""
    if dtype in FLOATS:
        return float(torch.tensor(number, dtype=dtype, device="cpu"))
    if dtype is None or dtype.is_floating_point or dtype.is_complex or not float(number).is_integer():
        return None
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return number if low <= number <= high else None


def _attribute_constant(value: Node) -> float | None:
    held = getattr(value.graph.owning_module, str(value.target), None)
    if not isinstance(held, torch.Tensor) or held.numel() != 1 or not str(value.target).startswith("_tensor_constant"):
        return None
    number = held.item()
    if is_written(value) or isinstance(number, complex):
        return None
    return float(number) if isinstance(number, bool) else constant_of(number)


FULL = aten.full.default

CONSTANT_OPS: dict[object, Callable[[list[Any]], float | None]] = {
    aten.lift_fresh_copy.default: lambda xs: xs[0],
    aten.clone.default: lambda xs: xs[0],
    aten.detach.default: lambda xs: xs[0],
    aten.detach_.default: lambda xs: xs[0],
    aten.alias.default: lambda xs: xs[0],
    aten.to.dtype: lambda xs: xs[0],
    aten.sqrt.default: lambda xs: math.sqrt(xs[0]) if xs[0] >= 0 else None,
    aten.rsqrt.default: lambda xs: xs[0] ** -0.5 if xs[0] > 0 else None,
    aten.reciprocal.default: lambda xs: 1 / xs[0] if xs[0] else None,
    aten.scalar_tensor.default: lambda xs: xs[0],
    aten.mul.Tensor: lambda xs: xs[0] * xs[1],
    aten.div.Tensor: lambda xs: xs[0] / xs[1] if xs[1] else None,
    aten.pow.Tensor_Scalar: lambda xs: xs[0] ** xs[1] if xs[0] > 0 else None,
}
