"""A small attention through the backend: whether a machine gets its numbers right."""

from __future__ import annotations

import types
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
    dtype = DTYPES[torch.device(device).type]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    fresh = types.FunctionType(attention.__code__.replace(), attention.__globals__)  # Dynamo caches by code object
    options: dict[str, Any] = {"policy": "always", "strict": True, **FORM}
    compiled = torch.compile(fresh, backend="monarch", options=options, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(3))
    expected = reference(q.double(), k.double(), v.double(), None, scale=SHAPE[-1] ** -0.5, **FORM)
    with torch.no_grad():
        return relative_error(expected, compiled(q, k, v))
