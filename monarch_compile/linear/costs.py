"""What a block linear costs in its forms: work, counted."""

from __future__ import annotations

from monarch_compile.cost.prediction import Cost, Quantity
from monarch_compile.cost.sizes import quantity
from monarch_compile.linear.ir import MONARCH, BlockLinear

MOVED_BETWEEN = 4
"""How often Monarch's values between the products cross the memory, as Inductor runs them: written, permuted by a copy,
read."""
MOVED_OUT = 3
"""The same for the result: written by a batched product in the order of blocks, then permuted by a copy."""
SUM_BYTES = 4
"""Of a number of the sums that programs of the split form leave to be added."""


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


def expansion_cost(ir: BlockLinear) -> Cost:
    """Work of the dense weight: a product for each block, then a copy that puts the blocks in their places."""
    weights = ir.in_features * ir.out_features
    return Cost(2 * ir.rank * weights, (MOVED_OUT * weights + ir.parameters) * ir.dtype.itemsize, 0)


def between_bytes(ir: BlockLinear) -> Quantity:
    """Bytes of what is between the products, where each kernel leaves it in the order in which it is read."""
    numbers = 2 * ir.inner + (0 if ir.kind == MONARCH else 2 * ir.out_blocks * ir.rank)
    return quantity(ir.tokens) * numbers * ir.dtype.itemsize


def split_bytes(ir: BlockLinear) -> Quantity:
    """Bytes of the sums that programs of the split form write and read: as many for each token as input blocks."""
    return quantity(ir.tokens) * 2 * ir.in_blocks * ir.out_features * SUM_BYTES


def _ends(ir: BlockLinear) -> int:
    return ir.in_features + ir.out_features
