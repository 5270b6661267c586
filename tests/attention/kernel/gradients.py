"""How the gradients of a problem are checked against those of the float64 reference."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from monarch_compile.attention.reference import reference
from monarch_compile.codegen.attention import gradients
from monarch_compile.codegen.attention.gradient_ir import GradientsOf
from monarch_compile.codegen.attention.gradient_schedule import GradientSchedule
from monarch_compile.codegen.launcher import Launcher, build
from tests.attention.kernel.problems import Case, layout, tensors

ILL_CONDITIONED = 4.0
"""A bias may leave one key nearly all weight. Gradients of scores are then differences of almost equal numbers, and the
reference in float32 is outside of its own bound: kernels may be this many times as far off."""

Change = Callable[[GradientSchedule], GradientSchedule]


@contextlib.contextmanager
def scheduled(change: Change) -> Iterator[None]:
    """While this lasts, the kernels of gradients run under a changed schedule."""

    def changed(ir: Any, capability: Any, interpreted: bool) -> Launcher:
        shipped = build(ir, capability, interpreted)
        return Launcher(ir, change(shipped.schedule)) if isinstance(ir, GradientsOf) else shipped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "build", functools.cache(changed))
        yield


def reference_gradients(
    case: Case, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dz: Tensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reference's output in a dtype, and its gradients of q, k, v and of a floating mask."""
    given = [x.to(dtype) for x in (q, k, v)]
    if mask is not None and mask.is_floating_point():
        given.append(mask.to(dtype))

    def of(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference(q, k, v, mask if bias is None else bias, **case.options)

    output, vjp = torch.func.vjp(of, *given)
    return output, vjp(dz.to(dtype))


def run_backward(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """The kernels' output, the logsumexps of its rows, and the gradients."""
    q, k, v, mask = tensors(case, dtype, device)
    z, lse = gradients.launch_with_lse(q, k, v, mask, **case.options)
    dz = given_gradient(case, z)
    found = gradients.launch_backward(dz, q, k, v, mask, z, lse, **case.options)
    return (z, lse, *(x for x in found if x is not None))


def given_gradient(case: Case, z: Tensor) -> Tensor:
    """Standard normal, in the case's layout."""
    generator = torch.Generator().manual_seed(7)
    return layout(torch.randn(z.shape, generator=generator).to(z.device, z.dtype), case.layout)


def check_backward(case: Case, dtype: torch.dtype, device: str) -> None:
    """Run the kernels of `case` and compare with the float64 reference, within the bound of the forward pass."""
    q, k, v, mask = tensors(case, dtype, device)
    z, _, *found = run_backward(case, dtype, device)
    dz = given_gradient(case, z)
    output, expected = reference_gradients(case, q, k, v, mask, dz, torch.float64)
    assert_close(z, output)
    assert len(found) == len(expected)
    for place, (gradient, right) in enumerate(zip(found, expected, strict=True)):
        of_bias = place == len("qkv")
        assert gradient.dtype == (torch.float32 if of_bias else dtype)
        assert gradient.shape == right.shape
        assert of_bias or gradient.transpose(1, 2).is_contiguous()
        try:
            assert_close(gradient.to(dtype), right)
        except AssertionError:
            if dtype != torch.float32 or not gradient.isfinite().all():
                raise
            plain = reference_gradients(case, q, k, v, mask, dz, torch.float32)[1][place]
            assert (gradient - right).norm() <= ILL_CONDITIONED * (plain - right).norm()
