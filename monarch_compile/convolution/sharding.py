"""DTensors: how the operators of long convolutions may be sharded.

A convolution is its own in each batch entry and each channel; along the sequence it is not.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from monarch_compile.convolution.op import GRADIENT_OPTIONS, OPTIONS, filter_gradient, long_convolution_twice
from monarch_compile.convolution.op import long_convolution as convolution

Sharding = tuple[list[Any], list[Any]]
"""Placements of the outputs and of the inputs of an operator."""


@cache
def register() -> bool:
    """Tell DTensor, once, how the operators are sharded; False where this torch has no way to be told."""
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return False
    ops: Any = (convolution, long_convolution_twice, filter_gradient)
    for op, rule in zip(ops, (_shardings, _shardings_of_two, _shardings_of_gradient), strict=True):
        register_sharding(op._opoverload)(rule)
    return True


def _splits() -> list[tuple[Any, Any, Any]]:
    """(placement of what has batch and channels, of what has channels, of sums over the batch)."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()
    return [(whole, whole, whole), (Shard(0), whole, Partial()), (Shard(1), Shard(0), Shard(0))]


def _if_given(tensor: Any, placement: Any) -> Any:
    return None if tensor is None else placement


def _shardings(u: Any, filter: Any, skip: Any, pre_gate: Any, post_gate: Any, *options: Any) -> list[Sharding]:
    """Of `long_convolution`."""
    none = [None] * len(OPTIONS)
    return [
        (
            [rows],
            [rows, channels, _if_given(skip, channels), _if_given(pre_gate, rows), _if_given(post_gate, rows), *none],
        )
        for rows, channels, _ in _splits()
    ]


def _shardings_of_two(u: Any, filter: Any, skip: Any, pre_gate: Any, *gates_and_options: Any) -> list[Sharding]:
    """Of `long_convolution_twice`."""
    none = [None] * len(OPTIONS)
    return [
        ([rows, rows], [rows, channels, _if_given(skip, channels), _if_given(pre_gate, rows), rows, rows, *none])
        for rows, channels, _ in _splits()
    ]


def _shardings_of_gradient(grad: Any, u: Any, pre_gate: Any, post_gate: Any, *options: Any) -> list[Sharding]:
    """Of `filter_gradient`: sums over the batch."""
    none = [None] * len(GRADIENT_OPTIONS)
    return [
        ([summed, summed], [rows, rows, _if_given(pre_gate, rows), _if_given(post_gate, rows), *none])
        for rows, _, summed in _splits()
    ]
