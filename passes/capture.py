"""From the graph Dynamo hands over to pre-dispatch ATen, where every spelling of attention is visible and SSA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._guards import TracingContext, detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from monarch_compile.passes.graph import placeholders

CARRIED_META = ("tensor_dict", "grapharg", "example_value", "stack_trace", "nn_module_stack")


def to_aten(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """Retrace `gm` to pre-dispatch ATen with the metadata that Inductor reads from Dynamo's graph kept.

    Without that metadata CUDA graphs would treat parameters as inputs that move.
    """
    context = TracingContext.try_get()
    fake_mode = context.fake_mode if context is not None else detect_fake_mode(example_inputs)
    if fake_mode is None:
        fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_fakify(x, fake_mode, context) for x in example_inputs]
    with fake_mode, preserve_node_meta():
        traced = make_fx(Interpreter(gm).run, pre_dispatch=True, _allow_non_fake_inputs=True)(*fakes)
    _carry_metadata(gm, traced)
    return traced


def _fakify(x: Any, fake_mode: FakeTensorMode, context: TracingContext | None) -> Any:
    if not isinstance(x, torch.Tensor) or (isinstance(x, FakeTensor) and x.fake_mode is fake_mode):
        return x
    symbolic = context.tensor_to_context.get(x) if context is not None else None  # type: ignore[no-untyped-call]
    return fake_mode.from_tensor(x, static_shapes=None if symbolic is not None else True, symbolic_context=symbolic)


def _carry_metadata(source: GraphModule, target: GraphModule) -> None:
    for old, new in zip(placeholders(source), placeholders(target), strict=True):
        for key in CARRIED_META:
            if key in old.meta:
                new.meta[key] = old.meta[key]
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    target.meta.update(source.meta)
    if hasattr(source, "_param_name_to_source"):
        target._param_name_to_source = source._param_name_to_source
    for name in [n for n in target._buffers if n.startswith("_tensor_constant")]:
        constant = target._buffers.pop(name)
        setattr(target, name, constant)
