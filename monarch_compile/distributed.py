"""More than one GPU, on torch.distributed: attention over a sequence that lies on several ranks, and operators on
DTensors."""

from __future__ import annotations

from monarch_compile.attention.parallel.context import SequenceParallel, sequence_parallel

__all__ = ["SequenceParallel", "register_shardings", "sequence_parallel"]


def register_shardings() -> bool:
    """Tell DTensor how every operator of monarch_compile may be sharded: attention by batch and heads, long
    convolutions by batch and channels, block linears by tokens.

    Compiled attention on DTensors needs no such call. False where this torch has no way to be told.
    """
    from monarch_compile.attention.sharding import shards_attention
    from monarch_compile.convolution import sharding as convolution
    from monarch_compile.linear import sharding as linear

    return all([shards_attention(), convolution.register(), linear.register()])
