"""What of the sizes and strides of a launch lets its kernels do with less: no masks, short places, whole vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from monarch_compile.codegen.schedule import DTYPE_BYTES, Schedule
from monarch_compile.ir import MonarchAttention

MAX_POSITION = 2**31 - 1
"""Sizes and places in a sequence are 32-bit numbers in the kernels, unless they are said to be wide."""


@dataclass(frozen=True)
class Facts:
    """What of the sizes and strides may be expected when kernels are launched; at first the worst of each.

    cut: whether the sequence may end inside a block.
    rest: whether the number of blocks may be no multiple of the tiles that cover blocks.
    wide: whether places within one sequence, or one head's summaries, may need 64 bits.
    apart: a number of elements that divides the strides of q, k, v and exact rows: a power of two, at most a vector of
        16 bytes. 1 where it need not be said, for Triton sees strides of whole `SEEN_APART`.
    """

    cut: bool = True
    rest: bool = True
    wide: bool = True
    apart: int = 1

    def __str__(self) -> str:
        said = {True: "yes", False: "no"}
        return " ".join(f"{k}={said[v] if isinstance(v, bool) else v}" for k, v in asdict(self).items())


UNKNOWN = Facts()

VECTOR_BYTES = 16
"""The most that one thread loads at once."""

SEEN_APART = 16
"""Triton sees by itself whether a stride is a multiple of this, and of nothing less."""


def sees_strides(head_dim: int, value_dim: int) -> bool:
    """Whether Triton sees by itself that rows of these sizes, side by side, are whole vectors apart."""
    return head_dim % SEEN_APART == value_dim % SEEN_APART == 0


def facts_of(
    num_blocks: Any,
    queries: tuple[Any, Any],
    keys: tuple[Any, Any],
    schedule: Schedule,
    reaches: Sequence[Any],
    apart: int = 1,
) -> Facts:
    """The facts of a launch. queries, keys: how many, and how many to a block. reaches: elements that lie between the
    first and the last place that a kernel goes to from one 64-bit address. Symbolic numbers tell nothing.
    """
    pairs = (queries, keys)
    cut = not all(_known(num_blocks, *pair) and pair[0] == num_blocks * pair[1] for pair in pairs)
    sizes = [size for tiling in (schedule.attend, schedule.represent) for size in (tiling.rows, tiling.step)]
    rest = not _known(num_blocks) or not num_blocks or any(num_blocks % size for size in sizes)
    wide = not _known(*reaches) or max(reaches) > MAX_POSITION
    return Facts(cut, rest, wide, apart)


def apart_of(head_dim: int, value_dim: int, dtype: torch.dtype, strides: Sequence[Any]) -> int:
    """`Facts.apart` of the strides of q, k and v; of symbolic ones as far as it is known without a guard."""
    apart = 1 if sees_strides(head_dim, value_dim) else VECTOR_BYTES // DTYPE_BYTES[dtype]
    while apart > 1 and not all(_divides(apart, stride) for stride in strides):
        apart //= 2
    return apart


def _divides(number: int, stride: Any) -> bool:
    """Whether every value that a stride may have is a multiple of `number`."""
    if isinstance(stride, int):
        return stride % number == 0
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(stride % number == 0))


def expected_facts(ir: MonarchAttention, schedule: Schedule) -> Facts:
    """The facts of a launch of `ir` on tensors that one projection gave, as far as its sizes are known."""
    prefix = ir.form.prefix
    after = [n - prefix if isinstance(n, int) else n for n in (ir.seq_len_q, ir.seq_len_k)]
    queries, keys = (after[0], ir.block_size_q), (after[1], ir.form.block_size)
    reach: Any = None
    if isinstance(ir.seq_len_q, int) and isinstance(ir.num_heads, int) and isinstance(ir.num_kv_heads, int):
        reach = ir.seq_len_q * (ir.num_heads + 2 * ir.num_kv_heads) * ir.head_dim
    apart = apart_of(ir.head_dim, ir.value_dim, ir.dtype, (ir.head_dim, ir.value_dim))
    return facts_of(ir.num_blocks, queries, keys, schedule, (reach,), apart)


def _known(*numbers: Any) -> bool:
    return all(isinstance(number, int) for number in numbers)
