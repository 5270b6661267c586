"""Attention, as the report, calibration and the doctor see it."""

from __future__ import annotations

from types import MappingProxyType

from monarch_compile.attention import trial
from monarch_compile.attention.candidates import forms_that_pay
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.attention.work import exact_cost_of_shapes, monarch_cost, predict
from monarch_compile.cost.prediction import Cost
from monarch_compile.decision import Decision
from monarch_compile.family import Family, Forms, Trial


def _exact_cost(decision: Decision) -> Cost | None:
    shapes = (decision.q_shape, decision.k_shape, decision.v_shape)
    if decision.dtype is None or any(len(shape) != 4 for shape in shapes):
        return None
    return exact_cost_of_shapes(*shapes, decision.dtype)


def _shape(decision: Decision) -> str:
    """That of the queries, and the number of keys where it is another."""
    text = "x".join(map(str, decision.q_shape))
    differs = decision.k_shape and decision.k_shape[2] != decision.q_shape[2]
    return f"{text} on {decision.k_shape[2]}" if differs else text


def _blocks(ir: MonarchAttention) -> str:
    return f"{'?' if ir.num_blocks is None else ir.num_blocks}x{ir.form.block_size}"


FAMILY = Family(
    name="attention",
    noun="attention site",
    cost=monarch_cost,
    exact_cost=_exact_cost,
    predict=predict,
    shape=_shape,
    blocks=_blocks,
    block_size=lambda ir: ir.form.block_size,
    forms=Forms(
        read=Form, that_pay=forms_that_pay, call=AttentionCall.of, learned=MappingProxyType({0: "queries", 1: "keys"})
    ),
    trials=(Trial(trial.error, trial.BOUNDS), Trial(trial.gradient_error, trial.BOUNDS, "gradients")),
)
