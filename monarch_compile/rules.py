"""Rules of options: what each may be, as a predicate and its wording."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch


class OptionRule(NamedTuple):
    """What an option may be: a predicate and its wording."""

    allows: Callable[[Any], bool]
    wording: str


FLAG = OptionRule(lambda value: isinstance(value, bool), "True or False")


def at_least(least: int) -> OptionRule:
    """An int, or a symbolic one, of at least `least`."""
    kinds = (int, np.integer, torch.SymInt)
    return OptionRule(
        lambda value: isinstance(value, kinds) and not isinstance(value, bool) and bool(value >= least),
        f"an int of at least {least}",
    )


def one_of(allowed: tuple[str, ...]) -> OptionRule:
    """One of some strings."""
    return OptionRule(
        lambda value: isinstance(value, str) and value in allowed, f"one of {', '.join(map(repr, allowed))}"
    )


def or_else(value: Any, rule: OptionRule) -> OptionRule:
    """`value` itself, or what `rule` allows."""
    return OptionRule(
        lambda x: (x is None if value is None else x == value) or rule.allows(x), f"{value!r} or {rule.wording}"
    )


def either(first: OptionRule, second: OptionRule) -> OptionRule:
    """What one of two rules allows."""
    return OptionRule(lambda x: first.allows(x) or second.allows(x), f"{first.wording} or {second.wording}")


def broken_rule(options: Mapping[str, Any], rules: Mapping[str, OptionRule]) -> str | None:
    """What is wrong with the first of `options` that breaks its rule; None where all are allowed."""
    for name, rule in rules.items():
        if name in options and not rule.allows(options[name]):
            return f"{name!r} must be {rule.wording}; found {options[name]!r}"
    return None


def tuple_of(least: int, lengths: range) -> OptionRule:
    """A tuple or list of ints of at least `least`, as long as one of `lengths`."""
    each = at_least(least)
    return OptionRule(
        lambda value: isinstance(value, (tuple, list)) and len(value) in lengths and all(map(each.allows, value)),
        f"{lengths[0]} to {lengths[-1]} ints of at least {least}",
    )
