"""What a block linear costs: as one operator, as its two products are spelled by hand, and as the dense product."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from monarch_compile.calls import DEVICE_ALONE, Calls
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import Cost, Prediction
from monarch_compile.cost.sizes import known, quantity
from monarch_compile.linear.ir import MONARCH, BlockLinear

REACHED = 0.9
"""Share of a GPU's best rate that products of thousands of rows reach."""
OVERLAP = 1.6
"""Exponent with which the times of products and of memory combine, as in `Device.overlap`."""
LAUNCHES = {"dense": 1, "monarch": 3, "blast": 5}
"""Kernels that Inductor makes of a form. The first one's launch is in the rates."""
MOVED_BETWEEN = 4
"""How often Monarch's values between the products cross the memory: written, permuted by a copy, read."""
MOVED_OUT = 3
"""The same for the result: written by a batched product in the order of blocks, then permuted by a copy."""


@dataclass(frozen=True)
class Times:
    """Predicted seconds of one forward pass: dense product, and the factors."""

    dense_s: float
    factors_s: float

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense product the factors are predicted to be."""
        return self.dense_s / self.factors_s


def cost(ir: BlockLinear) -> Cost:
    """Work of one kernel that keeps what is between the products on chip: the least that any form needs."""
    tokens = quantity(ir.tokens)
    numbers = ir.parameters + ir.bias * ir.out_features
    return Cost(2 * tokens * ir.parameters, (tokens * _ends(ir) + numbers) * ir.dtype.itemsize, 0)


def spelled_cost(ir: BlockLinear) -> Cost:
    """Work of the products as Inductor runs them: it writes and reads what is between them."""
    tokens = quantity(ir.tokens)
    if ir.kind == MONARCH:
        between = MOVED_BETWEEN * ir.inner
    else:  # each block of the output reads those of all blocks of the input
        between = (1 + ir.out_blocks) * ir.inner + 2 * ir.out_blocks * ir.rank
    numbers = tokens * (ir.in_features + between + MOVED_OUT * ir.out_features) + ir.parameters
    return Cost(2 * tokens * ir.parameters, (numbers + ir.bias * ir.out_features) * ir.dtype.itemsize, 0)


def dense_cost(ir: BlockLinear) -> Cost:
    """Work of the product with the weight that the factors stand for."""
    tokens, weights = quantity(ir.tokens), ir.in_features * ir.out_features
    numbers = tokens * _ends(ir) + weights + ir.bias * ir.out_features
    return Cost(2 * tokens * weights, numbers * ir.dtype.itemsize, 0)


def _ends(ir: BlockLinear) -> int:
    return ir.in_features + ir.out_features


def times(ir: BlockLinear, device: Device, hints: Mapping[str, int] | None = None) -> Times:
    """Seconds as the dense product and as the two products that run today, with the values of symbols in `hints`.

    On CUDA the model is fitted to CUDA-graph replays on an H100 of 80 GB HBM3, in float16, of layers of 4096 x 4096
    and 768 x 3072 with 1 to 8192 tokens; other devices are scaled.

    Raises:
        InputError: the number of tokens has no value.
    """
    tokens = known(ir.tokens, hints)
    sized = BlockLinear(**{**vars(ir), "tokens": tokens})
    return Times(
        _seconds(dense_cost(sized), "dense", sized.dtype, device),
        _seconds(spelled_cost(sized), sized.kind, sized.dtype, device),
    )


def predict(
    ir: BlockLinear, device: Device, hints: Mapping[str, int] | None = None, calls: Calls = DEVICE_ALONE
) -> Prediction:
    """Seconds as spelled by hand and as the operator: the same, as long as the operator runs the same products.

    Raises:
        InputError: the number of tokens has no value.
    """
    seconds = times(ir, device, hints).factors_s
    return Prediction(seconds, seconds)


def _seconds(work: Cost, form: str, dtype: torch.dtype, device: Device) -> float:
    if device.kind == "cpu":
        return float(work.flops / device.exact.flops.of(dtype) + work.bytes / device.exact.bytes_per_s)
    ceiling = device.ceiling
    is_half = dtype.itemsize == 2 and ceiling is not None
    rate = REACHED * ceiling.half_flops if ceiling and is_half else device.exact.flops.of(dtype)
    moved = ceiling.bytes_per_s if ceiling else device.monarch.bytes_per_s
    parts = (work.flops / rate, work.bytes / moved)
    together = math.fsum(part**OVERLAP for part in parts) ** (1 / OVERLAP)
    return float(together + (LAUNCHES[form] - 1) * device.monarch.launch_s)
