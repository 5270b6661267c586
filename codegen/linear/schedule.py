"""How the kernel of a Monarch linear is tiled: a frozen value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from monarch_compile.codegen.tiling import DTYPE_BYTES, MIN_TILE, Capability, Tiling, padded
from monarch_compile.errors import CodegenError
from monarch_compile.ir import DTYPE_NAMES
from monarch_compile.linear.ir import MONARCH, BlockLinear

MOST_RANK = 256
"""Of a block: what is between the factors is kept in registers, for a tile of tokens."""
USUAL_TOKENS = 1024
"""What an unknown number of tokens is taken for."""


@dataclass(frozen=True)
class Schedule:
    """The tiling of the one kernel.

    main: rows are tokens, step is how many features of an input block are multiplied at a time.
    columns: features of an output block that a program gives.
    """

    family: ClassVar[str] = "linear"

    main: Tiling
    columns: int

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "main", self.main

    def __str__(self) -> str:
        return f"main={self.main} columns={self.columns}"


def in_width(ir: BlockLinear) -> int:
    """Features of an input block."""
    return ir.in_features // ir.in_blocks


def out_width(ir: BlockLinear) -> int:
    """Features of an output block."""
    return ir.out_features // ir.out_blocks


def check_supported(ir: BlockLinear) -> None:
    """Raise CodegenError where no kernel exists for `ir`."""
    if ir.kind != MONARCH:
        raise CodegenError(f"there is a kernel for Monarch alone; found {ir}")
    if ir.dtype not in DTYPE_BYTES:
        raise CodegenError(f"kernels are for {', '.join(DTYPE_NAMES[d] for d in DTYPE_BYTES)}; found {ir}")
    if ir.rank > MOST_RANK:
        raise CodegenError(f"kernels are for blocks of rank at most {MOST_RANK}; found {ir}")


def choose_schedule(ir: BlockLinear, capability: Capability | None = None) -> Schedule:
    """The schedule without tuning; none was timed.

    Raises:
        CodegenError: no kernel exists.
    """
    check_supported(ir)
    tokens = ir.tokens if isinstance(ir.tokens, int) else USUAL_TOKENS
    is_half = ir.dtype.itemsize == 2
    rows = min(padded(tokens), 64 if is_half else 32)
    step = min(padded(in_width(ir)), 64 if is_half else 32)
    columns = min(padded(out_width(ir)), 256 if is_half and padded(ir.rank) <= 64 else 64)
    return Schedule(Tiling(rows, step, 8 if rows * columns >= 64 * 128 else 4, 2), columns)


def check_schedule(schedule: Schedule, ir: BlockLinear) -> None:
    """Raise CodegenError where `schedule` is outside of what `ir` allows."""
    columns = schedule.columns
    if columns < MIN_TILE or columns & (columns - 1) or columns > padded(out_width(ir)):
        raise CodegenError(
            f"columns must be a power of two from {MIN_TILE} to {padded(out_width(ir))}; found {schedule}"
        )
    if schedule.main.step > padded(in_width(ir)):
        raise CodegenError(f"a step must be at most {padded(in_width(ir))}; found {schedule}")
    if schedule.main.turns != 1:
        raise CodegenError(f"a program has one tile; found {schedule}")


def is_made_for(schedule: Schedule, ir: BlockLinear) -> bool:
    """Whether a schedule, as a file may hold it, is for `ir`."""
    try:
        check_schedule(schedule, ir)
    except CodegenError:
        return False
    return True


def read_schedule(fields: Mapping[str, Any]) -> Schedule:
    """The inverse of `dataclasses.asdict`."""
    return Schedule(Tiling(**fields["main"]), int(fields["columns"]))


def shared_bytes(tiling: Tiling, ir: BlockLinear) -> int:
    """Shared memory of one program, an upper estimate: the tiles of x and of the first factor, for each stage."""
    size = DTYPE_BYTES.get(ir.dtype, torch.float32.itemsize)
    return size * tiling.num_stages * tiling.step * (tiling.rows + padded(ir.rank))


def describe(ir: BlockLinear) -> str:
    """What a tuned schedule depends on."""
    shape = f"{ir.in_features}->{ir.out_features} blocks {ir.in_blocks}x{ir.out_blocks} rank {ir.rank}"
    return f"linear {DTYPE_NAMES[ir.dtype]} {shape} | tokens {ir.tokens}"
