"""What tuning tries for attention, and what it checks and times a schedule with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.attention.reference import reference
from monarch_compile.codegen.attention.schedule import Schedule, turns_of
from monarch_compile.codegen.tiling import ALL, Tiling, padded

SIZES = (16, 32, 64, 128)
LONGEST_STEP = 256
"""A step that takes a whole block, or all blocks, may be as long as this."""
WARPS = (1, 2, 4, 8)
STAGES = (1, 2, 3)
WARP_ROWS = (16, 32)
"""The least and the most rows that a warp owns, except 64 rows on 8 warps."""
CHECKED_HEADS = 2
ERROR_BOUNDS = {torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8, torch.float32: 32 * 2.0**-24}
"""Relative Frobenius error against the float64 reference that a kernel may have, for each iteration."""


def applies(ir: MonarchAttention) -> bool:
    """Whether `ir` is tuned: neither symbolic nor unequal lengths are, nor is a bias of keys, nor are listed keys."""
    return (
        not ir.is_cross
        and not ir.lists_exact_keys
        and ir.mask is not MaskKind.KEY_BIAS
        and isinstance(ir.seq_len_k, int)
    )


def sized(ir: MonarchAttention) -> MonarchAttention:
    """`ir` as it is tuned: symbolic counts of heads and batch entries are taken to be 12 and 1."""
    batch = ir.batch if isinstance(ir.batch, int) else 1
    heads = ir.num_kv_heads if isinstance(ir.num_kv_heads, int) else 12
    return ir.changed(batch=batch, num_heads=heads * ir.group, num_kv_heads=heads)


def stages(ir: MonarchAttention) -> tuple[str, ...]:
    """The fields of a schedule that matter to `ir`, the costliest first."""
    between = ("represent",) if ir.form.num_iters > 1 or ir.form.init != "identity" else ()
    return ("summarize", "attend", *(("near",) if ir.form.has_exact_keys else ()), *between)


def variants(start: Schedule, stage: str, ir: MonarchAttention) -> Iterator[Schedule]:
    """Schedules that differ from `start` in one stage."""
    blocks = ir.num_blocks or 1
    if stage == "near":
        yield from _near_variants(start, ir)
        return
    extent = ir.form.block_size if stage == "summarize" else blocks
    for tiling in _in_turn(_tilings(extent), stage, ir, extent):
        changed: dict[str, Any] = {stage: tiling}
        if stage == "attend":
            changed["whole"] = blocks <= tiling.step
        if stage == "represent" and ir.form.num_iters > 1 and blocks <= tiling.rows:
            changed["exchange"] = True
            if ir.form.init == "identity":  # the mean start alone would read the step
                changed[stage] = replace(tiling, step=tiling.rows, num_stages=1)
        elif stage == "represent":
            changed["exchange"] = False
        if stage == "summarize" and start.near is not None and start.fused:
            changed["near"] = replace(tiling, step=start.near.step, turns=1)
        yield replace(start, **changed)


def _near_variants(start: Schedule, ir: MonarchAttention) -> Iterator[Schedule]:
    """A part of stage 1, whose tiling it shares except the step, or a kernel of its own."""
    if start.near is None:
        return
    if start.fused:
        for step in SIZES:
            yield replace(start, near=replace(start.summarize, step=step, turns=1))
    for tiling in _tilings(ir.form.block_size):
        if tiling.num_stages > 1:
            yield replace(start, near=tiling, fused=False)


def _tilings(extent: int) -> Iterator[Tiling]:
    """Those worth trying for a stage whose rows and reduction both extend over `extent`."""
    largest = padded(extent)
    sizes = [size for size in SIZES if size <= largest and size >= min(32, largest)]
    steps = [*sizes, LONGEST_STEP] if largest == LONGEST_STEP else sizes
    for rows, step, num_warps in itertools.product(sizes, steps, WARPS):
        if not WARP_ROWS[0] * num_warps <= rows <= WARP_ROWS[1] * num_warps and (rows, num_warps) != (64, 8):
            continue
        for num_stages in STAGES if step < extent else (1,):
            yield Tiling(rows, step, num_warps, num_stages)


def _in_turn(tilings: Iterator[Tiling], stage: str, ir: MonarchAttention, extent: int) -> Iterator[Tiling]:
    """The same, and all that take several tiles in turn, of which there must be some."""
    for tiling in tilings:
        yield tiling
        if extent > tiling.step:
            continue
        for turns in turns_of(tiling, stage, ir, whole=True):
            if turns > 1 or (turns == ALL and tiling.rows < extent):
                yield from (replace(tiling, num_stages=stages, turns=turns) for stages in STAGES)


def small(ir: MonarchAttention) -> MonarchAttention:
    """`ir` with one batch entry and few heads."""
    return ir.changed(batch=1, num_heads=CHECKED_HEADS * ir.group, num_kv_heads=CHECKED_HEADS)


def bound(ir: MonarchAttention) -> float:
    """The largest relative error that the kernels of `ir` may have."""
    return ir.form.num_iters * ERROR_BOUNDS[ir.dtype]


def inputs(ir: MonarchAttention, device: torch.device) -> tuple[Any, ...]:
    """q, k, v as a fused projection gives them, standard normal, a mask that hides some keys where there is one, and
    the grid where blocks are tiles."""
    generator = torch.Generator(device).manual_seed(0)
    batch, seq_len = int(ir.batch), int(ir.seq_len_k)

    def rows(heads: int, dim: int) -> Tensor:
        shape = (batch, seq_len, heads, dim)
        return torch.randn(shape, device=device, dtype=ir.dtype, generator=generator).transpose(1, 2)

    q = rows(int(ir.num_heads), ir.head_dim)
    k, v = (rows(int(ir.num_kv_heads), dim) for dim in (ir.head_dim, ir.value_dim))
    grid = None if ir.form.tile is None else ir.grid
    if ir.mask is MaskKind.NONE:
        return q, k, v, None, grid
    return q, k, v, torch.rand((batch, seq_len), device=device, generator=generator) > 0.1, grid


def expected(ir: MonarchAttention, given: tuple[Any, ...]) -> Tensor:
    """The float64 reference of `inputs`."""
    q, k, v = (x.double() for x in given[:3])
    return reference(q, k, v, given[3], **ir.options())
