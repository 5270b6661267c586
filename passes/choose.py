"""For each site: lower it, or keep it exact, and say why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.config import MonarchConfig
from monarch_compile.cost import MARGIN, Prediction, choose_block_size, predict
from monarch_compile.decision import EXACT, LOWERED, Decision
from monarch_compile.devices import Device, installed
from monarch_compile.ir import ExactGroups, MonarchAttention
from monarch_compile.ops import kernel_refusal
from monarch_compile.passes.graph import dim_of, dtype_of, source_of
from monarch_compile.passes.legality import Context, first_refusal
from monarch_compile.passes.lowering import to_ir
from monarch_compile.passes.masks import MaskFact
from monarch_compile.passes.region import AttentionRegion, Missed, Site
from monarch_compile.plan import SiteForm, SitePlan, site_shape


@dataclass(frozen=True)
class Choice:
    """A decision and what lowering needs to carry it out."""

    decision: Decision
    region: AttentionRegion | None = None
    facts: tuple[MaskFact, ...] = ()
    ir: MonarchAttention | None = None

    @property
    def lowers(self) -> bool:
        """Whether the site is to be rewritten."""
        return self.decision.status == LOWERED


def choose(site: Site, name: str, config: MonarchConfig) -> Choice:
    """Decide about one site: matched? legal? worth it? `name` is the site's, distinct in its graph.

    Raises:
        PlanError: the options have a plan that does not fit the site.
    """
    if isinstance(site, Missed):
        _planned(name, (), config)
        return Choice(_decision(site.anchor, name, "match", site.code, site.reason, site.node))
    context = Context.of(site, config)
    kinds = sorted({fact.kind for fact in context.facts} - {"none"})
    base = _describe(site, _decision(site.anchor, name, "legality", "", "", site.output), ",".join(kinds) or "none")
    plan = _planned(name, site_shape(base.q_shape, base.v_shape), config)
    refusal = first_refusal(site, context)
    if refusal is not None:
        stage = "mask" if refusal.code.startswith("mask_") else "legality"
        exact = replace(
            base,
            stage=stage,
            code=refusal.code,
            reason=refusal.reason,
            node=refusal.node.name,
            source=source_of(refusal.node),
        )
        return Choice(exact)
    missing = kernel_refusal(site.output.meta["val"].device)
    if missing is not None:
        return Choice(replace(base, code="no_kernels", reason=missing, node=site.output.name))
    if plan is not None and plan.form is None:
        reason = f"the plan keeps it exact: {plan.reason}"
        return Choice(replace(base, stage="cost", code="plan_exact", reason=reason, node=site.output.name))
    device = installed(site.output.meta["val"].device)
    form = plan.form if plan is not None and plan.form is not None else _form(site, config, device)
    ir = to_ir(site, context.facts, form)
    decision = _weigh(replace(base, ir=ir, stage="cost"), predict(ir, device, _hints(site)), config)
    return Choice(decision, site, context.facts, ir)


def _weigh(decision: Decision, prediction: Prediction, config: MonarchConfig) -> Decision:
    gain = f"{prediction.speedup:.2f}x"
    if config.policy == "never":
        return replace(decision, code="policy_never", reason="policy is 'never'")
    if config.policy == "auto" and not prediction.pays:
        reason = f"exact attention wins: predicted gain {gain}, below the margin of {MARGIN:g}x"
        return replace(decision, code="cost_exact_wins", reason=reason)
    reason = f"predicted {gain} against exact attention"
    return replace(decision, status=LOWERED, stage="lowered", code="lowered", reason=reason)


def _planned(name: str, shape: tuple[int, ...], config: MonarchConfig) -> SitePlan | None:
    return None if config.plan is None else config.plan.site(name, shape)


def _decision(anchor: Node, name: str, stage: str, code: str, reason: str, node: Node) -> Decision:
    return Decision(
        name=name,
        status=EXACT,
        stage=stage,
        code=code,
        reason=reason,
        node=node.name,
        source=source_of(node),
        dtype=dtype_of(anchor),
        device=_tensor_of(anchor).device.type,
    )


def _tensor_of(node: Node) -> torch.Tensor:
    """The (first) tensor that a node gives."""
    value = node.meta["val"]
    tensor: torch.Tensor = value[0] if isinstance(value, (list, tuple)) else value
    return tensor


def _describe(region: AttentionRegion, decision: Decision, mask: str) -> Decision:
    q, k, v = (tuple(dim_of(n) for n in shape) for shape in (region.q_shape, region.k_shape, region.v_shape))
    mask = "causal" if region.is_causal else mask
    return replace(decision, q_shape=q, k_shape=k, v_shape=v, mask=mask, dtype=dtype_of(region.q.node))


def _form(region: AttentionRegion, config: MonarchConfig, device: Device) -> SiteForm:
    """The options' form; "auto" is the cost model's block for a static length (legality refuses it on a symbolic)."""
    block_size = config.block_size
    if not isinstance(block_size, int):
        block_size = choose_block_size(
            seq_len=region.k_shape[2],
            head_dim=region.q_shape[3],
            value_dim=region.v_shape[3],
            dtype=region.q.node.meta["val"].dtype,
            device=device,
            num_iters=config.num_iters,
            init=config.init,
            exact=ExactGroups(config.window, config.prefix),
        )
    return SiteForm(block_size, config.num_iters, config.init, config.pad, config.window, config.prefix)


def _hints(region: AttentionRegion) -> dict[str, int]:
    """The sizes that symbolic dims had in the call that was captured."""
    sizes: list[Any] = [*region.q_shape, *region.k_shape, *region.v_shape]
    return {str(n): int(n.node.hint) for n in sizes if isinstance(n, torch.SymInt)}
