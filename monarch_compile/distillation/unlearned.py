"""Why a lowered site does not learn: one type for it, and one table of its codes."""

from __future__ import annotations

from typing import NamedTuple

REMEDIES: dict[str, str] = {
    "exact": "options or a plan that lower the site",
    "frozen_weight": "requires_grad_(True) on the weights that lead to the site, or train_frozen=True",
    "in_body": "a site outside of the bodies of cond, scan and while_loop",
    "no_gain": "more steps, another lr, or more calls",
    "no_projection": "a linear layer of the model, with nothing but views, norms, rotations and scales behind it",
    "not_run": "calls that run the site",
    "not_replayed": "plain functions of tensors between the linear layer and the site",
    "several_layers": "a model without graph breaks, so that each of its layers is captured by itself",
    "several_projections": "linear layers whose results are not added up: merge adapters into the weights they change",
    "shared_weight": "a weight, or rows of one, that nothing else reads",
}
"""What would make a site learn, by code."""


class Unlearned(NamedTuple):
    """A site is left as it is. code: one of `REMEDIES`. reason: one sentence for a person."""

    code: str
    reason: str
