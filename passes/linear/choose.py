"""For each site: lower it, or keep it exact, and say why."""

from __future__ import annotations

from dataclasses import replace

import torch

from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import installed
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.errors import InputError
from monarch_compile.linear.ir import BlockLinear
from monarch_compile.linear.work import predict
from monarch_compile.passes.checks import first_refusal
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.graph import value_of
from monarch_compile.passes.linear.checks import CHECKS
from monarch_compile.passes.linear.lower import to_ir
from monarch_compile.passes.linear.region import BlockLinearRegion, Site
from monarch_compile.passes.state import Choice, RefusedSite, kept_exact, undecided
from monarch_compile.passes.surroundings import Surroundings
from monarch_compile.refusal import Refusal

FAMILY = "linear"


def choose(site: Site, name: str, config: MonarchConfig, around: Surroundings, layouts: Layouts) -> Choice:
    """Decide about one site: matched? legal? worth it? `name` is the site's, distinct in its graph.

    A plan says nothing of it: the lowered form is as exact as what it stands for.
    """
    if isinstance(site, RefusedSite):
        return _exact(undecided(FAMILY, name, site.anchor), "match", site.refusal)
    base = undecided(FAMILY, name, site.anchor, site.output)
    refusal = first_refusal(site, CHECKS)
    if refusal is not None:
        return _exact(base, "legality", refusal)
    ir = to_ir(site)
    tokens = 1
    for size in site.token_sizes:
        tokens = tokens * size
    return _weigh(site, replace(base, ir=ir, calls=around.calls(site.output, 1, tokens)), ir, config)


def _weigh(site: BlockLinearRegion, base: Decision, ir: BlockLinear, config: MonarchConfig) -> Choice:
    """Whether a legal site pays: both forms run the same products, so that it does by a user's wish alone."""
    if config.policy == "never":
        return _exact(base, "cost", Refusal("policy_never", "policy is 'never'"))
    if config.policy == "auto":
        why = "there are no kernels of block linears yet: the operator would run the same batched products"
        return _exact(base, "cost", Refusal("no_gain", why))
    hints = {str(n): int(n.node.hint) for n in site.token_sizes if isinstance(n, torch.SymInt)}
    try:
        gain = predict(ir, installed(value_of(site.output).device), hints, base.calls).speedup
    except InputError:  # a device that the cost model does not describe
        gain = 1.0
    reason = f"policy is 'always'; predicted {gain:.2f}x against the products as they are spelled"
    decision = replace(base, status=LOWERED, stage="lowered", code="lowered", reason=reason)
    return Choice(decision, site, ir, frozenset({*site.inside, site.output}), gain)


def _exact(base: Decision, stage: str, refusal: Refusal) -> Choice:
    return Choice(kept_exact(base, stage, refusal))
