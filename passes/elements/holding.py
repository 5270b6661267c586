"""Which of the values of a mask's elements a dtype holds as they are: sympy computes in numbers, programs in dtypes."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from monarch_compile.passes.constants import DROPPED, held_by
from monarch_compile.passes.elements.values import Place, number
from monarch_compile.passes.graph import FLOATS

DIGITS = {torch.int32: 31, torch.int64: 63, torch.float32: 24, torch.float64: 53}
"""Dtypes that hold indices, and how many bits an integer may have there."""

EXACT_CASTS = frozenset(DIGITS)
"""Dtypes that hold every index and mask value in use."""

LARGEST_PLACE = 2**20
"""A bound on the places in a mask: one that goes beyond it has more elements than fit in memory."""

LARGEST_UNKNOWN = 2**31
"""A bound on unknown integers, such as tokens."""


def leaves(value: Any) -> list[Any]:
    """The values that a value takes in its cases."""
    return [x for x, _ in value.args] if isinstance(value, sympy.Piecewise) else [value]


def is_kept(value: Any, dtype: torch.dtype | None) -> bool:
    """Whether every value is a number that the dtype holds as it is, or, for a float, one that stays a large mask."""
    numbers = leaves(value)
    if not all(x.is_number and x.is_extended_real for x in numbers):
        return False
    return all((dtype in FLOATS and x <= DROPPED) or is_held(x, dtype) for x in numbers)


def rounded(value: Any, dtype: torch.dtype | None) -> Any:
    """A value whose numbers are those that the dtype holds in their place; None where an int would wrap."""
    if isinstance(value, sympy.Piecewise):
        pieces = [(rounded(x, dtype), condition) for x, condition in value.args]
        return None if any(x is None for x, _ in pieces) else sympy.Piecewise(*pieces)
    if not (value.is_number and value.is_extended_real):
        return value
    held = held_by(float(value), dtype)
    return None if held is None else value if held == float(value) else number(held)


def is_held(value: Any, dtype: torch.dtype | None) -> bool:
    """Whether the dtype holds a number, or an expression of places wherever these are, as it is.

    An expression is bounded by its terms. Of floats, multiples of one half are known to be held.
    """
    if value.is_number:
        return bool(value.is_extended_real) and held_by(float(value), dtype) == float(value)
    if isinstance(value, AppliedUndef) or (isinstance(value, sympy.Symbol) and not isinstance(value, Place)):
        return True
    if dtype not in DIGITS:
        return False
    bound = 0
    parts = 2 if dtype in FLOATS else 1
    for term in sympy.Add.make_args(sympy.expand(parts * value)):
        factor, rest = term.as_coeff_Mul()
        if not rest.is_integer or rest.has(sympy.Pow) or not float(factor).is_integer():
            return False
        bound += abs(int(factor)) * _bound(rest)
    return bool(bound < 2 ** DIGITS[dtype])


def _bound(product: Any) -> int:
    """A bound on a product of places, sizes, unknown integers, and of what is rounded down of these."""
    factors = [factor for factor in sympy.Mul.make_args(product) if factor != 1]
    return math.prod(LARGEST_UNKNOWN if factor.has(AppliedUndef) else LARGEST_PLACE for factor in factors)
