"""Block linears, as the report and the cost model see them."""

from __future__ import annotations

from typing import Any

from monarch_compile.cost.prediction import Cost
from monarch_compile.decision import Decision
from monarch_compile.family import Family
from monarch_compile.linear.ir import BlockLinear
from monarch_compile.linear.work import cost, predict, spelled_cost


def _exact_cost(decision: Decision) -> Cost | None:
    return None if decision.ir is None else spelled_cost(decision.ir)


def _shape(decision: Decision) -> str:
    """Tokens and features; a site that is refused has no IR."""
    ir: BlockLinear | None = decision.ir
    return "" if ir is None else f"{ir.tokens}x{ir.in_features}->{ir.out_features}, {ir.kind} rank {ir.rank}"


def _no_size(ir: Any) -> None:
    return None


FAMILY = Family(
    name="linear",
    noun="block linear",
    cost=cost,
    exact_cost=_exact_cost,
    predict=predict,
    shape=_shape,
    blocks=lambda ir: f"{ir.in_blocks}x{ir.out_blocks}",
    block_size=_no_size,
    no_kernels=lambda ir: "there are no kernels of block linears yet: batched products compute it",
)
