"""What tuning tries for a Monarch linear, and what it checks and times a schedule with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from monarch_compile.codegen.linear.schedule import USUAL_TOKENS, Schedule, in_width, is_made_for, out_width
from monarch_compile.codegen.tiling import Tiling, padded
from monarch_compile.linear.ir import BlockLinear
from monarch_compile.linear.reference import reference

ROWS = (16, 32, 64, 128)
STEPS = (32, 64, 128, 256)
COLUMNS = (32, 64, 128, 256)
WARPS = (4, 8)
STAGES = (1, 2, 3, 4)
ERROR_BOUNDS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-20}
"""Relative Frobenius error against the float64 reference that a kernel may have, by dtype."""


def applies(ir: BlockLinear) -> bool:
    """Whether `ir` is tuned by itself: not as long as the operator does not run the kernel."""
    return False


def sized(ir: BlockLinear) -> BlockLinear:
    """`ir` as it is tuned."""
    return ir if isinstance(ir.tokens, int) else replace(ir, tokens=USUAL_TOKENS)


def stages(ir: BlockLinear) -> tuple[str, ...]:
    """The fields of a schedule that matter."""
    return ("main",)


def variants(start: Schedule, stage: str, ir: BlockLinear) -> Iterator[Schedule]:
    """All schedules whose tiles are not larger than what they cover."""
    most_rows = padded(int(ir.tokens))
    steps = sorted({min(step, padded(in_width(ir))) for step in STEPS})
    columns = sorted({min(count, padded(out_width(ir))) for count in COLUMNS})
    for rows, step, count, warps, deep in itertools.product(ROWS, steps, columns, WARPS, STAGES):
        found = Schedule(Tiling(rows, step, warps, deep), count)
        if rows <= most_rows and is_made_for(found, ir):
            yield found


def inputs(ir: BlockLinear, device: torch.device) -> tuple[Tensor | None, ...]:
    """Standard normal x, first, second and bias; the factors are scaled so that what they give is about as large."""
    generator = torch.Generator(device).manual_seed(0)
    p, q = in_width(ir), out_width(ir)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    first = normal(ir.in_blocks, ir.out_blocks, ir.rank, p) / p**0.5
    second = normal(ir.out_blocks, q, ir.in_blocks, ir.rank) / (ir.in_blocks * ir.rank) ** 0.5
    bias = normal(ir.out_features).to(ir.dtype) if ir.bias else None
    x = normal(int(ir.tokens), ir.in_features).to(ir.dtype)
    return x, first.to(ir.dtype), second.to(ir.dtype), bias


def small(ir: BlockLinear) -> BlockLinear:
    """An IR that is quickly checked, of the same kernel."""
    return replace(ir, tokens=min(int(ir.tokens), 48))


def expected(ir: BlockLinear, given: tuple[Tensor | None, ...]) -> Tensor:
    """The float64 reference of some inputs."""
    x, first, second, bias = (None if tensor is None else tensor.double() for tensor in given)
    assert x is not None
    assert first is not None
    assert second is not None
    return reference(x, first, second, None, bias, output_order=ir.output_order, activation=ir.activation)


def bound(ir: BlockLinear) -> float:
    """The largest relative Frobenius error that is right."""
    return ERROR_BOUNDS[ir.dtype]
