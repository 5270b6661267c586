"""Ways to compile a model that the demo compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """A way to compile a model. `options` None: plain Inductor, exact attention."""

    name: str
    options: Mapping[str, Any] | None
    why: str = ""

    def compile(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """`model` compiled this way, for the shapes that it meets and no others."""
        if self.options is None:
            return torch.compile(model, dynamic=False)
        return torch.compile(model, backend="monarch", options=dict(self.options), dynamic=False)

    @property
    def spelled(self) -> str:
        """The options in a line."""
        return ", ".join(f"{key}={value}" for key, value in (self.options or {}).items()) or "-"


EXACT = Setting("inductor", None, "exact attention")
