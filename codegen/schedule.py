"""How the kernels of one IR are tiled: a frozen value, chosen from a small table tuned by hand.

Letters: j offset of a query in its block, i offset of a key in its block, l block of queries, b block of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from monarch_compile.errors import CodegenError
from monarch_compile.ir import PAPER, MonarchAttention

DOT_PRECISIONS = ("ieee", "tf32x3")
MIN_TILE = 16  # the least size of a tl.dot operand on every tensor core generation we emit for
MAX_HEAD_DIM = 256
DTYPE_BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
SHARED_LIMITS = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227}
"""Shared memory that one program may use, in KiB, by compute capability."""
DEFAULT_SHARED_LIMIT = 99
WARP_SCORES = 512
"""Scores of a tile that are worth a warp."""
WARP_ACCUMULATORS = {2: 2048, 4: 1024}
"""Accumulators that a warp holds without spilling, by bytes of an operand (tf32x3 keeps each operand in two parts)."""

TUNED_ON = ("H200",)
"""Parts of the names of the GPUs that the tables below were tuned on."""

NEAR_STEP = 64
"""The largest step of the exact groups: more takes registers and shared memory that other programs could use."""


@dataclass(frozen=True)
class Tiling:
    """The tiling of one kernel: it owns `rows` output rows and streams over its reduction `step` at a time."""

    rows: int
    step: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for size in (self.rows, self.step):
            if size < MIN_TILE or size & (size - 1):
                raise CodegenError(f"a tile must be a power of two of at least {MIN_TILE}; found {size} in {self}")
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1:
            raise CodegenError(f"a kernel needs 1, 2, 4, 8 or 16 warps and at least 1 stage; found {self}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.step}/w{self.num_warps}/s{self.num_stages}"


@dataclass(frozen=True)
class Schedule:
    """The tilings of every kernel of one IR.

    summarize: rows j, step i (stage 1: what a block of keys says to the queries of each offset).
    attend: rows l, step b (stage 2: attention over the block summaries).
    represent: rows b, step l (between iterations: the query that stands for a block's readers; also the mean start).
    near: rows j, step i (what the exact groups say to each query); None where there are none.
    fused: whether the exact groups are part of stage 1, whose queries must be the sequence's own (`can_fuse`);
        they then share all of its tiling but the step. Else they have a kernel of their own.
    whole: whether stage 2 meets all blocks in one step, without a loop: there are at most `attend.step` of them.
    dot_precision: how float32 products are formed, "ieee" or "tf32x3"; 16-bit products are exact either way.
    """

    summarize: Tiling
    attend: Tiling
    represent: Tiling
    dot_precision: str = "tf32x3"
    near: Tiling | None = None
    fused: bool = True
    whole: bool = False

    def __post_init__(self) -> None:
        if self.dot_precision not in DOT_PRECISIONS:
            raise CodegenError(f"dot_precision must be one of {DOT_PRECISIONS}; found {self.dot_precision!r}")

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "summarize", self.summarize
        yield "attend", self.attend
        yield "represent", self.represent
        if self.near is not None:
            yield "near", self.near

    def __str__(self) -> str:
        tilings = " ".join(f"{name}={tiling}" for name, tiling in self.tilings())
        place = "" if self.near is None else " fused" if self.fused else " apart"
        return f"{tilings}{place}{' whole' if self.whole else ''} dot={self.dot_precision}"


# (bytes of an element, largest padded head or value dim) -> tilings, each tile already the largest worth trying. The
# rows of 16-bit elements and dims to 64 and to 128 were chosen from benchmarks/results/h200_sweep.json and
# h200_tilings.json, the others from registers.
TABLE: dict[tuple[int, int], Schedule] = {
    (2, 64): Schedule(Tiling(64, 128, 4, 2), Tiling(128, 64, 4, 3), Tiling(64, 64, 4, 2)),
    (2, 128): Schedule(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 2)),
    (2, 256): Schedule(Tiling(64, 16, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2)),
    (4, 64): Schedule(Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2)),
    (4, 128): Schedule(Tiling(32, 32, 8, 2), Tiling(32, 32, 8, 2), Tiling(32, 32, 8, 2)),
    (4, 256): Schedule(Tiling(16, 16, 8, 1), Tiling(16, 16, 8, 1), Tiling(16, 16, 8, 1)),
}


WHOLE_BLOCKS = {(2, 64): 128}
"""The most blocks that stage 2 meets in one step, by the key of `TABLE`; where nothing stands, its table decides."""
WHOLE_ROWS = 64


class NearRow(NamedTuple):
    """Tilings with exact groups, for blocks of at most `block_size` keys and for at most `num_blocks` blocks."""

    block_size: float
    num_blocks: float
    schedule: Schedule


_LATER = Tiling(64, 64, 4, 2)
NEAR_TABLE: dict[tuple[int, int], tuple[NearRow, ...]] = {
    (2, 64): (
        NearRow(64, 256, Schedule(Tiling(64, 64, 4, 1), Tiling(64, 64, 4, 1), _LATER)),
        NearRow(64, math.inf, Schedule(Tiling(64, 64, 4, 2), Tiling(64, 64, 4, 2), _LATER)),
        NearRow(math.inf, math.inf, Schedule(Tiling(64, 64, 4, 3), Tiling(128, 64, 4, 3), _LATER)),
    ),
    (2, 256): (
        NearRow(math.inf, math.inf, Schedule(Tiling(32, 32, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2))),
    ),
}
"""What stands in for `TABLE` with exact groups, whose registers would spill; the first row that fits. Those of 16-bit
elements and dims to 64 were tuned on an H200 (benchmarks/results/h200_window_sweep.json and h200_tilings.json), the
other from registers."""


def choose_schedule(ir: MonarchAttention, capability: tuple[int, int] | None = None) -> Schedule:
    """The schedule for `ir` on a device of compute `capability` (None: the smallest shared memory we emit for).

    Raises:
        CodegenError: no kernel exists for the dtype or the head size.
    """
    check_supported(ir)
    width = max(64, padded(ir.head_dim), padded(ir.value_dim))
    key = (DTYPE_BYTES[ir.dtype], width)
    blocks = ir.num_blocks
    rows = () if ir.exact == PAPER else NEAR_TABLE.get(key, ())
    fits = (r.schedule for r in rows if ir.block_size <= r.block_size and (blocks or math.inf) <= r.num_blocks)
    best = next(fits, TABLE[key])
    if blocks is not None and blocks <= WHOLE_BLOCKS.get(key, 0):
        best = replace(best, attend=Tiling(WHOLE_ROWS, padded(blocks), best.attend.num_warps, 1))
    limit = shared_limit(capability)
    fitted = Schedule(
        _fit(best.summarize, ir, ir.block_size_q, ir.block_size),
        _fit(best.attend, ir, blocks, blocks),
        _fit(best.represent, ir, blocks, blocks),
        best.dot_precision,
    )
    within: dict[str, Any] = {name: _within(tiling, ir, limit) for name, tiling in fitted.tilings()}
    whole = blocks is not None and blocks <= within["attend"].step
    schedule = replace(fitted, **within, whole=whole)
    if ir.exact == PAPER:
        return schedule
    return replace(schedule, near=_near(schedule.summarize, best, ir, limit), fused=can_fuse(ir))


def can_fuse(ir: MonarchAttention) -> bool:
    """Whether stage 1 meets every query together with its own block: one iteration from the identity start."""
    return ir.num_iters == 1 and ir.init == "identity"


def shared_limit(capability: tuple[int, int] | None) -> int:
    """Bytes of shared memory that one program may use."""
    return 1024 * SHARED_LIMITS.get(capability or (0, 0), DEFAULT_SHARED_LIMIT)


def padded(size: int) -> int:
    """`size` as a tile of tl.dot sees it: the next power of two, at least 16."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())


def shared_bytes(tiling: Tiling, ir: MonarchAttention) -> int:
    """An upper estimate of the shared memory of one program: its rows, its weights, and every stage of its stream."""
    head, value, size = padded(ir.head_dim), padded(ir.value_dim), DTYPE_BYTES[ir.dtype]
    rows = tiling.rows * (head + tiling.step)
    return size * (rows + tiling.num_stages * tiling.step * (head + value)) + 1024


def check_supported(ir: MonarchAttention) -> None:
    """Raise CodegenError where no kernel exists for `ir`, whatever the schedule."""
    if ir.dtype not in DTYPE_BYTES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_BYTES)
        raise CodegenError(f"no kernel for {ir.dtype}: it falls back to the reference; kernels exist for {allowed}")
    for name, size in (("head_dim", ir.head_dim), ("value_dim", ir.value_dim)):
        if size > MAX_HEAD_DIM:
            raise CodegenError(f"no kernel for {name}={size}: it falls back to the reference; at most {MAX_HEAD_DIM}")
    if ir.is_cross and ir.exact != PAPER:
        raise CodegenError(f"no kernel for a window or a prefix where seq_len_q != seq_len_k; found {ir}")
    if ir.is_causal:
        raise CodegenError(f"no kernel for causal attention; found {ir}")


def _fit(tiling: Tiling, ir: MonarchAttention, num_rows: int | None, num_steps: int | None) -> Tiling:
    """Tiles no larger than what their two sides cover (None: unknown), and warps that still have work."""
    rows, step = tiling.rows, tiling.step
    if num_rows is not None:
        rows = min(rows, padded(num_rows))
    if num_steps is not None:
        sizes = [size for size in (step, step // 2) if size >= MIN_TILE]
        least_waste = min(sizes, key=lambda size: (-(-num_steps // size) * size, -size))
        step = min(least_waste, padded(num_steps))
    accumulators = rows * (padded(ir.head_dim) + padded(ir.value_dim))
    useful = max(1, rows * step // WARP_SCORES, accumulators // WARP_ACCUMULATORS[DTYPE_BYTES[ir.dtype]])
    return replace(tiling, rows=rows, step=step, num_warps=min(tiling.num_warps, 1 << (useful - 1).bit_length()))


def _near(summarize: Tiling, best: Schedule, ir: MonarchAttention, limit: int) -> Tiling:
    """The tiling of the exact groups: that of stage 1, of which they may be a part, with a step of their own."""
    keys = ir.exact.prefix if ir.exact.window is None else 2 * max(ir.exact.window, 1) * ir.block_size
    near = replace(summarize, step=min(NEAR_STEP, _fit(best.summarize, ir, keys, keys).step))
    while shared_bytes(near, ir) > limit:
        near = replace(near, step=near.step // 2)
    return near


def _within(tiling: Tiling, ir: MonarchAttention, limit: int) -> Tiling:
    """`tiling` with fewer stages, then smaller steps, until its shared memory is under `limit` bytes."""
    while shared_bytes(tiling, ir) > limit:
        if tiling.num_stages > 1:
            tiling = replace(tiling, num_stages=tiling.num_stages - 1)
        elif tiling.step > MIN_TILE:
            tiling = replace(tiling, step=tiling.step // 2)
        else:
            raise CodegenError(f"no tiling of {ir} fits {limit} bytes of shared memory")
    return tiling
