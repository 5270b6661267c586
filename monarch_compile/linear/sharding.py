"""DTensors: how the operator of block linears may be sharded: by tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

from monarch_compile.linear.op import LINEAR_OP, OPTIONS


@cache
def register() -> bool:
    """Tell DTensor, once, how the operator is sharded; False where this torch has no way to be told."""
    try:
        from torch.distributed.tensor.experimental import register_sharding
    except ImportError:
        return False
    register_sharding(LINEAR_OP)(_shardings)
    return True


def _shardings(
    x: Any, first: Any, second: Any, coupling: Any, bias: Any, *options: Any
) -> list[tuple[list[Any], list[Any]]]:
    """Of `block_linear`: any dim but that of the features, with whole factors."""
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    optional = [None if tensor is None else whole for tensor in (coupling, bias)]
    none = [None] * len(OPTIONS)
    rows = [whole, *map(Shard, range(len(x.shape) - 1))]
    return [([own], [own, whole, whole, *optional, *none]) for own in rows]
