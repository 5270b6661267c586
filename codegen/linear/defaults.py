"""Schedules that are used without tuning.

They follow from what a multiprocessor of an H100 holds. Those of the staged form were timed there
(benchmarks/results/linear_h100.json); none was searched for.
"""

from __future__ import annotations

from monarch_compile.codegen.tiling import Tiling, padded
from monarch_compile.linear.forms import FEW, USUAL_TOKENS
from monarch_compile.linear.ir import FUSED, MONARCH, SPLIT, BlockLinear

MULTIPROCESSORS = 132
SHARED = 200 * 1024
"""Bytes of shared memory that the tiles of one program may take."""

Chosen = tuple[Tiling, int] | tuple[Tiling, int, Tiling, int]
"""The fields of a schedule."""


def chosen(ir: BlockLinear, form: str) -> Chosen:
    """The tilings of a form for a number of tokens; symbolic ones are taken for `USUAL_TOKENS`."""
    tokens = ir.tokens if isinstance(ir.tokens, int) else USUAL_TOKENS
    is_half = ir.dtype.itemsize == 2
    if form == SPLIT:
        return _split(ir, is_half)
    if form == FUSED:
        return _fused(ir, tokens, is_half)
    if form == "gradients":
        rows, tile = min(padded(tokens), 128), Tiling(128, 64, 8, 3) if is_half else Tiling(32, 32, 4, 2)
        columns = 128 if is_half else 32
        main = Tiling(min(rows, tile.rows), tile.step, tile.num_warps, tile.num_stages)
        return main, columns, tile, columns
    return _staged(ir, tokens, is_half)


def _fused(ir: BlockLinear, tokens: int, is_half: bool) -> Chosen:
    p, q, rank = padded(ir.in_features // ir.in_blocks), padded(ir.out_features // ir.out_blocks), padded(ir.rank)
    if not is_half:
        return Tiling(min(padded(tokens), 32), min(p, 32), 8, 2), min(q, 32)
    rows, columns = min(padded(tokens), 128), min(q, 256 if rank <= 64 else 128)
    warps = 8 if rows * columns >= 64 * 256 else 4
    whole = 2 * 2 * (rows * p + rank * p + columns * rank)  # two stages of an input block
    if whole <= SHARED:
        return Tiling(rows, p, warps, 2), columns
    return Tiling(rows, min(p, 64), warps, 3), columns


def _split(ir: BlockLinear, is_half: bool) -> Chosen:
    p, q = padded(ir.in_features // ir.in_blocks), padded(ir.out_features // ir.out_blocks)
    columns = min(q, 256 if is_half else 64)
    programs = ir.in_blocks * ir.out_blocks * -(-(ir.out_features // ir.out_blocks) // columns)
    turns = 1
    while programs // (2 * turns) >= 2 * MULTIPROCESSORS and 2 * turns <= ir.in_blocks:
        turns *= 2
    return Tiling(16, min(p, 128 if is_half else 32), 4, 3 if is_half else 2, turns), columns


def _staged(ir: BlockLinear, tokens: int, is_half: bool) -> Chosen:
    inner = ir.rank * (ir.out_blocks if ir.kind == MONARCH else 1)
    width = ir.out_features // ir.out_blocks
    deep = ir.rank * (ir.in_blocks if ir.kind == MONARCH else 1)
    if not is_half:
        rows = min(padded(tokens), 32)
        return Tiling(rows, 32, 4, 2), min(padded(inner), 64), Tiling(rows, 32, 4, 2), min(padded(width), 64)
    if tokens <= FEW:
        first, last = (_few(n, groups) for n, groups in ((inner, ir.in_blocks), (width, ir.out_blocks)))
        steps = (min(padded(size), 128) for size in (ir.in_features // ir.in_blocks, deep))
        return Tiling(16, next(steps), 4, 4), first, Tiling(16, next(steps), 4, 4), last
    rows = min(padded(tokens), 128)
    warps = 4 if rows <= 64 else 8
    narrow = 64 if rows * tokens <= 128 * 512 else 128
    main = Tiling(rows, 64, 4, 3), min(padded(inner), narrow if tokens <= 512 else 128)
    last_columns = min(padded(width), narrow if tokens <= 512 else 256)
    return *main, Tiling(rows, 64, warps if last_columns > 128 else 4, 3), last_columns


def _few(columns: int, groups: int) -> int:
    """Columns of a program where there are few tokens: so few that two programs fit on each multiprocessor."""
    tile = 64
    while tile > 16 and groups * -(-columns // tile) < 2 * MULTIPROCESSORS:
        tile //= 2
    return min(tile, padded(columns))
