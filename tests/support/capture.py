"""Run the passes on a Python function through Dynamo, without Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported

from monarch_compile.config import MonarchConfig
from monarch_compile.passes.pipeline import Rewrite, rewrite


def run_passes(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **options: Any
) -> tuple[Any, list[Rewrite]]:
    """Call `fn` with its graphs rewritten and run eagerly; returns its output and a Rewrite a graph."""
    options.setdefault("policy", "always")
    options.setdefault("block_size", 1)
    config, found = MonarchConfig(**options), []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        result = rewrite(gm, example_inputs, config)
        found.append(result)
        return result.after.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)
    try:
        return compiled(*args), found
    except Unsupported:
        skip_what_dynamo_refuses(fn, *args, dynamic=dynamic)
        raise


def skip_what_dynamo_refuses(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> None:
    """Skip a test of a program that Dynamo of this torch cannot capture whole, whatever the backend."""
    torch._dynamo.reset()
    try:
        torch.compile(fn, backend="eager", dynamic=dynamic, fullgraph=True)(*args)
    except Unsupported as refusal:
        pytest.skip(f"torch {torch.__version__} cannot capture this: {str(refusal).partition(chr(10))[0]}")


def decisions_of(fn: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """Every decision of the single graph of `fn`."""
    return list(run_passes(fn, *args, **options)[1][0].decisions)
