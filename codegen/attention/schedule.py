"""How the kernels of one IR are tiled: a frozen value, chosen from a small table tuned by hand.

Letters: j offset of a query in its block, i offset of a key in its block, l block of queries, b block of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from monarch_compile.attention.blocking import along_axes
from monarch_compile.attention.ir import MAX_HEAD_DIM, MonarchAttention
from monarch_compile.codegen.attention.cache import blocks_of_rows
from monarch_compile.codegen.tiling import (
    ALL,
    DTYPE_BYTES,
    MIN_TILE,
    Capability,
    Tiling,
    feature_tiles,
    padded,
    shared_limit,
)
from monarch_compile.errors import CodegenError

DOT_PRECISIONS = ("ieee", "tf32x3")
WARP_SCORES = 512
"""Scores of a tile that are worth a warp."""
WARP_ACCUMULATORS = {2: 2048, 4: 1024}
"""Accumulators that a warp holds without spilling, by bytes of an operand (tf32x3 keeps each operand in two parts)."""

OFFSETS = (2, 4)
"""How many offsets a program of stage 2 may take in turn."""

WORD = 64
"""Blocks that have a bit each in one word, and the most that stage 2 meets in one step where it reads such words."""

NEAR_STEP = 64
"""The largest step of the exact groups: more takes registers and shared memory that other programs could use."""


@dataclass(frozen=True)
class Schedule:
    """The tilings of every kernel of one IR.

    summarize: rows j, step i (stage 1: what a block of keys says to the queries of each offset).
    attend: rows l, step b (stage 2: attention over the block summaries).
    represent: rows b, step l (between iterations: the query that stands for a block's readers; also the mean start).
        `Tiling.turns` of `ALL` are all tiles of a block (stage 1) or of an offset (stage 2), while the other side,
        within one step, stays on chip. More turns, in stage 2 alone, are the one tile of each of as many offsets.
    exchange: whether all blocks fit the rows of `represent`, and one kernel does all that is between iterations.
    near: rows j, step i (what the exact groups say to each query); None where there are none.
    fused: whether the exact groups are part of stage 1, whose queries must be the sequence's own (`can_fuse`);
        they then share all of its tiling but the step. Else they have a kernel of their own.
    whole: whether stage 2 meets all blocks in one step, without a loop: there are at most `attend.step` of them.
    dot_precision: how float32 products are formed, "ieee" or "tf32x3"; 16-bit products are exact either way.
    """

    family: ClassVar[str] = "attention"

    summarize: Tiling
    attend: Tiling
    represent: Tiling
    dot_precision: str = "tf32x3"
    near: Tiling | None = None
    fused: bool = True
    whole: bool = False
    exchange: bool = False

    def __post_init__(self) -> None:
        if self.dot_precision not in DOT_PRECISIONS:
            raise CodegenError(f"dot_precision must be one of {DOT_PRECISIONS}; found {self.dot_precision!r}")

    @property
    def most_blocks(self) -> int | None:
        """The most blocks that the kernels are for; None where any number will do."""
        limits = [self.attend.step] * self.whole + [self.represent.rows] * self.exchange
        return min(limits, default=None)

    @property
    def sizes_over_blocks(self) -> tuple[int, ...]:
        """The tiles that cover blocks."""
        return tuple(size for tiling in (self.attend, self.represent) for size in (tiling.rows, tiling.step))

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "summarize", self.summarize
        yield "attend", self.attend
        yield "represent", self.represent
        if self.near is not None:
            yield "near", self.near

    def __str__(self) -> str:
        tilings = " ".join(f"{name}={tiling}" for name, tiling in self.tilings())
        place = "" if self.near is None else " fused" if self.fused else " separate"
        whole = " whole" * self.whole + " exchange" * self.exchange
        return f"{tilings}{place}{whole} dot={self.dot_precision}"


class Row(NamedTuple):
    """A tiling for blocks of at most `most` keys (stage 1), or for at most `most` blocks (the other kernels).

    only: the compute capabilities that it is for; None: any.
    """

    most: float
    tiling: Tiling
    only: tuple[tuple[int, int], ...] | None = None


class Rows(NamedTuple):
    """The tilings of each kernel; the first row that fits counts. Each tile is already the largest worth trying."""

    summarize: tuple[Row, ...]
    attend: tuple[Row, ...]
    represent: tuple[Row, ...]


def _always(*sizes: int) -> tuple[Row, ...]:
    return (Row(math.inf, Tiling(*sizes)),)


_BETWEEN = (Row(64, Tiling(64, 64, 4, 2)), Row(128, Tiling(128, 128, 8, 1)), Row(math.inf, Tiling(64, 64, 4, 2)))
_LARGE_OPERANDS = ((9, 0),)
"""Whose tensor cores read operands from shared memory: elsewhere these tiles of wide heads would spill up to half a KiB
a thread. Here they spill up to 0.3 KiB with a window, and took half the time of tiles that spill nothing."""
_WIDE_WHOLE = Row(64, Tiling(64, 64, 4, 1), _LARGE_OPERANDS)
TABLE: dict[tuple[int, int], Rows] = {
    (2, 64): Rows(
        summarize=(
            Row(64, Tiling(64, 64, 4, 2)),
            Row(128, Tiling(64, 128, 4, 1)),
            Row(256, Tiling(64, 256, 4, 3, ALL)),
            Row(math.inf, Tiling(64, 128, 4, 2)),
        ),
        attend=(
            Row(64, Tiling(64, 64, 4, 1)),
            Row(128, Tiling(128, 128, 4, 2, 2)),
            Row(256, Tiling(64, 256, 4, 3, ALL)),
            Row(math.inf, Tiling(128, 64, 4, 3)),
        ),
        represent=_BETWEEN,
    ),
    (2, 128): Rows(
        summarize=(
            Row(64, Tiling(64, 64, 4, 2)),
            Row(128, Tiling(64, 128, 4, 2, ALL)),
            Row(math.inf, Tiling(64, 64, 4, 2)),
        ),
        attend=_always(64, 64, 4, 3),
        represent=_always(64, 64, 4, 2),
    ),
    (2, 256): Rows(
        summarize=(_WIDE_WHOLE, Row(math.inf, Tiling(64, 16, 8, 2))),
        attend=(
            _WIDE_WHOLE,
            Row(math.inf, Tiling(128, 32, 8, 2), _LARGE_OPERANDS),
            Row(math.inf, Tiling(64, 32, 8, 2)),
        ),
        represent=_always(64, 32, 8, 2),
    ),
    (4, 64): Rows(_always(32, 32, 4, 2), _always(32, 32, 4, 2), _always(32, 32, 4, 2)),
    (4, 128): Rows(_always(32, 32, 8, 2), _always(32, 32, 8, 2), _always(32, 32, 8, 2)),
    (4, 256): Rows(_always(16, 16, 8, 1), _always(16, 16, 8, 1), _always(16, 16, 8, 1)),
}
"""By bytes of an element and the largest padded head or value dim. The rows of 16-bit elements were chosen from what an
H200 took (benchmarks/results/h200_*.json), the others from registers."""

NEAR_TABLE: dict[tuple[int, int], Rows] = {
    (2, 64): Rows(
        summarize=(Row(64, Tiling(64, 64, 4, 1)), Row(math.inf, Tiling(64, 64, 4, 3))),
        attend=(
            Row(64, Tiling(64, 64, 4, 1)),
            Row(128, Tiling(64, 128, 4, 1)),
            Row(math.inf, Tiling(64, 64, 4, 2)),
        ),
        represent=_BETWEEN,
    ),
    (2, 128): TABLE[2, 128]._replace(
        summarize=(Row(64, Tiling(64, 64, 4, 1)), Row(math.inf, Tiling(64, 64, 4, 2))),
    ),
    (2, 256): TABLE[2, 256]._replace(summarize=(_WIDE_WHOLE, Row(math.inf, Tiling(32, 32, 8, 2)))),
}
"""What stands in for `TABLE` with exact groups, which take more registers."""


def choose_schedule(ir: MonarchAttention, capability: Capability | None = None) -> Schedule:
    """The schedule for `ir` on a device of compute `capability` (None: the smallest shared memory we emit for).

    Raises:
        CodegenError: no kernel exists for the dtype or the head size.
    """
    check_supported(ir)
    width = max(64, padded(ir.head_dim), padded(ir.value_dim))
    key = (DTYPE_BYTES[ir.dtype], width)
    table = TABLE[key] if not ir.has_exact_keys else NEAR_TABLE.get(key, TABLE[key])
    blocks, limit = ir.num_blocks, shared_limit(capability)
    row_blocks = blocks
    if ir.follows_cache:
        row_blocks = blocks_of_rows(ir.seq_len_q, ir.seq_len_k, ir.form.block_size)
    sides = {
        "summarize": (ir.block_size_q, ir.form.block_size),
        "attend": (row_blocks, blocks),
        "represent": (row_blocks, blocks),
    }
    tilings: dict[str, Any] = {}
    for name, (num_rows, num_steps) in sides.items():
        fits = _tilings(getattr(table, name), num_steps, capability)
        within = (_within(_fit(tiling, ir, num_rows, num_steps), ir, limit) for tiling in fits)
        if name == "attend" and ir.form.chosen:
            within = (replace(t, step=min(t.step, WORD), turns=1) for t in within)
        tilings[name] = next(t for t in within if t.turns in turns_of(t, name, ir, (blocks or math.inf) <= t.step))
    whole = blocks is not None and blocks <= tilings["attend"].step
    exchange = ir.form.num_iters > 1 and blocks is not None and blocks <= tilings["represent"].rows
    schedule = Schedule(**tilings, whole=whole, exchange=exchange)
    if not ir.has_exact_keys:
        return schedule
    return replace(schedule, near=_near(schedule.summarize, table, ir, capability), fused=can_fuse(ir))


def check_schedule(schedule: Schedule, ir: MonarchAttention) -> None:
    """Raise CodegenError where the turns of a kernel are not those that its template has for `ir`."""
    for name, tiling in schedule.tilings():
        if tiling.turns not in turns_of(tiling, name, ir, schedule.whole):
            raise CodegenError(f"{name} of {ir} cannot take tiles in turn as {schedule} asks")


def is_made_for(schedule: Schedule, ir: MonarchAttention) -> bool:
    """Whether a schedule has the kernels that `ir` needs, for as many blocks as it has."""
    blocks, most = ir.num_blocks, schedule.most_blocks
    return (
        (schedule.near is not None) == ir.has_exact_keys
        and (schedule.near is None or not schedule.fused or can_fuse(ir))
        and (most is None or (blocks is not None and blocks <= most))
    )


def turns_of(tiling: Tiling, name: str, ir: MonarchAttention, whole: bool) -> tuple[int, ...]:
    """The turns that a kernel may take with these tiles. whole: whether stage 2 meets all blocks in one step."""
    if name == "attend" and (not whole or ir.follows_cache):
        return (1,)
    if name == "summarize" and ir.form.block_size <= tiling.step:
        return 1, ALL
    if name == "attend" and (ir.is_cross or tiling.rows < tiling.step):
        return 1, ALL
    if name == "attend":
        return (1, ALL, *(turns for turns in OFFSETS if ir.form.block_size % turns == 0))
    return (1,)


def can_fuse(ir: MonarchAttention) -> bool:
    """Whether stage 1 meets every query together with its own block: one iteration from the identity start.

    Listed keys have a kernel of their own.
    """
    return ir.form.weighs_own_block_exactly and not ir.lists_exact_keys


def shared_bytes(tiling: Tiling, ir: MonarchAttention) -> int:
    """An upper estimate of the shared memory of one program: its rows, its weights, and every stage of its stream."""
    size = DTYPE_BYTES[ir.dtype]
    head, value = feature_tiles(ir.head_dim, ir.value_dim, ir.dtype)
    rows, other, weights = tiling.rows * head, tiling.step * (head + value), tiling.rows * tiling.step
    streamed = {1: other, ALL: rows}.get(tiling.turns, rows + other)
    return size * (rows + other - streamed + weights + tiling.num_stages * streamed) + 1024


def check_supported(ir: MonarchAttention) -> None:
    """Raise CodegenError where no kernel exists for `ir`, whatever the schedule."""
    if ir.dtype not in DTYPE_BYTES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_BYTES)
        raise CodegenError(f"no kernel for {ir.dtype}: it falls back to the reference; kernels exist for {allowed}")
    for name, size in (("head_dim", ir.head_dim), ("value_dim", ir.value_dim)):
        if size > MAX_HEAD_DIM:
            raise CodegenError(f"no kernel for {name}={size}: it falls back to the reference; at most {MAX_HEAD_DIM}")
    if ir.is_cross and ir.has_exact_keys:
        raise CodegenError(f"no kernel for a window or a prefix where seq_len_q != seq_len_k; found {ir}")


def _fit(tiling: Tiling, ir: MonarchAttention, num_rows: int | None, num_steps: int | None) -> Tiling:
    """Tiles no larger than what their two sides cover (None: unknown), and warps that still have work."""
    rows, step = tiling.rows, tiling.step
    if num_rows is not None:
        rows = min(rows, padded(num_rows))
    if num_steps is not None:
        sizes = [size for size in (step, step // 2) if size >= MIN_TILE]
        least_waste = min(sizes, key=lambda size: (-(-num_steps // size) * size, -size))
        step = min(least_waste, padded(num_steps))
    accumulators = rows * sum(feature_tiles(ir.head_dim, ir.value_dim, ir.dtype))
    useful = max(1, rows * step // WARP_SCORES, accumulators // WARP_ACCUMULATORS[DTYPE_BYTES[ir.dtype]])
    return replace(tiling, rows=rows, step=step, num_warps=min(tiling.num_warps, 1 << (useful - 1).bit_length()))


def _tilings(rows: tuple[Row, ...], size: int | None, capability: Capability | None) -> Iterator[Tiling]:
    """Those for blocks of `size` keys or for `size` blocks (None: unknown) on a device."""
    for row in rows:
        if (size or math.inf) <= row.most and (row.only is None or capability in row.only):
            yield row.tiling


def _near(summarize: Tiling, table: Rows, ir: MonarchAttention, capability: Capability | None) -> Tiling:
    """The tiling of the exact groups: that of stage 1, of which they may be a part, with a step of their own."""
    window = ir.form.window
    beside = 1 if window is None else max(1, *along_axes(window, 1))
    keys = ir.form.prefix if window is None else 2 * beside * ir.form.block_size
    widest = next(_tilings(table.summarize, ir.form.block_size, capability))
    near = replace(summarize, turns=1, step=min(NEAR_STEP, _fit(widest, ir, keys, keys).step))
    while shared_bytes(near, ir) > shared_limit(capability):
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


def read_schedule(fields: Mapping[str, Any]) -> Schedule:
    """A schedule from what `dataclasses.asdict` made of it.

    Raises:
        KeyError, TypeError, CodegenError: the fields are of something else.
    """
    tilings = {name: Tiling(**fields[name]) for name in ("summarize", "attend", "represent")}
    near = None if fields["near"] is None else Tiling(**fields["near"])
    return Schedule(**{**fields, **tilings, "near": near})
