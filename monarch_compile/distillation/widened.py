"""Distillation computes in float32 what a model computes in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

HALF = frozenset({torch.float16, torch.bfloat16})


def widened(value: Any) -> Any:
    """A tensor of 16 bits as float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value
