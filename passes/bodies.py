"""Higher-order ops: kept as they are, body and all, and the attention inside their bodies reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils import _pytree as pytree

from monarch_compile.errors import LoweringError
from monarch_compile.passes.graph import inputs, placeholders, value_of

Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

KEPT: dict[str, Run] = {
    "tag_activation_checkpoint": lambda op, args, kwargs: args[0](*args[1:]),
    "autograd_function_apply": lambda op, args, kwargs: args[0](*args[2:])[0],
    "invoke_subgraph": lambda op, args, kwargs: args[0](*args[2:]),
    "flex_attention": lambda op, args, kwargs: op(*args, **kwargs),
}
"""Ops whose meaning tracing would lose (what to recompute, a backward of one's own), and how to get their outputs."""


def is_kept(target: object) -> bool:
    """Whether a call is recorded as it is, not traced into."""
    return isinstance(target, HigherOrderOperator) and target.__name__ in KEPT


def keep(node: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Record a call of a higher-order op, with the metadata of Dynamo's node; returns its (fake) outputs.

    Raises:
        LoweringError: the body writes to its inputs, or nothing is being traced.
    """
    mode = get_proxy_mode()
    if mode is None:
        raise LoweringError(f"{target.__name__} is met outside of tracing")
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
    versions = [x._version for x in tensors]
    with disable_proxy_modes_tracing(), torch.set_grad_enabled(torch.is_grad_enabled()):
        outputs = KEPT[target.__name__](target, args, kwargs)
    if [x._version for x in tensors] != versions:
        raise LoweringError(f"the body of {target.__name__} writes to its inputs")
    tracer: Any = mode.tracer
    for body in (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, GraphModule)):
        tracer.root.register_module(tracer.get_fresh_qualname("kept_body"), body)
    given = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
    proxy = tracer.create_proxy("call_function", target, *given)
    proxy.node.meta.update({k: v for k, v in node.meta.items() if k not in ("val", "example_value")})
    return track_tensor_tree(outputs, proxy, constant=None, tracer=tracer)


def bodies_of(node: Node, trace: Callable[[GraphModule, list[Any]], GraphModule]) -> Iterator[GraphModule]:
    """The bodies of a higher-order op as pre-dispatch ATen; one that cannot be traced is passed over.

    trace: makes ATen of a body that Dynamo has left, given fake inputs.
    """
    module = node.graph.owning_module
    for given in inputs(node):
        body = getattr(module, str(given.target), None) if isinstance(given, Node) and given.op == "get_attr" else None
        if not isinstance(body, GraphModule):
            continue
        heads = placeholders(body)
        if all("val" in head.meta for head in heads):
            yield body
            continue
        fakes = [value_of(x) for x in inputs(node) if isinstance(x, Node) and x.op != "get_attr"]
        if len(fakes) == len(heads):
            try:
                yield trace(body, fakes)
            except Exception:  # a body of another signature (a backward, a score function) holds no site of ours
                continue
