"""What of the sizes and strides of a launch lets its kernels do with less: no masks, 32-bit offsets, whole vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.codegen.tiling import DTYPE_BYTES

MAX_POSITION = 2**31 - 1
"""Sizes and positions in a sequence are 32-bit numbers in the kernels, unless `wide_offsets` says otherwise."""

PITCH_MULTIPLE = 16
"""Rows of the intermediates are padded to this many elements, so that they load as whole aligned vectors."""

STRIDED_ROWS = ("q", "k", "v", "rows", "dz", "z")
"""Tensors of rows that the caller laid out: `Specialization.stride_multiple` is of their strides but the last."""


@dataclass(frozen=True)
class Specialization:
    """What of the sizes and strides may be expected when kernels are launched; at first the worst of each.

    partial_block: whether the sequence, or an axis of the grid, may end inside a block.
    partial_tile: whether the number of blocks may be no multiple of the tiles that cover blocks.
    wide_offsets: whether offsets within one sequence, or one head's summaries, may need 64 bits.
    stride_multiple: a number of elements that divides the strides of `STRIDED_ROWS`: a power of two, at most a vector
        of 16 bytes. 1 where it need not be said, because Triton sees multiples of `SEEN_MULTIPLE` by itself.
    """

    partial_block: bool = True
    partial_tile: bool = True
    wide_offsets: bool = True
    stride_multiple: int = 1

    def __str__(self) -> str:
        said = {True: "yes", False: "no"}
        return " ".join(f"{k}={said[v] if isinstance(v, bool) else v}" for k, v in asdict(self).items())


UNKNOWN = Specialization()


class CoversBlocks(Protocol):
    """A schedule of kernels of attention."""

    @property
    def sizes_over_blocks(self) -> tuple[int, ...]:
        """The tiles that cover blocks."""


VECTOR_BYTES = 16
"""The most that one thread loads at once."""

SEEN_MULTIPLE = 16
"""Triton sees by itself whether a stride is a multiple of this, and of nothing less."""


def pitch(size: int) -> int:
    """Elements from one row of an intermediate to the next."""
    return -(-size // PITCH_MULTIPLE) * PITCH_MULTIPLE


def sees_strides(head_dim: int, value_dim: int) -> bool:
    """Whether Triton sees by itself that the strides of rows of these sizes, side by side, are whole vectors."""
    return head_dim % SEEN_MULTIPLE == value_dim % SEEN_MULTIPLE == 0


def specialization_of(
    num_blocks: Any,
    sides: Sequence[tuple[Any, Any]],
    schedule: CoversBlocks,
    reaches: Sequence[Any],
    stride_multiple: int = 1,
) -> Specialization:
    """The specialization of a launch; symbolic numbers leave the worst case.

    sides: tokens of the queries and of the keys, or along each axis of a grid, each with the places that blocks have
    for them. reaches: elements between the first and the last place that a kernel reads or writes from one 64-bit
    address.
    """
    partial_block = not all(_known(*side) and side[0] == side[1] for side in sides)
    partial_tile = not _known(num_blocks) or not num_blocks
    partial_tile = partial_tile or any(num_blocks % size for size in schedule.sizes_over_blocks)
    wide_offsets = not _known(*reaches) or max(reaches) > MAX_POSITION
    return Specialization(partial_block, partial_tile, wide_offsets, stride_multiple)


def stride_multiple_of(head_dim: int, value_dim: int, dtype: torch.dtype, strides: Sequence[Any]) -> int:
    """`Specialization.stride_multiple` of some strides; of symbolic ones as far as it is known without a guard."""
    multiple = 1 if sees_strides(head_dim, value_dim) else VECTOR_BYTES // DTYPE_BYTES[dtype]
    while multiple > 1 and not all(_divides(multiple, stride) for stride in strides):
        multiple //= 2
    return multiple


def specialize(
    ir: MonarchAttention, schedule: CoversBlocks, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]
) -> Specialization:
    """What holds of these tensors and sizes; nothing is asked of symbolic ones, which would add guards."""
    num_blocks, block_q, prefix = sizes["num_blocks"], sizes["block_q"], ir.form.prefix
    row = max(pitch(ir.head_dim), pitch(ir.value_dim))
    output = sizes["seq_len_q"] * sizes["num_heads"] * max(ir.head_dim, ir.value_dim)
    reaches = [(sizes["num_summaries"] if ir.follows_cache else block_q * num_blocks) * row, output]
    for name, tensor in tensors.items():
        within_head = 1 if name == "key_mask" else 2  # the dims before are addressed by 64 bits
        dims = zip(tensor.shape[within_head:], tensor.stride()[within_head:], strict=True)
        reaches.append(sum(size * stride for size, stride in dims))
    if ir.form.tile is None:
        sides = [(sizes["seq_len_k"] - prefix, num_blocks * ir.form.block_size)]
        if not ir.follows_cache:
            sides.append((sizes["seq_len_q"] - prefix, num_blocks * block_q))
    else:
        tiled = enumerate(ir.form.tile)
        sides = [(sizes[f"grid_{axis}"], sizes[f"counts_{axis}"] * extent) for axis, extent in tiled]
    blocks = None if ir.follows_cache else num_blocks  # their queries begin anywhere
    return specialization_of(blocks, sides, schedule, reaches, _stride_multiple(ir, tensors))


def _stride_multiple(ir: MonarchAttention, tensors: Mapping[str, Tensor]) -> int:
    if sees_strides(ir.head_dim, ir.value_dim):
        return 1
    rows = (tensors[name] for name in STRIDED_ROWS if name in tensors)
    strides = [stride for tensor in rows for stride in tensor.stride()[:-1]]
    return stride_multiple_of(ir.head_dim, ir.value_dim, ir.dtype, strides)


def expected(ir: MonarchAttention, schedule: CoversBlocks) -> Specialization:
    """That of a launch of `ir` on tensors that one projection gave, as far as its sizes are known."""
    sides: list[tuple[Any, Any]] = []
    if ir.form.tile is not None:
        pairs = zip(ir.grid or (), ir.form.tile, strict=True)
        sides = [(n, -(-n // extent) * extent if isinstance(n, int) else None) for n, extent in pairs]
    else:
        of_queries = () if ir.follows_cache else ((ir.seq_len_q, ir.block_size_q),)
        for length, size in (*of_queries, (ir.seq_len_k, ir.form.block_size)):
            places = None if size is None or ir.num_blocks is None else ir.num_blocks * size
            sides.append((length - ir.form.prefix if isinstance(length, int) else None, places))
    reach: Any = None
    length = ir.seq_len_k if ir.follows_cache else ir.seq_len_q
    if isinstance(length, int) and isinstance(ir.num_heads, int) and isinstance(ir.num_kv_heads, int):
        reach = length * (ir.num_heads + 2 * ir.num_kv_heads) * ir.head_dim
    multiple = stride_multiple_of(ir.head_dim, ir.value_dim, ir.dtype, (ir.head_dim, ir.value_dim))
    blocks = None if ir.follows_cache else ir.num_blocks
    return specialization_of(blocks, sides, schedule, (reach,), multiple)


def _divides(number: int, stride: Any) -> bool:
    """Whether every value that a stride may have is a multiple of `number`."""
    return is_known_to_be(stride % number, 0)


def is_known_to_be(value: Any, number: int) -> bool:
    """Whether a size or a stride is `number`, as far as it is known without a guard."""
    if isinstance(value, int):
        return value == number
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(value == number))


def _known(*numbers: Any) -> bool:
    return all(isinstance(number, int) for number in numbers)
