"""What a cost model says of any family's site: its work, and the times of both forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Quantity = Any
"""An int, or a sympy expression in the symbolic sizes of an IR."""

MARGIN = 1.1
"""The Monarch form is worth lowering to only where it is predicted to be this many times faster."""


@dataclass(frozen=True)
class Cost:
    """Work of one site, all batches and heads: ints, or sympy expressions where a size is symbolic.

    flops: floating-point operations of the matrix products, a multiply-add counted as two.
    bytes: bytes moved between memory and kernels.
    exps: elements that pass through a softmax.
    """

    flops: Quantity
    bytes: Quantity
    exps: Quantity

    def __str__(self) -> str:
        return f"{self.flops} FLOP, {self.bytes} bytes, {self.exps} exponentials"


@dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one forward pass of a site, and of the backward pass where its calls train.

    They are those by which the site makes its graph take longer: of the device, or of the host where that is the limit.
    """

    exact_s: float
    monarch_s: float

    @property
    def speedup(self) -> float:
        """How many times faster the Monarch form is predicted to be."""
        return self.exact_s / self.monarch_s

    @property
    def pays(self) -> bool:
        """Whether the Monarch form wins by more than the margin that guards against a wrong prediction."""
        return self.speedup >= MARGIN
