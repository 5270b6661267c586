"""The operators that carry Monarch attention, and its gradients, through torch.compile."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monarch_compile import autocast as autocasting
from monarch_compile.attention import gradients
from monarch_compile.attention import reference as meaning
from monarch_compile.attention.gradients import OPTIONS


def _takes_options(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Operators take their options after their tensors, in the order of `gradients.named`; schemas are read from
    signatures."""
    own = inspect.signature(fn, eval_str=True)
    tensors = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    options = inspect.signature(gradients.named, eval_str=True).parameters.values()
    fn.__signature__ = own.replace(parameters=[*tensors, *options])  # type: ignore[attr-defined]
    return fn


# Bodies of operators call functions by way of modules: triton_op reads all sources behind other names, in search of
# kernels.


@torch.library.triton_op("monarch_compile::attention", mutates_args={})
@_takes_options
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    *values: Any,
) -> Tensor:
    """Monarch attention: `reference` is its meaning; on CUDA the emitted kernels run, elsewhere the reference itself.

    Shapes as in `reference`. A triton_op is traced through, so Inductor fuses the reference on CPU and sees the kernels
    on CUDA.
    """
    options = gradients.named(*values)
    with autocasting.switched_off(q.device.type):  # it would cast the float32 that 16-bit inputs are computed in
        if q.device.type != "cuda" or q.dtype == torch.float64:
            return meaning.reference(q, k, v, key_mask, **options)
        from monarch_compile.codegen.attention.launch import launch

        return launch(q, k, v, key_mask, **options)


@torch.library.triton_op("monarch_compile::attention_with_lse", mutates_args={})
@_takes_options
def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    *values: Any,
) -> tuple[Tensor, Tensor]:
    """`attention`, and what its backward kernels need beside it: `reference_with_lse` is the meaning.

    A site that is differentiated calls it in place of `attention`, whose arguments it has. The second result has no
    gradient.
    """
    options = gradients.named(*values)
    with autocasting.switched_off(q.device.type):
        if not gradients.run_on_kernels(q, k, values):
            return meaning.reference_with_lse(q, k, v, key_mask, **options)
        from monarch_compile.codegen.attention.gradients import launch_with_lse

        return launch_with_lse(q, k, v, key_mask, **options)


@torch.library.triton_op("monarch_compile::attention_backward", mutates_args={})
@_takes_options
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    output: Tensor,
    lse: Tensor,
    *values: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of a floating key_mask, by kernels; that of any other mask is empty.

    grad: of the output (E, H, N, D_v). output, lse: the results of `attention_with_lse`.

    Raises:
        CodegenError: there are no kernels for this form, dtype or device.
    """
    from monarch_compile.codegen.attention.gradients import launch_backward

    options = gradients.named(*values)
    with autocasting.switched_off(q.device.type):
        grad_q, grad_k, grad_v, grad_bias = launch_backward(grad, q, k, v, key_mask, output, lse, **options)
        return grad_q, grad_k, grad_v, q.new_empty(0) if grad_bias is None else grad_bias


def attention_under_transforms(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, *options: Any) -> Tensor:
    """The operator's arguments and result, for torch.func and forward mode: the operator has no rules for these.

    Without this, forward mode would lose the tangents without an error.
    """
    with autocasting.switched_off(q.device.type):
        return meaning.reference(q, k, v, key_mask, **gradients.named(*options))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The inputs, and both results of `attention_with_lse` where kernels read them again."""
    q, k, v, key_mask, *options = inputs
    results: tuple[Tensor, ...] = ()
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
        results = output if gradients.run_on_kernels(q, k, options) else ()
    ctx.save_for_backward(q, k, v, key_mask, *results)
    ctx.options = options


def _backward(ctx: Any, grad: Tensor, *_of_lse: Tensor) -> tuple[Any, ...]:
    """Gradients of q, k, v and a floating key_mask; None where none is wanted.

    By kernels where the form has them. A backward pass that is differentiated itself takes the reference's gradients.
    """
    q, k, v, key_mask, *results = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    with autocasting.switched_off(q.device.type):
        if results and not torch.is_grad_enabled():
            found = attention_backward(grad, q, k, v, key_mask, *results, *ctx.options)
            own = (x if needed else None for x, needed in zip(found, wanted, strict=True))
            grads = tuple(g if g is None else g.to(x.dtype) for g, x in zip(own, (q, k, v, key_mask), strict=True))
        else:
            grads = gradients.by_reference(grad, (q, k, v, key_mask), wanted, ctx.options)
    return (*grads, *[None] * len(OPTIONS))


attention.register_autograd(_backward, setup_context=_save)
attention_with_lse.register_autograd(_backward, setup_context=_save)

ATTENTION_OP = torch.ops.monarch_compile.attention.default
ATTENTION_WITH_LSE_OP = torch.ops.monarch_compile.attention_with_lse.default
ATTENTION_BACKWARD_OP = torch.ops.monarch_compile.attention_backward.default
