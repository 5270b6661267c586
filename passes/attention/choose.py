"""For each site: lower it, or keep it exact, and say why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from monarch_compile.attention.form import ACROSS, Form
from monarch_compile.attention.lengths import chosen_form, cost_refusal
from monarch_compile.attention.work import predict
from monarch_compile.calibration.plan import SitePlan, site_shape
from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import installed
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.errors import PlanError
from monarch_compile.passes.attention.checks import (
    Context,
    first_refusal,
    follows_cache,
    packed_length,
    under_triangle,
)
from monarch_compile.passes.attention.grids import site_grid
from monarch_compile.passes.attention.lower import to_ir
from monarch_compile.passes.attention.region import AttentionRegion, Site
from monarch_compile.passes.attention.sizes import guard_equal_sizes
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.graph import dim_of
from monarch_compile.passes.state import Choice, RefusedSite, kept_exact, undecided
from monarch_compile.passes.surroundings import Surroundings
from monarch_compile.refusal import Refusal, kernel_refusal

FAMILY = "attention"


def choose(site: Site, name: str, config: MonarchConfig, around: Surroundings, layouts: Layouts) -> Choice:
    """Decide about one site: matched? legal? worth it? `name` is the site's, distinct in its graph.

    around: what its graph does beside it. layouts: what the dims of its tensors are made of.

    Raises:
        PlanError: the options have a plan that does not fit the site.
    """
    if isinstance(site, RefusedSite):
        _planned(name, (), config)
        return _exact(undecided(FAMILY, name, site.anchor), "match", site.refusal)
    guard_equal_sizes(site)
    context = Context.of(site, config, trains=site.output in around.trained)
    kinds = sorted({fact.kind for fact in context.facts} - {"none"})
    base = _describe(site, undecided(FAMILY, name, site.anchor, site.output), ",".join(kinds) or "none")
    plan = _planned(name, site_shape(base.q_shape, base.v_shape), config)
    if plan is not None and plan.form is not None:  # a plan may lower any site
        context = replace(context, config=replace(config, cross_attention=True, causal=True))
    site = replace(site, length=packed_length(site, context.facts, causal=context.config.causal))
    if context.config.causal:
        after_cache = follows_cache(site, context.facts)
        site = replace(site, is_causal=under_triangle(site, context.facts), follows_cache=after_cache)
    grid, blocking = site_grid(site, config, layouts)
    site, base = replace(site, grid=grid), replace(base, blocking=blocking)
    refusal = first_refusal(site, context)
    if refusal is not None:
        stage = "mask" if refusal.code.startswith("mask_") else "legality"
        return _exact(base, stage, refusal)
    missing = kernel_refusal(site.output.meta["val"].device)
    if missing is not None:
        return _exact(base, "legality", Refusal("no_kernels", missing))
    if plan is not None and plan.form is None:
        return _exact(base, "cost", Refusal("plan_exact", f"the plan keeps it exact: {plan.reason}"))
    base = replace(base, calls=around.calls(site.output, site.q_shape[0], site.q_shape[2]))
    return _weigh(site, context, None if plan is None else plan.form, base)


def _weigh(site: AttentionRegion, context: Context, planned: Form | None, base: Decision) -> Choice:
    """Whether a legal site pays in the form of its plan, or in that of the options.

    Symbolic sizes are guarded on only as far as the outcome depends on them.
    """
    config, facts, device = context.config, context.facts, installed(site.output.meta["val"].device)
    batch, seq_len, queries = site.q_shape[0], site.k_shape[2], None
    if site.follows_cache:
        queries = site.q_shape[2]
    elif site.is_cross and site.q_shape[2] != seq_len:  # which is guarded on: the lengths stay different
        config, queries = replace(config, **ACROSS), site.q_shape[2]
        planned = planned and planned.across()
    if planned is not None and planned.tile is not None and site.grid is None:
        raise PlanError(
            f"the plan does not fit this model: it has tiles {planned.tile} for {base.name}: {base.blocking}"
        )
    auto = planned is None and config.block_size == "auto"
    seen = to_ir(site, facts, planned or chosen_form(config, device.kind, _hint(seq_len), site.grid))
    base = replace(base, ir=seen)
    if config.policy == "never":
        return _exact(base, "cost", Refusal("policy_never", "policy is 'never'"))
    hints, calls = _hints(site), base.calls
    speedup = predict(seen, device, hints, calls).speedup
    gain = f"{speedup:.2f}x"
    if config.policy == "auto":
        sizes = {"auto": auto, "batch": batch, "seq_len": seq_len, "queries": queries}
        refused = cost_refusal(seen, device, hints, f"predicted gain {gain} here", calls=calls, **sizes)
        if refused is not None:
            return _exact(base, "cost", refused)
    ir = to_ir(site, facts, planned or chosen_form(config, device.kind, seq_len, site.grid))
    reason = f"predicted {gain} against exact attention"
    decision = replace(base, ir=ir, status=LOWERED, stage="lowered", code="lowered", reason=reason)
    return Choice(decision, site, ir, frozenset(site.interior), speedup, facts)


def _planned(name: str, shape: tuple[int, ...], config: MonarchConfig) -> SitePlan | None:
    return None if config.plan is None else config.plan.site(name, shape)


def _exact(base: Decision, stage: str, refusal: Refusal) -> Choice:
    return Choice(kept_exact(base, stage, refusal))


def _describe(region: AttentionRegion, decision: Decision, mask: str) -> Decision:
    q, k, v = (tuple(dim_of(n) for n in shape) for shape in (region.q_shape, region.k_shape, region.v_shape))
    mask = "causal" if region.is_causal else mask
    return replace(decision, q_shape=q, k_shape=k, v_shape=v, mask=mask, dtype=region.dtype)


def _hint(size: Any) -> int:
    """A size as it was in the call that was captured."""
    return size if isinstance(size, int) else int(size.node.hint)


def _hints(region: AttentionRegion) -> dict[str, int]:
    """The sizes that symbolic dims had in the call that was captured."""
    sizes: list[Any] = [*region.lead, *region.q_shape, *region.k_shape, *region.v_shape]
    return {str(n): _hint(n) for n in sizes if isinstance(n, torch.SymInt)}
