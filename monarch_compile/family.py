"""What a family gives the report and the cost model: the numbers and words for one of its IR values."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from monarch_compile.calls import Calls
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import Cost, Prediction
from monarch_compile.decision import Decision
from monarch_compile.registry import FAMILIES


@dataclass(frozen=True)
class Family:
    """A family of operators, as plain functions of its IR values and of decisions about its sites.

    cost: work of the lowered form. exact_cost: that of what a site computes today; None where it is not known.
    predict: times on a device, with a value for each symbolic size, as the site is called.
        Raises InputError where a size has no value.
    blocks: how the report says what blocks the lowered form has, e.g. "64x64". block_size: their size, None for none.
    """

    name: str
    cost: Callable[[Any], Cost]
    exact_cost: Callable[[Decision], Cost | None]
    predict: Callable[[Any, Device, Mapping[str, int] | None, Calls], Prediction]
    blocks: Callable[[Any], str]
    block_size: Callable[[Any], int | None]


@functools.cache
def family(name: str) -> Family:
    """The family of a name.

    Raises:
        KeyError: no family has it.
    """
    found: Family = importlib.import_module(FAMILIES[name].family).FAMILY
    return found
