"""The operator that carries a block linear through torch.compile, and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monarch_compile import autocast as autocasting
from monarch_compile.linear import ir, selection
from monarch_compile.linear import reference as meaning

aten = torch.ops.aten

OPTIONS = ("output_order", "activation")
"""The operator's parameters after the tensors, in order; keyword arguments of `reference`. The last one is `form`."""


@torch.library.triton_op("monarch_compile::block_linear", mutates_args={})
def block_linear(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None,
    bias: Tensor | None,
    output_order: str,
    activation: str,
    form: str = "auto",
) -> Tensor:
    """A block linear: `reference` is its meaning, on every device.

    x: (..., in_features) -> (..., out_features), contiguous. Factors as in `BlockLinear`; coupling: BLAST's.
    form: how it is computed: one of `forms.REQUESTS`. "auto": as is predicted to be the fastest for the number of
    tokens. "kernels": likewise, of the emitted kernels, where the device has any. A form by its name runs, or raises.

    Raises:
        InputError: shapes, dtypes or options do not fit together.
        CodegenError: a form is asked for that has no kernels for these shapes, or on this device.
    """
    # Functions are called by way of modules: triton_op reads all sources behind other names, in search of kernels.
    meaning.require_fit(x, first, second, coupling, bias, output_order, activation)
    chosen = selection.form_for(x, first, second, coupling, form)
    with autocasting.switched_off(x.device.type):
        if chosen in ir.KERNEL_FORMS:
            from monarch_compile.codegen.linear.launch import launch

            return launch(
                x, first, second, coupling, bias, output_order=output_order, activation=activation, form=chosen
            )
        by = meaning.dense if chosen == ir.DENSE else meaning.reference
        return by(x, first, second, coupling, bias, output_order=output_order, activation=activation)


@torch.library.triton_op("monarch_compile::block_linear_gradients", mutates_args={})
def block_linear_gradients(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    output_order: str,
    of_x: bool,
    of_first: bool,
    of_second: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, first and second of a Monarch linear without an activation, by the emitted kernels.

    grad: (..., out_features). What is not wanted is an empty tensor. It has no gradients of its own.

    Raises:
        CodegenError: no kernels exist for these shapes, or on this device.
    """
    from monarch_compile.codegen.linear.launch import launch_gradients

    with autocasting.switched_off(x.device.type):
        return launch_gradients(grad, x, first, second, output_order=output_order, wanted=(of_x, of_first, of_second))


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = dict(zip(OPTIONS, inputs[5:7], strict=True))
    ctx.form = inputs[7]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By the kernels where the operator ran on some; gradients of gradients, which are asked for while gradients are
    recorded, by products."""
    needed = ctx.needs_input_grad[:5]
    with autocasting.switched_off(grad.device.type):
        x, first, second, coupling, bias = ctx.saved_tensors
        on_kernels = selection.has_gradient_kernels(grad, x, first, second, coupling, ctx.form)
        if on_kernels and not torch.is_grad_enabled():
            tensors = (grad, x, first, second, coupling, bias)
            grads = gradients_on_kernels(*tensors, needed=needed, form=ctx.form, **ctx.options)
        else:
            grads = gradients(grad, x, first, second, coupling, bias, needed=needed, **ctx.options)
    return (*grads, *[None] * (1 + len(OPTIONS)))


def gradients_on_kernels(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None,
    bias: Tensor | None,
    *,
    needed: tuple[bool, ...],
    output_order: str,
    activation: str,
    form: str,
) -> tuple[Tensor | None, ...]:
    """As `gradients`, of a Monarch linear, by the emitted kernels."""
    if activation != "none":
        y = block_linear(x, first, second, coupling, bias, output_order, "none", form)
        grad = DERIVATIVES[activation](grad, y)
    grads: list[Tensor | None] = [None] * 5
    if needed[4]:
        grads[4] = grad.reshape(-1, grad.shape[-1]).sum(0)
    wanted = (needed[0], needed[1], needed[2])
    if any(wanted):
        grads[:3] = block_linear_gradients(grad, x, first, second, output_order, *wanted)
    return tuple(g if is_needed else None for g, is_needed in zip(grads, needed, strict=True))


DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda grad, y: grad,
    "relu": lambda grad, y: aten.threshold_backward(grad, y, 0),
    "gelu": lambda grad, y: aten.gelu_backward(grad, y),
    "gelu_tanh": lambda grad, y: aten.gelu_backward(grad, y, approximate="tanh"),
    "silu": lambda grad, y: grad * torch.sigmoid(y) * (1 + y * (1 - torch.sigmoid(y))),
}
"""Gradients of activations, of their output's gradient and their input."""


def gradients(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None,
    bias: Tensor | None,
    *,
    needed: tuple[bool, ...],
    output_order: str,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, first, second, coupling and bias; None where one is not `needed`.

    What is between the products is computed again: it may be several times as large as x.
    """
    z = meaning.between(x, first, coupling)
    is_blast = coupling is not None
    g = grad.reshape(-1, grad.shape[-1])
    if activation != "none":
        y = meaning.features(meaning.outwards(z, second, is_blast), output_order)
        g = DERIVATIVES[activation](g, y if bias is None else y + bias)
    grads: list[Tensor | None] = [None] * 5
    if needed[4]:
        grads[4] = g.sum(0)
    blocks = meaning.blocks_of(g, second.shape[0], output_order).transpose(0, 1)  # (L, tokens, Q)
    if needed[2]:
        grads[2] = torch.bmm(blocks.mT, z).reshape(second.shape)
    if needed[0] or needed[1] or needed[3]:
        factor = second if is_blast else second.reshape(*second.shape[:2], -1)
        dz = torch.bmm(blocks, factor)  # as `between` gives it
        parts = _through_first(dz, x, first, coupling, needed)
        grads[0], grads[1], grads[3] = parts
    return tuple(g if wanted else None for g, wanted in zip(grads, needed, strict=True))


def _through_first(
    dz: Tensor, x: Tensor, first: Tensor, coupling: Tensor | None, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, first and coupling, of that of what is between the products."""
    blocks, width = first.shape[0], first.shape[-1]
    inwards = x.reshape(-1, blocks, width).transpose(0, 1)  # (K, tokens, P)
    grad_coupling: Tensor | None = None
    if coupling is None:
        out_blocks, rank = first.shape[1:3]
        factor = first.reshape(blocks, out_blocks * rank, width)
        dh = dz.reshape(*dz.shape[:2], blocks, rank).permute(2, 1, 0, 3).flatten(2)
    else:
        factor = first
        by_rank = dz.permute(2, 1, 0)  # (rank, tokens, L)
        dh = torch.bmm(by_rank, coupling.permute(2, 0, 1)).permute(2, 1, 0)  # (K, tokens, rank)
        if needed[3]:
            z = torch.bmm(inwards, first.mT)
            grad_coupling = torch.bmm(by_rank.mT, z.permute(2, 1, 0)).permute(1, 2, 0)
    grad_x = torch.bmm(dh, factor).transpose(0, 1).reshape(x.shape) if needed[0] else None
    grad_first = torch.bmm(dh.mT, inwards).reshape(first.shape) if needed[1] else None
    return grad_x, grad_first, grad_coupling


block_linear.register_autograd(_backward, setup_context=_save_inputs)

LINEAR_OP = torch.ops.monarch_compile.block_linear.default
