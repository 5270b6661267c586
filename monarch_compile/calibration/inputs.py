"""The calls of a model that users give: each a tensor, a tuple, a dict, or both of the latter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from monarch_compile.errors import InputError

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def calls_of(inputs: Any) -> list[Call]:
    """The calls of a list; something else than a list is one call.

    Raises:
        InputError: there is no call, or something that is none.
    """
    calls = [_call(x) for x in (inputs if isinstance(inputs, list) else [inputs])]
    if not calls:
        raise InputError("inputs must hold at least one call; found an empty list")
    return calls


def _call(sample: Any) -> Call:
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, Mapping):
        return (), dict(sample)
    if isinstance(sample, tuple):
        if len(sample) == 2 and isinstance(sample[0], tuple) and isinstance(sample[1], dict):
            return sample
        return sample, {}
    raise InputError(f"a call must be a tensor, a tuple or a dict of arguments; found {type(sample)}")
