"""Which of the values of a mask's elements a dtype holds as they are: sympy computes in numbers, programs in dtypes."""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef

from monarch_compile.passes.constants import DROPPED, held_by
from monarch_compile.passes.elements.values import Place, Unknown, number
from monarch_compile.passes.graph import FLOATS

DIGITS = {torch.int32: 31, torch.int64: 63, torch.float32: 24, torch.float64: 53}
"""Dtypes that hold indices, and how many bits an integer may have there."""

EXACT_CASTS = frozenset(DIGITS)
"""Dtypes that hold every index and mask value in use."""

LARGEST_PLACE = 2**20
"""A bound on the places in a mask: one that goes beyond it has more elements than fit in memory."""

LARGEST_SIZE = 2**31
"""A bound on a symbolic size, or on an integer that a program is called with, such as the number of tokens in a cache.

The product of two is still an int64, while float32 need not hold one.
"""

LARGEST_UNKNOWN = 2**63
"""A bound on unknown integers: tokens are small, but hashes, times and "no limit" are not. -2**63 has no negative."""


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
    """A value whose numbers are those that the dtype holds in their place; None where an int would wrap, or where a
    number is no float64, which would be rounded twice."""
    if isinstance(value, sympy.Piecewise):
        pieces = [(rounded(x, dtype), condition) for x, condition in value.args]
        return None if any(x is None for x, _ in pieces) else sympy.Piecewise(*pieces)
    if not (value.is_number and value.is_extended_real) or is_held(value, dtype):
        return value
    held = held_by(float(value), dtype)
    return number(held) if held is not None and is_held(value, torch.float64) else None


def overflowed(value: Any, dtype: torch.dtype | None) -> Any:
    """A value whose numbers that are too large for a float dtype are infinite, as they are there."""
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*((overflowed(x, dtype), condition) for x, condition in value.args))
    if dtype not in FLOATS or not (value.is_number and value.is_extended_real):
        return value
    held = held_by(float(value), dtype)
    return number(held) if held is not None and math.isinf(held) else value


def is_held(value: Any, dtype: torch.dtype | None) -> bool:
    """Whether the dtype holds a number, or an expression of places wherever these are, as it is.

    An expression is bounded by its terms. Of floats, multiples of one half are known to be held. An unknown value of
    its own is held by its own dtype, integers by int64; one that was cast is to be asked of `is_carried`, too.
    """
    if value.is_number:
        return bool(value.is_extended_real) and _is_number_held(value, dtype)
    if _is_unknown(value) and not (value.is_integer and dtype in DIGITS and dtype != torch.int64):
        return True
    if dtype not in DIGITS or value.has(sympy.oo, -sympy.oo):
        return False
    bound = 0
    parts = 2 if dtype in FLOATS else 1
    for term in sympy.Add.make_args(sympy.expand(parts * value)):
        factor, rest = term.as_coeff_Mul()
        if not rest.is_integer or rest.has(sympy.Pow) or not sympy.Rational(factor).is_integer:
            return False
        bound += abs(int(factor)) * _bound(rest)
    return bool(bound < 2 ** DIGITS[dtype])


def _is_number_held(value: Any, dtype: torch.dtype | None) -> bool:
    if value.is_Integer and dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        return bool(low <= value <= high)
    held = held_by(float(value), dtype)
    if held is None or not value.is_finite or not math.isfinite(held):
        return held == float(value) and not value.is_finite
    return bool(sympy.Rational(held) == sympy.Rational(value))


def is_carried(value: Any, own: torch.dtype | None, dtype: torch.dtype | None) -> bool:
    """Whether a value that was computed in its own dtype is that number, where an op of another dtype reads it.

    What the other dtype makes of the number is not asked, but of unknown values, which may not be followed there.
    """
    if own == dtype:
        return True
    for leaf in leaves(value):
        if dtype == torch.bool and leaf.is_number and bool(leaf <= DROPPED):
            continue  # however it was rounded, it is not 0
        if not is_held(leaf, own):
            return False
        unknown = any(_is_unknown(atom) for atom in leaf.atoms(AppliedUndef, sympy.Symbol))
        is_narrowed = dtype not in DIGITS or own == torch.float64
        if unknown and dtype != torch.bool and is_narrowed:
            return False
    return True


def is_compared(value: Any, own: torch.dtype | None, dtype: torch.dtype) -> bool:
    """Whether a value, computed in its own dtype, is that number where it is compared in another."""
    is_own = own == dtype and dtype not in FLOATS  # an unknown integer may have been rounded to a float
    return is_carried(value, own, dtype) and all(
        is_held(leaf, dtype) or (is_own and _is_unknown(leaf)) for leaf in leaves(value)
    )


def _is_unknown(value: Any) -> bool:
    """Whether a value is one element that nothing is known of, or a size."""
    return isinstance(value, AppliedUndef) or (isinstance(value, sympy.Symbol) and not isinstance(value, Place))


def _bound(value: Any) -> Any:
    """A bound on the magnitude of an expression of places, sizes and unknown integers; infinite where there is none."""
    if value.is_number:
        return abs(value)
    if isinstance(value, (sympy.Add, sympy.Mul)):
        return (sum if isinstance(value, sympy.Add) else math.prod)(map(_bound, value.args))
    if isinstance(value, (sympy.floor, sympy.Abs)):
        return _bound(value.args[0]) + 1
    if isinstance(value, sympy.Mod):
        return _bound(value.args[1])
    if isinstance(value, sympy.Piecewise):
        return max(map(_bound, leaves(value)))
    if isinstance(value, sympy.Symbol) and not isinstance(value, Unknown):
        return LARGEST_PLACE if isinstance(value, Place) else LARGEST_SIZE
    return LARGEST_UNKNOWN if _is_unknown(value) and value.is_integer else sympy.oo
