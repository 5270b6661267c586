"""What tuning tries for a long convolution, and what it checks and times a schedule with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.convolution.launch import bucketed
from monarch_compile.codegen.convolution.schedule import KEPT, Schedule, points
from monarch_compile.codegen.tiling import MIN_TILE, Tiling
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.reference import reference
from monarch_compile.convolution.work import ON_CHIP

CHANNELS = 768
FACTORS = (16, 32, 64, 128)
WARPS = (1, 2, 4, 8)
TURNS = (1, 2, 4, 8, 16)
OUTER_COLUMNS = (32, 64, 128)
TURNS_ON_CHIP = (4, 8, 16)
STAGES = (1, 2)
ERROR_BOUNDS = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-10}
"""Relative Frobenius error against the float64 reference that a kernel may have, by the dtype of its result."""


def applies(ir: LongConvolution) -> bool:
    """Whether `ir` is tuned: symbolic lengths are not."""
    return all(isinstance(size, int) for size in (ir.seq_len, ir.out_len))


def sized(ir: LongConvolution) -> LongConvolution:
    """`ir` as it is tuned: symbolic counts of channels and batch entries are taken to be 768 and 16."""
    batch = ir.batch if isinstance(ir.batch, int) else 16
    return replace(ir, batch=batch, channels=ir.channels if isinstance(ir.channels, int) else CHANNELS)


def stages(ir: LongConvolution) -> tuple[str, ...]:
    """The fields of a schedule that matter."""
    return ("main",) if points(bucketed(ir)) <= ON_CHIP else ("main", "outer")


def variants(start: Schedule, stage: str, ir: LongConvolution) -> Iterator[Schedule]:
    """All schedules of a precision: they are few. With an outer factor, stage "main" chooses all factors."""
    if start.outer is not None:
        yield from _with_outer(start, start.outer, stage, points(bucketed(ir)))
        return
    count, batch = points(bucketed(ir)), int(ir.batch)
    choices = itertools.product(FACTORS, WARPS, TURNS, (1, 2, 4), KEPT, (False, True))
    for rows, warps, turns, sequences, kept, ahead in choices:
        columns = count // rows
        fits = MIN_TILE <= columns <= 2 * rows and sequences * turns <= batch and columns * sequences <= 128
        if fits and (turns > 1 or (kept == "nothing" and not ahead)):
            yield Schedule(Tiling(rows, columns * sequences, warps, 1, turns), sequences, kept, start.precision, ahead)


def _with_outer(start: Schedule, outer: Tiling, stage: str, count: int) -> Iterator[Schedule]:
    if stage == "outer":
        for step, warps, loads, turns in itertools.product(OUTER_COLUMNS, WARPS, STAGES, TURNS):
            if start.main.step <= step <= count // outer.rows:
                yield replace(start, outer=Tiling(outer.rows, step, warps, loads, turns))
        return
    for by, rows, warps, loads, turns in itertools.product(FACTORS, FACTORS, WARPS, STAGES, TURNS_ON_CHIP):
        columns = count // (by * rows)
        if MIN_TILE <= columns <= rows:
            step = max(columns, outer.step)
            main = Tiling(rows, columns, warps, loads, turns)
            yield replace(start, main=main, outer=replace(outer, rows=by, step=step))


def inputs(ir: LongConvolution, device: torch.device) -> tuple[Any, ...]:
    """Standard normal sequences, and a filter that decays."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    batch, channels, seq_len, out_len, filter_len = (
        int(size) for size in (ir.batch, ir.channels, ir.seq_len, ir.out_len, ir.filter_len)
    )
    decay = torch.exp(-3 * torch.arange(filter_len, device=device) / filter_len)
    options = {"transform_len": ir.transform_len, "out_len": out_len, "lag": ir.lag, "scale": ir.scale}
    return (
        normal(batch, channels, seq_len).to(ir.dtype),
        (normal(channels, filter_len) * decay).to(ir.filter_dtype),
        normal(channels) if ir.skip else None,
        normal(batch, channels, seq_len).to(ir.dtype) if ir.pre_gate else None,
        normal(batch, channels, out_len).to(ir.dtype) if ir.post_gate else None,
        options,
    )


def small(ir: LongConvolution) -> LongConvolution:
    """An IR that is quickly checked, of the same kernels."""
    return replace(ir, channels=2)


def expected(ir: LongConvolution, given: tuple[Any, ...]) -> Tensor:
    """The float64 reference of some inputs."""
    *tensors, options = given
    wide = [None if x is None else x.double() for x in tensors]
    return reference(wide[0], wide[1], *wide[2:], **options)  # type: ignore[arg-type]


def bound(ir: LongConvolution) -> float:
    """The largest relative Frobenius error that is right."""
    return ERROR_BOUNDS[ir.out_dtype]
