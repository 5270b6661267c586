"""What the passes decided about one site, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from monarch_compile.calls import DEVICE_ALONE, Calls
from monarch_compile.ir import Dim
from monarch_compile.refusal import remedy_for

LOWERED = "lowered"
EXACT = "exact"


@dataclass(frozen=True)
class Decision:
    """The outcome for one site.

    family: the family of operators that the site is of.
    name: module path and source line of the site, e.g. ``encoder.layers.0.self_attn (model.py:12)``.
    status: "lowered" or "exact".
    stage: the last stage reached: "match", "mask", "legality", "cost" or "lowered".
    code: short stable identifier, e.g. "lowered", "mask_general", "cost_exact_wins".
    reason: one sentence for a person.
    node: name of the FX node that decided it; source: its source line, "" when unknown.
    ir: the IR of the lowered form; also present where a legal site was kept exact by the cost model.
    q_shape, k_shape, v_shape: (batch, heads, seq_len, dim); empty when unknown.
    mask: "none", "key_padding", or the kind that was refused.
    calls: how the site is called, as far as its time depends on it.
    blocking: one line about the token grid of the site, where it is found or why there is none; "" where none was
        looked for.
    """

    family: str
    name: str
    status: str
    stage: str
    code: str
    reason: str
    node: str
    source: str = ""
    ir: Any = None
    q_shape: tuple[Dim, ...] = ()
    k_shape: tuple[Dim, ...] = ()
    v_shape: tuple[Dim, ...] = ()
    dtype: torch.dtype | None = None
    device: str = "cpu"
    mask: str = "none"
    calls: Calls = DEVICE_ALONE
    blocking: str = ""

    @property
    def remedy(self) -> str:
        """What would make the site lower; '' where it does."""
        return remedy_for(self.code)

    def as_json(self) -> dict[str, str]:
        """What logs hold of it."""
        names = ("family", "name", "status", "stage", "code", "reason", "node", "source", "remedy")
        return {name: getattr(self, name) for name in names} | {"ir": str(self.ir or "")}


@dataclass(frozen=True)
class Change:
    """What was changed beside the sites of a graph, for their sake.

    name: module path and source line, as of a site. reason: what became of it and why, in a clause.
    """

    name: str
    reason: str
