"""What tuning tries for a block linear, and what it checks and times a schedule with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from monarch_compile.codegen.linear.schedule import IR, Schedule, in_width, is_made_for, out_width
from monarch_compile.codegen.tiling import Tiling, padded
from monarch_compile.linear.forms import USUAL_TOKENS
from monarch_compile.linear.ir import MONARCH, SPLIT, STAGED, BlockLinear, FormedLinear
from monarch_compile.linear.reference import reference

ROWS = (16, 32, 64, 128)
STEPS = (32, 64, 128, 256)
COLUMNS = (32, 64, 128, 256)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
TURNS = (1, 2, 4, 8)
ERROR_BOUNDS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}
"""Relative Frobenius error against the float64 reference that a kernel may have, by dtype."""


def applies(ir: IR) -> bool:
    """Whether `ir` is tuned by itself: a form is, by its name, and not what a form is yet to be chosen for."""
    return isinstance(ir, FormedLinear)


def sized(ir: FormedLinear) -> FormedLinear:
    """`ir` as it is tuned."""
    tokens = ir.tokens if isinstance(ir.tokens, int) else USUAL_TOKENS
    return replace(ir, of=replace(ir.of, tokens=tokens))


def stages(ir: FormedLinear) -> tuple[str, ...]:
    """The fields of a schedule that matter."""
    return ("main", "last") if ir.form == STAGED else ("main",)


def variants(start: Schedule, stage: str, ir: FormedLinear) -> Iterator[Schedule]:
    """All schedules that differ in one stage, and whose tiles are not larger than what they cover."""
    of = ir.of
    most_rows = padded(int(of.tokens))
    deep, wide = (of.in_features // of.in_blocks, out_width(of)) if ir.form != STAGED else _extents(of, stage)
    steps = sorted({min(step, padded(deep)) for step in STEPS})
    columns = sorted({min(count, padded(wide)) for count in COLUMNS})
    turns = TURNS if ir.form == SPLIT else (1,)
    for rows, step, count, warps, loads, turn in itertools.product(ROWS, steps, columns, WARPS, STAGES, turns):
        tiling = Tiling(rows, step, warps, loads, turn)
        if stage == "last":
            found = replace(start, last=tiling, last_columns=count)
        else:
            found = replace(start, main=tiling, columns=count)
        if rows <= most_rows and is_made_for(found, ir):
            yield found


def _extents(of: BlockLinear, stage: str) -> tuple[int, int]:
    """What a product of the staged form sums over, and its columns."""
    many = (of.out_blocks, of.in_blocks) if of.kind == MONARCH else (1, 1)
    if stage == "main":
        return in_width(of), many[0] * of.rank
    return many[1] * of.rank, out_width(of)


def inputs(ir: FormedLinear, device: torch.device) -> tuple[Tensor | None, ...]:
    """Standard normal x, first, second, coupling and bias; scaled so that results are as large."""
    of = ir.of
    generator = torch.Generator(device).manual_seed(0)
    p, q = in_width(of), out_width(of)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device, generator=generator) * scale).to(of.dtype)

    bias = normal(of.out_features) if of.bias else None
    x = normal(int(of.tokens), of.in_features)
    if of.kind == MONARCH:
        first = normal(of.in_blocks, of.out_blocks, of.rank, p, scale=p**-0.5)
        second = normal(of.out_blocks, q, of.in_blocks, of.rank, scale=(of.in_blocks * of.rank) ** -0.5)
        return x, first, second, None, bias
    first = normal(of.in_blocks, of.rank, p, scale=p**-0.5)
    second = normal(of.out_blocks, q, of.rank, scale=of.rank**-0.5)
    return x, first, second, normal(of.out_blocks, of.in_blocks, of.rank, scale=of.in_blocks**-0.5), bias


def small(ir: FormedLinear) -> FormedLinear:
    """An IR that is quickly checked, of the same kernels."""
    return replace(ir, of=replace(ir.of, tokens=min(int(ir.of.tokens), 48)))


def expected(ir: FormedLinear, given: tuple[Tensor | None, ...]) -> Tensor:
    """The float64 reference of some inputs."""
    x, first, second, *rest = (None if tensor is None else tensor.double() for tensor in given)
    assert x is not None
    assert first is not None
    assert second is not None
    return reference(x, first, second, *rest, output_order=ir.of.output_order, activation=ir.of.activation)


def bound(ir: FormedLinear) -> float:
    """The largest relative Frobenius error that is right."""
    return ERROR_BOUNDS[ir.of.dtype]
