"""Long convolutions, as the report and the cost model see them."""

from __future__ import annotations

from typing import Any

from monarch_compile.convolution.work import cost, fft_cost, predict
from monarch_compile.cost.prediction import Cost
from monarch_compile.decision import Decision
from monarch_compile.family import Family


def _exact_cost(decision: Decision) -> Cost | None:
    return None if decision.ir is None else fft_cost(decision.ir)


def _no_size(ir: Any) -> None:
    return None


FAMILY = Family(
    name="convolution",
    cost=cost,
    exact_cost=_exact_cost,
    predict=predict,
    blocks=lambda ir: "-",
    block_size=_no_size,
)
