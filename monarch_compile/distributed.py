"""More than one GPU, on torch.distributed: attention over a sequence that lies on several ranks."""

from __future__ import annotations

from monarch_compile.attention.parallel.context import SequenceParallel, sequence_parallel

__all__ = ["SequenceParallel", "sequence_parallel"]
