"""Block linears as kernels compute them, and how wrong they are against float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.launcher import Launcher, untraced
from monarch_compile.codegen.linear.launch import bucketed, launch, launch_gradients, run
from monarch_compile.codegen.linear.schedule import Schedule
from monarch_compile.codegen.linear.search import expected, inputs
from monarch_compile.linear.ir import MONARCH, STAGED, BlockLinear, FormedLinear, LinearGradients
from monarch_compile.linear.reference import reference

HALF = torch.float16
CPU = torch.device("cpu")


def formed(form: str, **changes: Any) -> FormedLinear:
    """23 tokens, 2 x 3 blocks of 20 x 18 features, nothing a multiple of a tile."""
    return FormedLinear(replace(BlockLinear(MONARCH, 23, 36, 60, 2, 3, 5, HALF, bias=True), **changes), form)


def relative(found: Tensor, wanted: Tensor, size: Tensor | None = None) -> float:
    """The Frobenius error, relative to that of `size`; not a number where there is one, and then below no bound."""
    norm = (wanted if size is None else size).norm()
    return float((found.double() - wanted).norm() / (norm if norm else 1))


def error_of(
    ir: FormedLinear, schedule: Schedule | None = None, device: torch.device = CPU, few_terms: bool = False
) -> float:
    """That of the forward pass, under a schedule or the shipped one.

    few_terms: relative to the sums of the terms' absolute values: few terms may cancel, which leaves their roundings.
    """
    tensors: Any = inputs(ir, device)
    if schedule is None:
        options = {"output_order": ir.of.output_order, "activation": ir.of.activation, "form": ir.form}
        found = untraced(lambda: launch(*tensors, **options))()
    else:
        found = untraced(lambda: run(Launcher(bucketed(ir), schedule), *tensors))()
    assert found.dtype is ir.of.dtype
    size = expected(ir, tuple(None if t is None else t.abs() for t in tensors)) if few_terms else None
    return relative(found, expected(ir, tensors), size)


def gradient_errors(ir: LinearGradients, device: torch.device, few_terms: bool = False) -> list[float]:
    """Those of the gradients that are wanted; few_terms: as for `error_of`."""
    of = ir.of
    x, first, second, _, _ = inputs(FormedLinear(of, STAGED), device)
    assert x is not None
    assert first is not None
    assert second is not None
    grad = torch.randn(x.shape[0], of.out_features, device=device).to(of.dtype)
    wanted = (ir.of_x, ir.of_first, ir.of_second)
    options: Any = {"output_order": of.output_order, "wanted": wanted}
    found = untraced(lambda: launch_gradients(grad, x, first, second, **options))()
    again = untraced(lambda: launch_gradients(grad, x, first, second, **options))()
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

    def exact(*given: Tensor) -> tuple[Tensor, ...]:
        *leaves, of_y = (t.double().requires_grad_() for t in given)
        return torch.autograd.grad(reference(*leaves, output_order=of.output_order), leaves, of_y)

    tensors = (x, first, second, grad)
    sizes = exact(*(t.abs() for t in tensors)) if few_terms else (None,) * 3
    each = zip(found, exact(*tensors), sizes, wanted, strict=True)
    return [relative(own, other, size) for own, other, size, is_wanted in each if is_wanted]
