"""Causal queries that follow a cache of keys: where their blocks and summaries are."""

from __future__ import annotations

from typing import Any

import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention

SIZES_AFTER_CACHE = ("cached", "first_block", "num_row_blocks", "num_summaries")
"""What kernels of such queries are told at run time beside the lengths: see `sizes_after_cache`."""


def row_blocks_of(ir: MonarchAttention) -> str:
    """The size of a launch that counts the blocks which hold queries."""
    return "num_row_blocks" if ir.follows_cache else "num_blocks"


def sizes_after_cache(form: Form, seq_len_q: Any, seq_len_k: Any, num_blocks: Any) -> dict[str, Any]:
    """Sizes of a launch with the last `seq_len_q` queries of `seq_len_k` causal keys; they may be symbolic.

    cached: keys before the first query. first_block: the block that holds the first query outside of the prefix.
    num_row_blocks: blocks from there on. num_summaries: one of each block before, whose queries all count as 0, and
    one for each offset of the others.
    """
    cached = seq_len_k - seq_len_q
    start = cached - form.prefix
    start = max(start, 0) if isinstance(start, int) else torch.sym_max(start, 0)  # type: ignore[no-untyped-call]
    if form.pad == "pre":
        start = start + num_blocks * form.block_size - (seq_len_k - form.prefix)
    first_block = start // form.block_size
    num_row_blocks = num_blocks - first_block
    return {
        "cached": cached,
        "first_block": first_block,
        "num_row_blocks": num_row_blocks,
        "num_summaries": first_block + form.block_size * num_row_blocks,
    }


def blocks_of_rows(seq_len_q: Any, seq_len_k: Any, block_size: int) -> int | None:
    """The most blocks that hold queries, wherever they begin; None while a length is symbolic."""
    if not (isinstance(seq_len_q, int) and isinstance(seq_len_k, int)):
        return None
    return min(-(-seq_len_q // block_size) + 1, -(-seq_len_k // block_size))
