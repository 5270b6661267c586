"""How the kernels of the gradients of one IR are tiled: a frozen value, chosen from a small table.

Letters: j offset of a query in its block, i offset of a key in its block, l block of queries, b block of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.codegen.attention.schedule import (
    WARP_ACCUMULATORS,
    WARP_SCORES,
    Schedule,
    check_supported,
    choose_schedule,
    read_schedule,
)
from monarch_compile.codegen.attention.schedule import is_made_for as can_run
from monarch_compile.codegen.attention.schedule import shared_bytes as shared_bytes_of_summaries
from monarch_compile.codegen.tiling import (
    DTYPE_BYTES,
    MIN_TILE,
    Capability,
    Tiling,
    feature_tiles,
    padded,
    shared_limit,
)
from monarch_compile.errors import CodegenError


@dataclass(frozen=True)
class GradientSchedule:
    """The tilings of every kernel of the gradients of one IR.

    summaries: the schedule of the form without exact groups, whose stage 1 makes the summaries anew.
    attend: rows l, step b (stage 2: gradients of the queries); not used where `whole`.
    represent: rows b, step l (stage 2: gradients of the summaries).
    queries: rows j, step i (stage 1 and exact groups: gradients of the queries).
    keys: rows i, step j (the same: gradients of keys and values).
    fused: whether a block fits the rows of `keys`, which then also gives the gradients of `queries`.
    whole: whether all blocks fit the rows of `represent`, which then also gives stage 2's gradients of the queries.
    """

    family: ClassVar[str] = "attention/gradients"

    summaries: Schedule
    attend: Tiling
    represent: Tiling
    queries: Tiling
    keys: Tiling
    whole: bool = False
    fused: bool = False

    @property
    def dot_precision(self) -> str:
        """How float32 products are formed."""
        return self.summaries.dot_precision

    @property
    def most_blocks(self) -> int | None:
        """The most blocks that the kernels are for; None where any number will do."""
        return self.represent.rows if self.whole else None

    @property
    def sizes_over_blocks(self) -> tuple[int, ...]:
        """The tiles that cover blocks."""
        tilings = (self.attend, self.represent)
        return (*self.summaries.sizes_over_blocks, *(size for x in tilings for size in (x.rows, x.step)))

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "summarize", self.summaries.summarize
        yield "attend", self.attend
        yield "represent", self.represent
        yield "queries", self.queries
        yield "keys", self.keys

    def __str__(self) -> str:
        tilings = " ".join(f"{name}={tiling}" for name, tiling in self.tilings())
        return f"{tilings}{' whole' * self.whole}{' fused' * self.fused} dot={self.dot_precision}"


class Row(NamedTuple):
    """A tiling for blocks of at most `most` keys (`keys`), or for at most `most` blocks (`represent`).

    covers: whether its rows hold a whole block, or all blocks, so that its kernel also gives gradients of queries.
    windowed: whether it is also for forms with a window.
    """

    most: float
    tiling: Tiling
    covers: bool = False
    windowed: bool = True


class Rows(NamedTuple):
    """The tilings of each kernel; the first row that fits counts."""

    attend: Tiling
    represent: tuple[Row, ...]
    queries: Tiling
    keys: tuple[Row, ...]


def _streamed(attend: Tiling, represent: Tiling, queries: Tiling, keys: Tiling) -> Rows:
    """Where neither a block nor all blocks fit one program."""
    return Rows(attend, (Row(math.inf, represent),), queries, (Row(math.inf, keys),))


TABLE: dict[tuple[int, int], Rows] = {
    (2, 64): Rows(
        attend=Tiling(64, 64, 4, 3),
        represent=(
            Row(64, Tiling(64, 64, 4, 2), covers=True),
            Row(128, Tiling(128, 64, 8, 3), covers=True),
            Row(math.inf, Tiling(64, 32, 4, 3)),
        ),
        queries=Tiling(64, 32, 4, 3),
        keys=(
            Row(64, Tiling(64, 64, 4, 3), covers=True),
            Row(128, Tiling(128, 32, 4, 3), covers=True, windowed=False),
            Row(math.inf, Tiling(64, 64, 4, 2)),
        ),
    ),
    (2, 128): Rows(
        attend=Tiling(64, 32, 4, 2),
        represent=(Row(64, Tiling(64, 32, 4, 2), covers=True), Row(math.inf, Tiling(64, 32, 4, 2))),
        queries=Tiling(64, 32, 4, 3),
        keys=(
            Row(64, Tiling(64, 32, 4, 2), covers=True, windowed=False),
            Row(math.inf, Tiling(64, 32, 4, 2)),
        ),
    ),
    (2, 256): _streamed(Tiling(64, 32, 8, 1), *[Tiling(32, 32, 8, 1)] * 3),
    (4, 64): _streamed(Tiling(32, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(32, 32, 4, 1), Tiling(16, 32, 4, 1)),
    (4, 128): _streamed(Tiling(32, 32, 8, 1), *[Tiling(16, 32, 8, 1)] * 3),
    (4, 256): _streamed(*[Tiling(16, 16, 8, 1)] * 4),
}
"""By bytes of an element and the largest padded head or value dim. Rows of 16-bit elements of up to 128 features
were chosen from what an H100 took (benchmarks/results/h100_backward_tilings.json): they spill up to 0.4 KiB a thread,
and took less time than tiles that spill nothing. The others were chosen from registers."""

WIDTHS = {"attend": (2, 1), "represent": (1, 2), "queries": (2, 1), "keys": (1, 2)}
"""Tensors of keys' and of values' features that a program of each kernel has for its rows, and for a step, at most."""


def choose_gradient_schedule(ir: MonarchAttention, capability: Capability | None = None) -> GradientSchedule:
    """The schedule for the gradients of `ir` on a device of compute `capability`.

    Raises:
        CodegenError: no kernel exists for the dtype, the head size or the form.
    """
    check_supported(ir)
    table = TABLE[DTYPE_BYTES[ir.dtype], max(64, padded(ir.head_dim), padded(ir.value_dim))]
    blocks, block, limit = ir.num_blocks or math.inf, ir.form.block_size, shared_limit(capability)
    represent, whole = _chosen(table.represent, "represent", blocks, ir, limit)
    keys, fused = _chosen(table.keys, "keys", block, ir, limit)
    return GradientSchedule(
        summaries=choose_schedule(without_exact_keys(ir), capability),
        attend=_within(_fit(table.attend, blocks, ir), "attend", ir, limit),
        represent=represent,
        queries=_within(_fit(table.queries, block, ir), "queries", ir, limit),
        keys=keys,
        whole=whole,
        fused=fused,
    )


def check_gradient_schedule(schedule: GradientSchedule, ir: MonarchAttention) -> None:
    """Raise CodegenError where `schedule` is not of the kernels that the gradients of `ir` have."""
    if not isinstance(schedule, GradientSchedule):
        raise CodegenError(f"{schedule} does not tile the gradients of {ir}")
    if schedule.fused and schedule.keys.rows < ir.form.block_size:
        raise CodegenError(f"a block of {ir} does not fit the rows of keys in {schedule}")


def is_made_for(schedule: GradientSchedule, ir: MonarchAttention) -> bool:
    """Whether a schedule has the kernels that the gradients of `ir` need, for as many blocks as it has."""
    blocks, most = ir.num_blocks, schedule.most_blocks
    holds_blocks = most is None or (blocks is not None and blocks <= most)
    return holds_blocks and can_run(schedule.summaries, without_exact_keys(ir))


def read_gradient_schedule(fields: Mapping[str, Any]) -> GradientSchedule:
    """A schedule from what `dataclasses.asdict` made of it.

    Raises:
        KeyError, TypeError, CodegenError: the fields are of something else.
    """
    tilings = {name: Tiling(**fields[name]) for name in WIDTHS}
    return GradientSchedule(**{**fields, **tilings, "summaries": read_schedule(fields["summaries"])})


def without_exact_keys(ir: MonarchAttention) -> MonarchAttention:
    """`ir` without a window: what its far field is of. Its prefix says where blocks start."""
    return ir.changed(window=None)


def shared_bytes(tiling: Tiling, name: str, ir: MonarchAttention) -> int:
    """An upper estimate of the shared memory of one program: its rows, its weights, and every stage of its stream.

    name: the kernel's, of `GradientSchedule.tilings`.
    """
    if name not in WIDTHS:
        return shared_bytes_of_summaries(tiling, without_exact_keys(ir))
    rows, step = WIDTHS[name]
    features = sum(feature_tiles(ir.head_dim, ir.value_dim, ir.dtype))
    held = features * (rows * tiling.rows + tiling.num_stages * step * tiling.step)
    return DTYPE_BYTES[ir.dtype] * (held + 2 * tiling.rows * tiling.step) + 1024


def _chosen(rows: tuple[Row, ...], name: str, most: float, ir: MonarchAttention, limit: int) -> tuple[Tiling, bool]:
    """The tiling of a kernel that covers `most` places, and whether its rows cover all of them."""
    for row in rows:
        if most > row.most or (ir.form.window is not None and not row.windowed):
            continue
        tiling = _within(_fit(row.tiling, most, ir), name, ir, limit)
        if not row.covers or tiling.rows >= most:
            return tiling, row.covers
    raise CodegenError(f"no tiling of the gradients of {ir} fits {limit} bytes of shared memory")


def _fit(tiling: Tiling, most: float, ir: MonarchAttention) -> Tiling:
    """Tiles no larger than the `most` places that they cover, and warps that still have work."""
    rows, step = (int(min(size, padded(int(min(most, size))))) for size in (tiling.rows, tiling.step))
    features = sum(feature_tiles(ir.head_dim, ir.value_dim, ir.dtype))
    accumulators = 2 * rows * features  # sums, and tiles of weights as large
    useful = max(1, rows * step // WARP_SCORES, accumulators // WARP_ACCUMULATORS[DTYPE_BYTES[ir.dtype]])
    return replace(tiling, rows=rows, step=step, num_warps=min(tiling.num_warps, 1 << (useful - 1).bit_length()))


def _within(tiling: Tiling, name: str, ir: MonarchAttention, limit: int) -> Tiling:
    """`tiling` with fewer stages, then smaller steps, then fewer rows, until it takes at most `limit` bytes."""
    while shared_bytes(tiling, name, ir) > limit:
        if tiling.num_stages > 1:
            tiling = replace(tiling, num_stages=tiling.num_stages - 1)
        elif tiling.step > MIN_TILE:
            tiling = replace(tiling, step=tiling.step // 2)
        elif tiling.rows > MIN_TILE:
            tiling = replace(tiling, rows=tiling.rows // 2)
        else:
            raise CodegenError(f"no tiling of the gradients of {ir} fits {limit} bytes of shared memory")
    return tiling
