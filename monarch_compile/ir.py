"""What the IR values of all families share. A value is frozen, hashable, equal by value, and prints on one line."""

from __future__ import annotations

import torch

Dim = int | str
"""A size: an int, or the name of a symbolic size such as ``"s0"``."""

DTYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.float64: "f64"}
