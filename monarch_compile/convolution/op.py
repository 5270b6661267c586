"""The operator that carries a long convolution through torch.compile, and its backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monarch_compile import autocast as autocasting
from monarch_compile.convolution import reference as meaning
from monarch_compile.convolution import work

OPTIONS = ("transform_len", "out_len", "lag", "scale", "out_dtype")
"""The operator's parameters after the tensors, in order; keyword arguments of `reference`."""


@torch.library.triton_op("monarch_compile::long_convolution", mutates_args={})
def long_convolution(
    u: Tensor,
    filter: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    transform_len: int,
    out_len: int,
    lag: int,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """A long convolution: `reference` is its meaning; on CUDA the emitted kernels run where `work.runs_kernels`.

    Shapes as in `reference`. The result is contiguous.
    """
    # Functions are called by way of modules: triton_op reads all sources behind other names, in search of kernels.
    if u.shape[-1] > transform_len:
        u, pre_gate = u[..., :transform_len], None if pre_gate is None else pre_gate[..., :transform_len]
    tensors = (u, filter, skip, pre_gate, post_gate)
    options: dict[str, Any] = dict(zip(OPTIONS, (transform_len, out_len, lag, float(scale), out_dtype), strict=True))
    with autocasting.switched_off(u.device.type):
        if work.runs_kernels(u.device, u.dtype, filter.dtype, out_dtype, u.shape[-1], out_len):
            from monarch_compile.codegen.convolution.launch import launch

            return launch(*tensors, **options)
        return meaning.reference(*tensors, **options).contiguous()


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = dict(zip(OPTIONS, inputs[5:], strict=True))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    with autocasting.switched_off(grad.device.type):
        grads = gradients(grad, *tensors, needed=ctx.needs_input_grad[:5], **ctx.options)
    return (*grads, *[None] * len(OPTIONS))


def gradients(
    grad: Tensor,
    u: Tensor,
    filter: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    *,
    needed: tuple[bool, ...],
    transform_len: int,
    out_len: int,
    lag: int,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, filter, skip, pre_gate and post_gate; None where one is not `needed`.

    Those of u and of the gates are convolutions, of u with the filter reversed in time; that of the filter is a
    correlation, summed over the batch, by FFTs.
    """
    dtype = torch.float64 if torch.float64 in (u.dtype, filter.dtype) else torch.float32
    grads: list[Tensor | None] = [None] * 5
    if needed[0] or needed[3]:
        h = fitted(filter.to(dtype), transform_len)
        reversed_filter = torch.cat((h[:, :1], h[:, 1:].flip(-1)), -1)
        seen = min(u.shape[-1], transform_len)
        back = (transform_len, seen, (transform_len - lag) % transform_len, scale)
        for place, factor in ((0, pre_gate), (3, u)):
            if needed[place]:
                factor = None if factor is None else factor[..., :seen]
                g = long_convolution(grad, reversed_filter, skip, post_gate, factor, *back, u.dtype)
                grads[place] = fitted(g, u.shape[-1])
    if needed[1] or needed[2]:
        v = u.to(dtype) if pre_gate is None else u.to(dtype) * pre_gate.to(dtype)
        grad_y = grad.to(dtype) if post_gate is None else grad.to(dtype) * post_gate.to(dtype)
    if needed[1]:
        spectrum = torch.fft.rfft(grad_y, transform_len) * torch.fft.rfft(v, transform_len).conj()
        correlation = torch.fft.irfft(spectrum.sum(0), transform_len).roll(lag, -1) * scale
        grads[1] = fitted(correlation, filter.shape[-1])
    if needed[2]:
        grads[2] = (grad_y * v).sum((0, 2))
    if needed[4] and post_gate is not None:
        forward = (transform_len, out_len, lag, scale, post_gate.dtype)
        grads[4] = long_convolution(u, filter, skip, pre_gate, grad, *forward)
    inputs = (u, filter, skip, pre_gate, post_gate)
    return tuple(
        g.to(x.dtype) if wanted and g is not None and x is not None else None
        for g, x, wanted in zip(grads, inputs, needed, strict=True)
    )


def fitted(x: Tensor, length: int) -> Tensor:
    """x (..., n), padded with zeros or cut to `length`."""
    return torch.nn.functional.pad(x, (0, length - x.shape[-1])) if x.shape[-1] < length else x[..., :length]


long_convolution.register_autograd(_backward, setup_context=_save_inputs)

CONVOLUTION_OP = torch.ops.monarch_compile.long_convolution.default
