"""For each site: lower it, or keep it exact, and say why."""

from __future__ import annotations

from dataclasses import replace

import torch

from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import installed
from monarch_compile.cost.prediction import MARGIN
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.errors import InputError
from monarch_compile.linear import forms
from monarch_compile.linear.ir import PRODUCTS, BlockLinear
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
    """Whether a legal site pays, with its symbolic sizes as they were in the call that was captured, unguarded: the
    operator chooses its form by the number of tokens of each call."""
    if config.policy == "never":
        return _exact(base, "cost", Refusal("policy_never", "policy is 'never'"))
    device = value_of(site.output).device
    has_kernels = forms.has_kernels(device) and bool(forms.kernel_forms(ir))
    if config.policy == "auto" and not has_kernels:
        why = f"there are no kernels for it on {device.type}: the operator would run the same batched products"
        return _exact(base, "cost", Refusal("no_gain", why))
    request = forms.KERNELS if config.policy == "always" else forms.AUTO
    hints = {str(n): int(n.node.hint) for n in site.token_sizes if isinstance(n, torch.SymInt)}
    try:
        known = installed(device)
        gain = predict(ir, known, hints, base.calls, request).speedup if has_kernels else 1.0
        runs = forms.in_words(forms.ranges(replace(ir, tokens="M"), known, has_kernels, request))
    except InputError:  # a device that the cost model does not describe
        gain, runs = 1.0, PRODUCTS
    if config.policy == "auto" and gain < MARGIN:
        why = f"the batched products win; predicted gain {gain:.2f}x here, where it would run as {runs}"
        return _exact(base, "cost", Refusal("cost_exact_wins", why))
    reason = f"it runs as {runs}; predicted {gain:.2f}x against the products as they are spelled"
    decision = replace(base, status=LOWERED, stage="lowered", code="lowered", reason=reason)
    claims = frozenset({*site.inside, site.output})
    return Choice(decision, site, ir, claims, gain, details=request)


def _exact(base: Decision, stage: str, refusal: Refusal) -> Choice:
    return Choice(kept_exact(base, stage, refusal))
