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


def relative(found: Tensor, wanted: Tensor) -> float:
    """The Frobenius error; not a number where there is one, and then below no bound."""
    size = wanted.norm()
    return float((found.double() - wanted).norm() / (size if size else 1))


def error_of(ir: FormedLinear, schedule: Schedule | None = None, device: torch.device = CPU) -> float:
    """That of the forward pass, under a schedule or the shipped one."""
    tensors: Any = inputs(ir, device)
    if schedule is None:
        options = {"output_order": ir.of.output_order, "activation": ir.of.activation, "form": ir.form}
        found = untraced(lambda: launch(*tensors, **options))()
    else:
        found = untraced(lambda: run(Launcher(bucketed(ir), schedule), *tensors))()
    assert found.dtype is ir.of.dtype
    return relative(found, expected(ir, tensors))


def gradient_errors(ir: LinearGradients, device: torch.device) -> list[float]:
    """Those of the gradients that are wanted."""
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
    leaves = [t.double().requires_grad_() for t in (x, first, second)]
    y = reference(*leaves, output_order=of.output_order)
    exact = torch.autograd.grad(y, leaves, grad.double())
    pairs = zip(found, exact, wanted, strict=True)
    return [relative(own, other) for own, other, is_wanted in pairs if is_wanted]
