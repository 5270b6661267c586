"""The programs of a block linear: its kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.linear import products
from monarch_compile.codegen.linear.products import first_buffer, second_buffer, x_buffer
from monarch_compile.codegen.linear.schedule import Schedule, Specialization, in_width, out_width
from monarch_compile.codegen.program import Buffer, Kernel, Program, Size, Tiles, header_of
from monarch_compile.codegen.tiling import Tiling, padded
from monarch_compile.linear.ir import FUSED, INTERLEAVED, SPLIT, BlockLinear, FormedLinear, LinearGradients

IR = FormedLinear | LinearGradients
SPAN = 4096
"""Numbers that a program of the split form's second kernel adds up."""


def program(ir: IR, schedule: Schedule, partial_tokens: Specialization) -> Program:
    """Kernels of a canonical IR; partial_tokens: whether the last tile may have fewer tokens than others."""
    if isinstance(ir, LinearGradients):
        return products.gradients(ir, schedule, partial_tokens)
    made = {FUSED: _fused, SPLIT: _split}.get(ir.form, products.staged)
    return made(ir, schedule, partial_tokens)


def specialize(ir: IR, schedule: Schedule, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> Specialization:
    """Whether the last tile of tokens may not be whole; nothing is asked of a symbolic number."""
    tokens = sizes["tokens"]
    return not isinstance(tokens, int) or tokens % schedule.whole != 0


def expected(ir: IR, schedule: Schedule) -> Specialization:
    """That of a launch of an IR, as far as its tokens are known."""
    return not isinstance(ir.tokens, int) or ir.tokens % schedule.whole != 0


def _fused(ir: FormedLinear, schedule: Schedule, partial_tokens: Specialization) -> Program:
    of, main = ir.of, schedule.main
    p, q = in_width(of), out_width(of)
    variables = {
        "partial_tokens": partial_tokens,
        "partial_width": p % main.step != 0,
        "partial_rank": of.rank != padded(of.rank),
        "partial_columns": q % schedule.columns != 0,
        "one_step": main.step >= p,
        **_ending(of),
    }
    kernel = _kernel(
        ir,
        schedule,
        "monarch_linear",
        "fused.py.jinja",
        (x_buffer(of), first_buffer(of), second_buffer(of), *_bias(of)),
        _result(of),
        {"TOKENS": main.rows, "STEP": main.step, "COLUMNS": schedule.columns, "RANKS": padded(of.rank)},
        variables,
        (Tiles("tokens", main.rows), of.out_blocks, -(-q // schedule.columns)),
        main,
    )
    return Program((kernel,), ("y",))


def _split(ir: FormedLinear, schedule: Schedule, partial_tokens: Specialization) -> Program:
    of, main = ir.of, schedule.main
    parts = -(-of.in_blocks // main.turns)
    padded_parts = 1 << (parts - 1).bit_length()
    span = max(16, min(256, SPAN // padded_parts))
    sums = Buffer("sums", torch.float32, (parts, "tokens", of.out_features))
    constants = {"TOKENS": main.rows, "STEP": main.step, "COLUMNS": schedule.columns, "RANKS": padded(of.rank)}
    constants |= {"PARTS": parts, "TURNS": main.turns, "SPAN": span, "PADDED_PARTS": padded_parts}
    multiply = _kernel(
        ir,
        schedule,
        "monarch_linear_split",
        "split.py.jinja",
        (x_buffer(of), first_buffer(of), second_buffer(of)),
        sums,
        constants,
        {"partial_tokens": partial_tokens},
        (Tiles("tokens", main.rows), of.out_blocks, -(-out_width(of) // schedule.columns), parts),
        main,
    )
    add = _kernel(
        ir,
        schedule,
        "monarch_linear_add",
        "add.py.jinja",
        (sums, *_bias(of)),
        _result(of),
        constants,
        {"partial_tokens": partial_tokens, **_ending(of)},
        ("tokens", -(-of.out_features // span)),
        Tiling(16, 16, 4, 1),
    )
    return Program((multiply, add), ("y",))


def _ending(of: BlockLinear) -> dict[str, Any]:
    return {
        "has_bias": of.bias,
        "interleaved": of.output_order == INTERLEAVED,
        "activation": of.activation,
    }


def _bias(of: BlockLinear) -> tuple[Buffer, ...]:
    return (Buffer("bias", of.dtype, (of.out_features,)),) if of.bias else ()


def _result(of: BlockLinear) -> Buffer:
    return Buffer("y", of.dtype, ("tokens", of.out_features))


def _kernel(
    ir: FormedLinear,
    schedule: Schedule,
    name: str,
    template: str,
    reads: tuple[Buffer, ...],
    writes: Buffer,
    constants: dict[str, int],
    variables: dict[str, Any],
    grid: tuple[Size | Tiles, ...],
    tiling: Tiling,
) -> Kernel:
    header = header_of(name, ir, schedule, variables["partial_tokens"])
    return products.kernel_of(ir.of, name, template, reads, writes, constants, variables, grid, tiling, header)
