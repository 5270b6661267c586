"""Block linears, as the report and the cost model see them."""

from __future__ import annotations

from typing import Any

from monarch_compile.cost.prediction import Cost
from monarch_compile.decision import Decision
from monarch_compile.family import Family
from monarch_compile.linear import forms
from monarch_compile.linear.costs import cost, spelled_cost
from monarch_compile.linear.ir import STAGED, BlockLinear
from monarch_compile.linear.work import predict


def _exact_cost(decision: Decision) -> Cost | None:
    return None if decision.ir is None else spelled_cost(decision.ir)


def _shape(decision: Decision) -> str:
    """Tokens and features; a site that is refused has no IR."""
    ir: BlockLinear | None = decision.ir
    return "" if ir is None else f"{ir.tokens}x{ir.in_features}->{ir.out_features}, {ir.kind} rank {ir.rank}"


def _no_kernels(ir: BlockLinear) -> str:
    """Batched products run where no form has kernels, or a graph is not worth them."""
    return "" if forms.kernel_forms(ir) else f"batched products compute it: {forms.why_not(ir, STAGED)}"


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
    no_kernels=_no_kernels,
)
