"""Calls on tensor subclasses that answer Python calls by themselves (`__torch_function__`): kept as Dynamo has them.

Tracing such a call would run the subclass's own code, which reads tensors inside of it: the traced graph knows none of
those. AOTAutograd, which comes later, does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, track_tensor_tree
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.errors import LoweringError

DEFAULT = torch.Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def acts_by_itself(value: object) -> bool:
    """Whether a value is a wrapper subclass with a `__torch_function__` of its own."""
    if not is_traceable_wrapper_subclass(value):
        return False
    handler: Any = getattr(type(value), "__torch_function__")  # noqa: B009 (mypy knows less of the type)
    return handler is not torch._C._disabled_torch_function_impl and getattr(handler, "__func__", None) is not DEFAULT


def makes_dtensors(graph: Graph) -> bool:
    """Whether a graph makes DTensors of plain tensors, as the plans of torch's `parallelize_module` do: tracing would
    lose sight of these, since it does not record what makes them."""
    return any(node.op == "call_function" and _makes_dtensor(node.target) for node in graph.nodes)


def _makes_dtensor(target: Any) -> bool:
    return "from_local" in getattr(target, "__name__", "")


def is_kept(target: Any, args: Any, kwargs: Any, *, keeps_dtensors: bool = False) -> bool:
    """Whether a call with these arguments is recorded as it is.

    keeps_dtensors: whether its graph `makes_dtensors`: calls on DTensors are recorded, too.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    if keeps_dtensors and (_makes_dtensor(target) or any(map(is_traceable_wrapper_subclass, leaves))):
        return True
    return any(map(acts_by_itself, leaves))


def keep(node: Node, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
    """Record the call of Dynamo's node with these arguments; returns its (fake) outputs, which `run` computes.

    Raises:
        LoweringError: the call writes to what it is given.
    """
    mode = get_proxy_mode()
    if mode is None:
        return run()
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    versions = [x._version for x in tensors]
    with disable_proxy_modes_tracing():
        outputs = run()
    if [x._version for x in tensors] != versions:
        raise LoweringError(f"{node.target} writes to a tensor subclass that acts by itself")
    tracer: Any = mode.tracer
    given = pytree.tree_map(tracer.unwrap_proxy, (args, kwargs))
    proxy = tracer.create_proxy(node.op, node.target, *given)
    return track_tensor_tree(outputs, proxy, constant=None, tracer=tracer)
