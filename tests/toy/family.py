"""The IR of the toy, its operator, and its numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from monarch_compile.calls import Calls
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import Cost, Prediction
from monarch_compile.family import Family


@dataclass(frozen=True)
class Gate:
    """x * sigmoid(x) + y of (rows, columns)."""

    family: ClassVar[str] = "toy"

    rows: int | str
    columns: int | str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"toy.gate<{str(self.dtype).removeprefix('torch.')}> [{self.rows},{self.columns}]"


def reference(x: Tensor, y: Tensor) -> Tensor:
    """What the toy means."""
    return x * torch.sigmoid(x) + y


@torch.library.custom_op("monarch_toy::gate", mutates_args=())
def gate(x: Tensor, y: Tensor) -> Tensor:
    """The toy as an operator."""
    return reference(x, y).contiguous()


@gate.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _cost(ir: Gate) -> Cost:
    elements = math.prod(size for size in (ir.rows, ir.columns) if isinstance(size, int))
    return Cost(flops=3 * elements, bytes=3 * elements * ir.dtype.itemsize, exps=elements)


def _predict(ir: Gate, device: Device, hints: Mapping[str, int] | None, calls: Calls) -> Prediction:
    return Prediction(exact_s=2.0, monarch_s=1.0)


def _nothing(value: Any) -> None:
    return None


FAMILY = Family(
    name="toy",
    noun="gate",
    cost=_cost,
    exact_cost=_nothing,
    predict=_predict,
    shape=lambda decision: "" if decision.ir is None else f"{decision.ir.rows}x{decision.ir.columns}",
    blocks=lambda ir: "-",
    block_size=_nothing,
)
