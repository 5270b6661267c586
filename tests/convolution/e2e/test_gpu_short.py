"""Short depthwise convolutions on a CUDA device: compiled sums are no less accurate than PyTorch's kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fft import irfft, rfft

from monarch_compile.backend import monarch

pytestmark = pytest.mark.gpu

WIDTH, LENGTH = 768, 4096

Given = tuple[Tensor, Tensor, Tensor, Tensor]


def mixer(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """As in Monarch Mixer; the second result is what the short convolution gave to the gate after the long one."""
    x1, x2, v = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=3 * WIDTH).chunk(3, 1)
    u, points = v * x1, 2 * x.shape[1]
    y = irfft(rfft(u.float(), n=points) * rfft(k.float(), n=points), n=points)[..., : x.shape[1]]
    return y.to(u.dtype) * x2, x2 * 1


def _given(dtype: torch.dtype) -> Given:
    torch.manual_seed(0)
    x = torch.randn(4, LENGTH, 3 * WIDTH, device="cuda").to(dtype)
    weight, bias = (
        torch.randn(3 * WIDTH, 1, 3, device="cuda").to(dtype),
        torch.randn(3 * WIDTH, device="cuda").to(dtype),
    )
    return x, weight, bias, torch.randn(WIDTH, LENGTH, device="cuda") / LENGTH**0.5


def _compiled(**options: object) -> Callable[..., tuple[Tensor, Tensor]]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(mixer, backend=monarch, options=options, fullgraph=True, dynamic=False)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_as_accurate_as_pytorchs_kernel(dtype: torch.dtype) -> None:
    given = _given(dtype)
    wanted = mixer(*(tensor.double() for tensor in given))
    with torch.no_grad():
        ours = _compiled()(*given)
        assert counters["monarch"]["lowered"] == 1
        theirs = _compiled(short_convolutions=False)(*given)
    for found, other, exact in zip(ours, theirs, wanted, strict=True):
        assert _error(found, exact) <= 1.05 * _error(other, exact)


def test_gradients() -> None:
    given = tuple(tensor.requires_grad_() for tensor in _given(torch.bfloat16))
    exact = tuple(tensor.detach().double().requires_grad_() for tensor in given)
    weight = torch.randn(4, WIDTH, LENGTH, device="cuda", dtype=torch.float64)
    wanted = torch.autograd.grad((mixer(*exact)[0] * weight).sum(), exact)
    found = []
    for options in ({}, {"short_convolutions": False}):
        y = _compiled(**options)(*given)[0]
        found.append(torch.autograd.grad(y, given, weight.to(y.dtype)))
    for own, other, right in zip(*found, wanted, strict=True):
        assert _error(own, right) <= 1.1 * _error(other, right)
