"""A small attention through the backend, and its gradients: whether a machine gets its numbers right."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.reference import reference
from monarch_compile.calibration.metrics import relative_error

SHAPE = (1, 2, 64, 16)
"""(batch, num_heads, seq_len, head_dim)."""
FORM: dict[str, Any] = {"block_size": 16, "window": None}
DTYPES = {"cpu": torch.float32, "cuda": torch.float16}
BOUNDS = {"cpu": 1e-5, "cuda": 5e-3}
"""For each type of device the dtype, and the largest relative error that passes."""


def error(device: str) -> float:
    """The relative error of one attention, compiled for `device`, against the float64 reference."""
    q, k, v = _inputs(device)
    with torch.no_grad():
        return relative_error(_expected(q, k, v), _compiled()(q, k, v))


def gradient_error(device: str) -> float:
    """The largest relative error of its gradients of queries, keys and values; what is differentiated is the sum of
    squares of the output."""
    given = [x.requires_grad_() for x in _inputs(device)]
    exact = [x.detach().double().requires_grad_() for x in given]
    found = torch.autograd.grad(_compiled()(*given).float().square().sum(), given)
    expected = torch.autograd.grad(_expected(*exact).square().sum(), exact)
    return max(relative_error(right, x) for right, x in zip(expected, found, strict=True))


def _inputs(device: str) -> list[Tensor]:
    """Queries, keys and values, standard normal."""
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES[torch.device(device).type]
    return [torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(3)]


def _expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference(q.double(), k.double(), v.double(), None, scale=SHAPE[-1] ** -0.5, **FORM)


def _compiled() -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    fresh = types.FunctionType(attention.__code__.replace(), attention.__globals__)  # Dynamo caches by code object
    options: dict[str, Any] = {"policy": "always", "strict": True, **FORM}
    compiled: Callable[..., Tensor] = torch.compile(fresh, backend="monarch", options=options, dynamic=False)
    return compiled
