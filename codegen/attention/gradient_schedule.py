"""How the kernels of the gradients of one IR are tiled: a frozen value, chosen from a small table.

Letters: j offset of a query in its block, i offset of a key in its block, l block of queries, b block of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.codegen.attention.schedule import Schedule, check_supported, choose_schedule
from monarch_compile.codegen.tiling import DTYPE_BYTES, Capability, Tiling, padded
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

    family: ClassVar[str] = "attention"

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


MOST_WHOLE = {64: 128, 128: 64}
"""The most blocks whose summaries and sums of gradients fit one program, by the largest padded head or value dim of
16-bit elements; none of wider heads or of float32."""

TABLE: dict[tuple[int, int], dict[str, Tiling]] = {
    (2, 64): {
        "attend": Tiling(64, 64, 4, 2),
        "represent": Tiling(64, 64, 4, 2),
        "queries": Tiling(64, 64, 4, 2),
        "keys": Tiling(64, 64, 4, 2),
    },
    (2, 128): {
        "attend": Tiling(64, 64, 4, 2),
        "represent": Tiling(64, 64, 8, 2),
        "queries": Tiling(64, 64, 8, 2),
        "keys": Tiling(64, 64, 8, 2),
    },
    (2, 256): {
        "attend": Tiling(64, 32, 8, 1),
        "represent": Tiling(32, 32, 8, 1),
        "queries": Tiling(32, 32, 8, 1),
        "keys": Tiling(32, 32, 8, 1),
    },
    (4, 64): {
        "attend": Tiling(32, 32, 4, 1),
        "represent": Tiling(32, 32, 4, 1),
        "queries": Tiling(32, 32, 4, 1),
        "keys": Tiling(32, 32, 4, 1),
    },
    (4, 128): {
        "attend": Tiling(32, 32, 8, 1),
        "represent": Tiling(16, 32, 8, 1),
        "queries": Tiling(16, 32, 8, 1),
        "keys": Tiling(16, 32, 8, 1),
    },
    (4, 256): {
        "attend": Tiling(16, 16, 8, 1),
        "represent": Tiling(16, 16, 8, 1),
        "queries": Tiling(16, 16, 8, 1),
        "keys": Tiling(16, 16, 8, 1),
    },
}
"""By bytes of an element and the largest padded head or value dim."""


def choose_gradient_schedule(ir: MonarchAttention, capability: Capability | None = None) -> GradientSchedule:
    """The schedule for the gradients of `ir` on a device of compute `capability`.

    Raises:
        CodegenError: no kernel exists for the dtype, the head size or the form.
    """
    check_supported(ir)
    width = max(64, padded(ir.head_dim), padded(ir.value_dim))
    size = DTYPE_BYTES[ir.dtype]
    blocks: float = math.inf if ir.num_blocks is None else ir.num_blocks
    tilings: dict[str, Any] = {}
    for name, tiling in TABLE[size, width].items():
        most = ir.form.block_size if name in ("queries", "keys") else blocks
        tilings[name] = _fit(tiling, most)
    whole = size == 2 and blocks <= MOST_WHOLE.get(width, 0)
    if whole:
        represent = tilings["represent"]
        rows = padded(int(blocks))
        tilings["represent"] = replace(represent, rows=rows, num_warps=8 if rows > 64 else represent.num_warps)
    return GradientSchedule(summaries=choose_schedule(without_exact_keys(ir), capability), whole=whole, **tilings)


def check_gradient_schedule(schedule: GradientSchedule, ir: MonarchAttention) -> None:
    """Raise CodegenError where `schedule` is for other kernels than those of the gradients."""
    if not isinstance(schedule, GradientSchedule):
        raise CodegenError(f"{schedule} does not tile the gradients of {ir}")
    if schedule.fused and schedule.keys.rows < ir.form.block_size:
        raise CodegenError(f"a block of {ir} does not fit the rows of keys in {schedule}")


def without_exact_keys(ir: MonarchAttention) -> MonarchAttention:
    """`ir` without a window: what its far field is of. Its prefix says where blocks start."""
    return ir.changed(window=None)


def _fit(tiling: Tiling, most: float) -> Tiling:
    """Tiles no larger than what they cover."""
    if math.isinf(most):
        return tiling
    largest = padded(int(most))
    return replace(tiling, rows=min(tiling.rows, largest), step=min(tiling.step, largest))
