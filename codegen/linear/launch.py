"""A Monarch linear on its kernel: from tensors to the IR of a launcher, and the launch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.launcher import Launcher, build, capability_of, on_device
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.errors import CodegenError
from monarch_compile.linear.ir import BLOCKED, MONARCH, BlockLinear

MOST_TOKENS = 8192
"""Schedules look no further than this number of tokens."""


def launch(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_order: str = BLOCKED,
    activation: str = "none",
) -> Tensor:
    """A Monarch linear by the emitted kernel; the meaning and the shapes are those of `reference.reference`.

    Tensors are read through their strides; the number of tokens may be symbolic. What is between the factors is rounded
    to their dtype; sums are float32.

    Raises:
        CodegenError: no kernel exists for this kind, dtype, rank or device, or triton is not installed.
    """
    if coupling is not None:
        raise CodegenError("there is a kernel for Monarch alone; found BLAST's factors")
    flat = x.reshape(-1, x.shape[-1])
    tokens = flat.shape[0]
    shape = (x.shape[-1], second.shape[0] * second.shape[1], first.shape[0], second.shape[0], first.shape[2])
    bucket = _bucket(tokens) if isinstance(tokens, int) else "M"
    ir = _ir(bucket, *map(int, shape), x.dtype, bias is not None, output_order, activation)
    launcher = build(ir, capability_of(x.device), is_interpreted())
    with on_device(x):
        return run(launcher, flat, first, second, bias).reshape(*x.shape[:-1], ir.out_features)


def run(launcher: Launcher, x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    """Launch on x (tokens, in_features), the factors, and a bias."""
    tensors = {"x": x, "first": first, "second": second}
    if bias is not None:
        tensors["bias"] = bias.contiguous()
    return launcher(tensors, {"tokens": x.shape[0]})[0]


def bucketed(ir: BlockLinear) -> BlockLinear:
    """`ir` as its launcher is made for it: a power of two of tokens."""
    return replace(ir, tokens=_bucket(ir.tokens) if isinstance(ir.tokens, int) else "M")


def canonical(ir: BlockLinear) -> BlockLinear:
    """`ir` for any number of tokens: the kernel's text depends on no more."""
    return replace(ir, tokens="M")


@functools.lru_cache(maxsize=1024)
def _ir(
    tokens: int | str,
    in_features: int,
    out_features: int,
    in_blocks: int,
    out_blocks: int,
    rank: int,
    dtype: torch.dtype,
    bias: bool,
    output_order: str,
    activation: str,
) -> BlockLinear:
    options: dict[str, Any] = {"bias": bias, "output_order": output_order, "activation": activation}
    sizes = (in_features, out_features, in_blocks, out_blocks)
    return BlockLinear(MONARCH, tokens, *sizes, rank, dtype, **options)


def _bucket(tokens: int) -> int:
    return min(MOST_TOKENS, 1 << (max(1, tokens) - 1).bit_length())
