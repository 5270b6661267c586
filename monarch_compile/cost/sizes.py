"""Sizes of an IR as cost models count with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy

from monarch_compile.errors import InputError
from monarch_compile.ir import Dim


def quantity(size: Dim) -> Any:
    """A size as an int or a sympy expression."""
    return size if isinstance(size, int) else sympy.sympify(size)


def known(size: Dim, hints: Mapping[str, int] | None) -> int:
    """A size where symbols have the values of `hints`.

    Raises:
        InputError: one has none.
    """
    if isinstance(size, int):
        return size
    values = {sympy.sympify(name): number for name, number in (hints or {}).items()}
    value = sympy.sympify(size).subs(values)
    if not value.is_number:
        raise InputError(f"the size {size} has no value; give one for each symbol in it")
    return int(value)
