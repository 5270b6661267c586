"""DTensors: how the operators of Monarch attention may be sharded.

torch.distributed is imported only once there is a DTensor.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from monarch_compile.attention.op import ATTENTION_BACKWARD_OP, ATTENTION_OP, ATTENTION_WITH_LSE_OP


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor: there can be none before its module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


@cache
def shards_attention() -> bool:
    """Tell DTensor, once, how the operators are sharded; False where this torch has no way to be told."""
    try:
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(ATTENTION_OP)(_shardings)
        register_sharding(ATTENTION_WITH_LSE_OP)(_shardings_with_lse)
        register_sharding(ATTENTION_BACKWARD_OP)(_shardings_of_gradients)
    except (ImportError, AttributeError):
        return False
    return True


def _splits(q: Any, k: Any) -> list[tuple[Any, Any]]:
    """(placement of q, k, v and the output, placement of the key mask) along one dim of a mesh: attention is its own in
    each head.

    Query heads that share a key head have to stay with it: equal numbers of heads are split alike, others only where
    every part holds whole groups.
    """
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    found = [(whole, whole), (Shard(0), Shard(0))]
    if q.shape[1] == k.shape[1] or k.shape[1] % q.mesh.size() == 0:
        found.append((Shard(1), whole))
    return found


Sharding = tuple[list[Any], list[Any]]
"""Placements of the outputs and of the inputs of an operator."""


def _shardings(q: Any, k: Any, v: Any, key_mask: Any, *options: Any) -> list[Sharding]:
    """Of `attention`."""
    no_tensors = [None] * len(options)
    return [
        ([own], [own, own, own, None if key_mask is None else of_mask, *no_tensors]) for own, of_mask in _splits(q, k)
    ]


def _shardings_with_lse(q: Any, k: Any, v: Any, key_mask: Any, *options: Any) -> list[Sharding]:
    """Of `attention_with_lse`: rows are dims 0 to 2 of both results."""
    return [([own, own], given) for (own,), given in _shardings(q, k, v, key_mask, *options)]


def _shardings_of_gradients(
    grad: Any, q: Any, k: Any, v: Any, key_mask: Any, output: Any, lse: Any, *options: Any
) -> list[Sharding]:
    """Of `attention_backward`: a bias gets a part of its gradient from each head."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    is_biased = key_mask is not None and key_mask.tensor_meta.dtype.is_floating_point
    no_tensors = [None] * len(options)
    found: list[Sharding] = []
    for own, of_mask in _splits(q, k):
        of_bias = Replicate() if not is_biased else Partial() if own == Shard(1) else of_mask
        given = [own] * 4 + [None if key_mask is None else of_mask] + [own] * 2
        found.append(([own, own, own, of_bias], [*given, *no_tensors]))
    return found
