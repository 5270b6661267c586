"""Higher-order ops: an activation checkpoint is opened, so that passes see its body; others are kept, body and all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._higher_order_ops.wrap import uid
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointPolicy

from monarch_compile.errors import LoweringError
from monarch_compile.passes.graph import REGION, inputs, placeholders, value_of

CHECKPOINT = "tag_activation_checkpoint"
OWN_POLICY = "_checkpoint_context_fn"
"""Where Dynamo notes, on a checkpoint's body, a function that chooses op by op what to save."""

Run = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]

KEPT: dict[str, Run] = {
    CHECKPOINT: lambda op, args, kwargs: args[0](*args[1:]),
    "autograd_function_apply": lambda op, args, kwargs: args[0](*args[2:])[0],
    "invoke_subgraph": lambda op, args, kwargs: args[0](*args[2:]),
    "flex_attention": lambda op, args, kwargs: op(*args, **kwargs),
    "register_hook": lambda op, args, kwargs: args[0].view_as(args[0]),
}
"""Ops whose meaning tracing would lose (what to recompute, a backward of one's own, what a hook makes of a gradient),
and how to get their outputs."""


WHY: dict[str, str] = {
    CHECKPOINT: "a checkpoint with a context_fn, which chooses what to save by the names of the exact ops",
    "autograd_function_apply": "an autograd function, whose backward is its own",
    "invoke_subgraph": "a region compiled once for all of its calls",
    "cond": "a branch of cond",
    "scan": "a step of scan",
    "while_loop": "a step of while_loop",
}
"""What a body that is not looked into is: the reason why attention in it stays exact."""


def opened(target: object, args: tuple[Any, ...]) -> GraphModule | None:
    """The body of an activation checkpoint that may run as part of the graph around it; None for any other call.

    All that a checkpoint is to AOTAutograd are marks on its nodes, which the body's copy has here: what is marked is
    computed anew for the backward pass, region by region.
    """
    if not isinstance(target, HigherOrderOperator) or target.__name__ != CHECKPOINT or OWN_POLICY in args[0].meta:
        return None
    body = GraphModule(args[0], copy.deepcopy(args[0].graph))
    region = next(uid)
    for node in body.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            node.meta.update(dict(zip(REGION, (CheckpointPolicy.PREFER_RECOMPUTE, region), strict=True)))
    return body


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
