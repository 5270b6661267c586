"""DTensors: how the Monarch attention op may be sharded. torch.distributed is imported only once there is a DTensor."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from monarch_compile.attention.op import ATTENTION_OP


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor: there can be none before its module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


@cache
def shards_attention() -> bool:
    """Tell DTensor, once, how the op is sharded; False where this torch has no way to be told."""
    try:
        from torch.distributed.tensor.experimental import register_sharding

        register_sharding(ATTENTION_OP)(_shardings)
    except (ImportError, AttributeError):
        return False
    return True


def _shardings(q: Any, k: Any, v: Any, key_mask: Any, *options: Any) -> list[tuple[list[Any], list[Any]]]:
    """(placements of the output, placements of the inputs) along one dim of a mesh: attention is its own in each head.

    Query heads that share a key head have to stay with it: equal numbers of heads are split alike, others only where
    every part holds whole groups.
    """
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    found = [(whole, whole), (Shard(0), Shard(0))]  # of q, k, v and the output; of the key mask
    if q.shape[1] == k.shape[1] or k.shape[1] % q.mesh.size() == 0:
        found.append((Shard(1), whole))
    no_tensors = [None] * len(options)
    return [([own], [own, own, own, None if key_mask is None else of_mask, *no_tensors]) for own, of_mask in found]
