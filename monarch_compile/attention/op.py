"""The operator that carries Monarch attention through torch.compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_compile import autocast as autocasting
from monarch_compile.attention import reference as meaning
from monarch_compile.attention.form import FORM_OPTIONS

OPTIONS = ("scale", *FORM_OPTIONS, "grid")
"""The operator's parameters after q, k, v and key_mask, in order; keyword arguments of `reference`."""


@torch.library.triton_op("monarch_compile::attention", mutates_args={})
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    block_size: int,
    num_iters: int,
    init: str,
    pad: str,
    window: int | None,
    prefix: int,
    tile: Sequence[int] | None = None,
    window_shape: str = "box",
    grid: Sequence[int] | None = None,
) -> Tensor:
    """Monarch attention: `reference` is its meaning; on CUDA the emitted kernels run, elsewhere the reference itself.

    Shapes as in `reference`. A triton_op is traced through, so Inductor fuses the reference on CPU and sees the kernels
    on CUDA.
    """
    # Functions are called by way of modules: triton_op reads all sources behind other names, in search of kernels.
    # Under dynamic shapes a caller's numbers may come as symbols: these are part of what is computed.
    sizes = int(block_size), int(num_iters), init, pad, None if window is None else int(window), int(prefix)
    extents = None if tile is None else tuple(map(int, tile))
    values = (float(scale), *sizes, extents, window_shape, None if grid is None else tuple(grid))
    options: dict[str, Any] = dict(zip(OPTIONS, values, strict=True))
    with autocasting.switched_off(q.device.type):  # it would cast the float32 that 16-bit inputs are computed in
        if q.device.type != "cuda" or q.dtype == torch.float64:
            return meaning.reference(q, k, v, key_mask, **options)
        from monarch_compile.codegen.attention.launch import launch

        return launch(q, k, v, key_mask, **options)


def attention_under_transforms(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *options: float | int | str | Sequence[int] | None
) -> Tensor:
    """The operator's arguments and result, for torch.func and forward mode: the operator has no rules for these.

    Without this, forward mode would lose the tangents without an error.
    """
    named: dict[str, Any] = dict(zip(OPTIONS, options, strict=True))
    with autocasting.switched_off(q.device.type):
        return meaning.reference(q, k, v, key_mask, **named)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, key_mask, *options = inputs
    ctx.save_for_backward(q, k, v, key_mask)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of the reference, a floating key_mask's too: the kernels have no backward of their own yet."""
    q, k, v, key_mask = ctx.saved_tensors
    options = dict(zip(OPTIONS, ctx.options, strict=True))
    given = (q, k, v) if key_mask is None or not key_mask.is_floating_point() else (q, k, v, key_mask)

    def again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = key_mask) -> Tensor:
        return meaning.reference(q, k, v, mask, **options)

    with autocasting.switched_off(q.device.type):
        grads = torch.func.vjp(again, *given)[1](grad)
    return (*grads, *[None] * (4 - len(grads)), *[None] * len(OPTIONS))


attention.register_autograd(_backward, setup_context=_save_inputs)

ATTENTION_OP = torch.ops.monarch_compile.attention.default
