"""A block linear on its kernels: from tensors to the IR of a launcher, and the launch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.launcher import Launcher, build, capability_of, on_device
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.linear import forms
from monarch_compile.linear.ir import BLAST, BLOCKED, FUSED, MONARCH, STAGED, BlockLinear, FormedLinear, LinearGradients

MOST_TOKENS = 8192
"""Schedules look no further than this number of tokens."""

IR = BlockLinear | FormedLinear | LinearGradients


def launch(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_order: str = BLOCKED,
    activation: str = "none",
    form: str = FUSED,
) -> Tensor:
    """A block linear by the emitted kernels; the meaning and the shapes are those of `reference.reference`.

    Tensors are read through their strides; the number of tokens may be symbolic. What is between the factors is rounded
    to their dtype; sums are float32. form: one of `KERNEL_FORMS`.

    Raises:
        CodegenError: the form has no kernels for this kind, dtype, rank or device, or triton is not installed.
    """
    ir = _ir(_shape(x, first, second, coupling), x.dtype, bias is not None, output_order, activation, form)
    launcher = build(ir, capability_of(x.device), is_interpreted())
    flat = x.reshape(-1, x.shape[-1])
    with on_device(x):
        return run(launcher, flat, first, second, coupling, bias).reshape(*x.shape[:-1], ir.of.out_features)


def launch_gradients(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    output_order: str = BLOCKED,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, first and second of a Monarch linear from that of its result before any activation.

    grad (..., out_features), of x's dtype; the gradients have the shapes and the dtype of what they are of, and are
    contiguous; what is not `wanted` is an empty tensor. Formulas: `LinearGradients`. Deterministic: every sum has one
    order. Sums are float32; what is between the products is rounded to x's dtype.

    Raises:
        CodegenError: as for `launch`.
    """
    ir = _gradients_ir(_shape(x, first, second, None), x.dtype, output_order, wanted)
    launcher = build(ir, capability_of(x.device), is_interpreted())
    with on_device(x):
        found = iter(
            run_gradients(launcher, grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), first, second)
        )
    made = [next(found) if is_wanted else x.new_empty(0) for is_wanted in wanted]
    return (made[0].reshape(x.shape) if wanted[0] else made[0], made[1], made[2])


def run(
    launcher: Launcher,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Launch on x (tokens, in_features), the factors, and a bias."""
    tensors = {"x": x, "first": first, "second": second}
    if coupling is not None:
        tensors["coupling"] = coupling
    if bias is not None:
        tensors["bias"] = bias.contiguous()
    return launcher(tensors, {"tokens": x.shape[0]})[0]


def run_gradients(launcher: Launcher, grad: Tensor, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Launch on grad (tokens, out_features), x (tokens, in_features) and the factors; what is wanted, in order."""
    tensors = {"x": x, "first": first, "second": second, "grad": grad}
    return launcher(tensors, {"tokens": x.shape[0]})


def formed(ir: IR) -> FormedLinear | LinearGradients:
    """A block linear in the kernels' form that is predicted to be the fastest; others as they are."""
    if not isinstance(ir, BlockLinear):
        return ir
    return FormedLinear(ir, forms.usual(ir))


def gradients_of(ir: IR) -> LinearGradients | None:
    """What stands for the gradients of a block linear, where they have kernels."""
    if not isinstance(ir, BlockLinear) or ir.kind != MONARCH or forms.why_not(ir, STAGED):
        return None
    return LinearGradients(replace(ir, bias=False, activation="none"))


def bucketed(ir: IR) -> FormedLinear | LinearGradients:
    """`ir` as its launcher is made for it: a power of two of tokens."""
    return _with_tokens(ir, _bucket(ir.tokens))


def canonical(ir: IR) -> FormedLinear | LinearGradients:
    """`ir` for any number of tokens: the kernels' text depends on no more."""
    return _with_tokens(ir, "M")


def _with_tokens(ir: IR, tokens: int | str) -> FormedLinear | LinearGradients:
    own = formed(ir)
    return replace(own, of=replace(own.of, tokens=tokens))


Shape = tuple[str, int | str, int, int, int, int, int]


def _shape(x: Tensor, first: Tensor, second: Tensor, coupling: Tensor | None) -> Shape:
    """The fields of an IR, of kind to rank."""
    tokens: Any = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    sizes = (x.shape[-1], second.shape[0] * second.shape[1], first.shape[0], second.shape[0], first.shape[-2])
    kind = MONARCH if coupling is None else BLAST
    return (kind, _bucket(tokens), *(int(size) for size in sizes))  # type: ignore[return-value]


@functools.lru_cache(maxsize=1024)
def _ir(shape: Shape, dtype: torch.dtype, bias: bool, output_order: str, activation: str, form: str) -> FormedLinear:
    of = BlockLinear(*shape, dtype, bias=bias, output_order=output_order, activation=activation)
    return FormedLinear(of, form)


@functools.lru_cache(maxsize=1024)
def _gradients_ir(
    shape: Shape, dtype: torch.dtype, output_order: str, wanted: tuple[bool, bool, bool]
) -> LinearGradients:
    return LinearGradients(BlockLinear(*shape, dtype, output_order=output_order), *wanted)


def _bucket(tokens: Any) -> int | str:
    return min(MOST_TOKENS, 1 << (max(1, tokens) - 1).bit_length()) if isinstance(tokens, int) else "M"
