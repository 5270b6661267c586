"""Inductor without what takes long: its passes over the graph run, and what comes of them is run as it is."""

from __future__ import annotations

from functools import partial

import pytest
from functorch.compile import make_boxed_func
from torch._inductor import compile_fx


def without_codegen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the backend generate no code; compile caches must be off."""
    run = partial(compile_fx.compile_fx, inner_compile=lambda gm, inputs, **_: make_boxed_func(gm.forward))
    monkeypatch.setattr(compile_fx, "compile_fx", run)
