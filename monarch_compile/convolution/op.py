"""The operators that carry a long convolution and its gradients through torch.compile, and their backward passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from monarch_compile import autocast as autocasting
from monarch_compile.convolution import correlation, work
from monarch_compile.convolution import reference as meaning
from monarch_compile.convolution.correlation import fitted, reversed_in_time

OPTIONS = ("transform_len", "out_len", "lag", "scale", "out_dtype")
"""The operator's parameters after the tensors, in order; keyword arguments of `reference`."""
GRADIENT_OPTIONS = ("transform_len", "filter_len", "lag", "scale", "filter_dtype")
"""Likewise of `filter_gradient`; keyword arguments of `correlation.filter_gradient`."""


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


@torch.library.triton_op("monarch_compile::long_convolution_twice", mutates_args={})
def long_convolution_twice(
    u: Tensor,
    filter: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor,
    second_gate: Tensor,
    transform_len: int,
    out_len: int,
    lag: int,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Two long convolutions that differ in the gates of their results alone: post_gate and second_gate.

    u is at most transform_len long.
    """
    tensors = (u, filter, skip, pre_gate)
    options: dict[str, Any] = dict(zip(OPTIONS, (transform_len, out_len, lag, float(scale), out_dtype), strict=True))
    with autocasting.switched_off(u.device.type):
        if work.runs_kernels(u.device, u.dtype, filter.dtype, out_dtype, u.shape[-1], out_len):
            from monarch_compile.codegen.convolution.launch import launch_twice

            return launch_twice(*tensors, post_gate, second_gate, **options)
        wide = torch.float64 if torch.float64 in (u.dtype, filter.dtype) else torch.float32
        y = meaning.reference(*tensors, **{**options, "out_dtype": wide})
        one, other = ((y * gate.to(wide)).to(out_dtype).contiguous() for gate in (post_gate, second_gate))
        return one, other


@torch.library.triton_op("monarch_compile::long_convolution_filter_gradient", mutates_args={})
def filter_gradient(
    grad: Tensor,
    u: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    transform_len: int,
    filter_len: int,
    lag: int,
    scale: float,
    filter_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of the filter and of the skip term: `correlation.filter_gradient` is their meaning, and has the shapes.

    On CUDA the emitted kernels run where `work.correlates_on_kernels`. u may be longer than transform_len.
    """
    if u.shape[-1] > transform_len:
        u, pre_gate = u[..., :transform_len], None if pre_gate is None else pre_gate[..., :transform_len]
    tensors = (grad, u, pre_gate, post_gate)
    sizes: dict[str, Any] = {"transform_len": transform_len, "filter_len": filter_len, "lag": lag}
    with autocasting.switched_off(u.device.type):
        if work.correlates_on_kernels(u.device, u.dtype, grad.dtype, filter_dtype, u.shape[-1], grad.shape[-1]):
            from monarch_compile.codegen.convolution import filter_gradient as emitted

            later, earlier, at_zero = emitted.launch(*tensors, **sizes, scale=float(scale), filter_dtype=filter_dtype)
            return correlation.from_lags(later, earlier, **sizes).contiguous(), at_zero
        filtered, at_zero = correlation.filter_gradient(
            *tensors, **sizes, scale=float(scale), filter_dtype=filter_dtype
        )
        return filtered.contiguous(), at_zero


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = dict(zip(OPTIONS, inputs[5:], strict=True))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    with autocasting.switched_off(grad.device.type):
        grads = gradients(grad, *tensors, needed=ctx.needs_input_grad[:5], **ctx.options)
    return (*grads, *[None] * len(OPTIONS))


def _save_inputs_of_two(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = dict(zip(OPTIONS, inputs[6:], strict=True))


def _backward_of_two(ctx: Any, grad: Tensor, second_grad: Tensor) -> tuple[Any, ...]:
    """The sums of what either result gives."""
    u, filter, skip, pre_gate, *gates = ctx.saved_tensors
    *needed, needs_one, needs_other = ctx.needs_input_grad[:6]
    sums: list[Tensor | None] = [None] * 4
    of_gates: list[Tensor | None] = []
    with autocasting.switched_off(grad.device.type):
        for g, gate, needs in zip((grad, second_grad), gates, (needs_one, needs_other), strict=True):
            tensors = (g, u, filter, skip, pre_gate, gate)
            *found, of_gate = gradients(*tensors, needed=(*needed, needs), **ctx.options)
            sums = [x if y is None else y if x is None else x + y for x, y in zip(sums, found, strict=True)]
            of_gates.append(of_gate)
    return (*sums, *of_gates, *[None] * len(OPTIONS))


def _save_gradient_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = dict(zip(GRADIENT_OPTIONS, inputs[4:], strict=True))


def _backward_of_gradient(ctx: Any, of_filter: Tensor, of_skip: Tensor) -> tuple[Any, ...]:
    """Gradients of `filter_gradient`, which is linear in what the convolution of `of_filter` and `of_skip` is linear
    in, and whose product with these is that of `grad` with their convolution."""
    grad, u, pre_gate, post_gate = ctx.saved_tensors
    needs_grad, *needed = ctx.needs_input_grad[:4]
    options = {name: ctx.options[name] for name in ("transform_len", "lag", "scale")}
    skip = of_skip if grad.shape[-1] == u.shape[-1] else None  # else the convolution has no skip term
    tensors = (u, of_filter, skip, pre_gate, post_gate)
    with autocasting.switched_off(grad.device.type):
        sizes = (options["transform_len"], grad.shape[-1], options["lag"], options["scale"])
        of_grad = long_convolution(*tensors, *sizes, grad.dtype) if needs_grad else None
        wanted = (needed[0], False, False, *needed[1:])
        of_u, _, _, of_pre_gate, of_post_gate = gradients(
            grad, *tensors, needed=wanted, out_len=grad.shape[-1], out_dtype=grad.dtype, **options
        )
    return (of_grad, of_u, of_pre_gate, of_post_gate, *[None] * len(GRADIENT_OPTIONS))


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

    Those of u and of the gates are convolutions, of u with the filter reversed in time; those of the filter and of the
    skip term come from a correlation, summed over the batch.
    """
    dtype = torch.float64 if torch.float64 in (u.dtype, filter.dtype) else torch.float32
    grads: list[Tensor | None] = [None] * 5
    if needed[0] or needed[3]:
        h = reversed_in_time(fitted(filter.to(dtype), transform_len))
        seen = min(u.shape[-1], transform_len)
        back = (transform_len, seen, (transform_len - lag) % transform_len, scale)
        if needed[0] and needed[3] and pre_gate is not None:
            gates = (pre_gate[..., :seen], u[..., :seen])
            both = long_convolution_twice(grad, h, skip, post_gate, *gates, *back, u.dtype)
            grads[0], grads[3] = (fitted(g, u.shape[-1]) for g in both)
        else:
            place, factor = (0, pre_gate) if needed[0] else (3, u)
            factor = None if factor is None else factor[..., :seen]
            grads[place] = fitted(long_convolution(grad, h, skip, post_gate, factor, *back, u.dtype), u.shape[-1])
    if needed[1] or needed[2]:
        sizes = (transform_len, filter.shape[-1], lag, scale)
        grads[1], grads[2] = filter_gradient(grad, u, pre_gate, post_gate, *sizes, filter.dtype)
    if needed[4] and post_gate is not None:
        forward = (transform_len, out_len, lag, scale, post_gate.dtype)
        grads[4] = long_convolution(u, filter, skip, pre_gate, grad, *forward)
    inputs = (u, filter, skip, pre_gate, post_gate)
    return tuple(
        g.to(x.dtype) if wanted and g is not None and x is not None else None
        for g, x, wanted in zip(grads, inputs, needed, strict=True)
    )


long_convolution.register_autograd(_backward, setup_context=_save_inputs)
long_convolution_twice.register_autograd(_backward_of_two, setup_context=_save_inputs_of_two)
filter_gradient.register_autograd(_backward_of_gradient, setup_context=_save_gradient_inputs)

CONVOLUTION_OP = torch.ops.monarch_compile.long_convolution.default
