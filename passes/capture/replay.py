"""Calls that are alike are traced once: most layers of a model make the calls of the first, on tensors of one kind.

Tracing a call finds out which ATen ops it consists of. That depends on the function, on what it is given except the
elements of tensors, and on modes; so a second call that is alike in these records the same ops. Their values are fake
tensors like the first call's; where these share memory with others, the ops run on the tensors at hand, as in tracing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensor
from torch.fx import Node, Proxy
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    extract_val,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor,
)
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from monarch_compile.passes.memory import storages_of

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout, type(...))
"""Types of arguments that are part of what makes calls alike; `bool` and `int` are distinguished."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """The nodes that a call was traced to: they read `inputs` and each other, and `output` holds some of them.

    fresh: of these, those whose value has memory of its own, with what a new tensor like it is made of.
    """

    inputs: tuple[Node, ...]
    steps: tuple[Node, ...]
    output: Any
    fresh: dict[Node, dict[str, Any]]


class Calls:
    """What calls were traced to, in one capture."""

    def __init__(self) -> None:
        self._known: dict[Any, Recorded | None] = {}

    def run(self, target: object, args: Any, kwargs: Any, trace: Callable[[], Any]) -> Any:
        """The (fake) output of a call, which is recorded; `trace` traces it."""
        mode = get_proxy_mode()
        tracer: Any = None if mode is None else mode.tracer
        leaves, spec = pytree.tree_flatten((args, kwargs))
        with torch._C.DisableTorchFunction():  # modes that would be asked about every look at a tensor
            key = None if tracer is None else _key(target, leaves, spec)
        if key is None:
            return trace()
        tensors = list({id(x): x for x in leaves if isinstance(x, Tensor)}.values())
        inputs = [node for x in tensors if (node := getattr(tracer.unwrap_proxy(x), "node", None)) is not None]
        if len(inputs) != len(tensors):
            return trace()
        known = self._known.get(key)
        if known is not None:
            return _again(known, tensors, inputs, tracer)
        last = tracer.graph._root._prev
        output = trace()
        if key not in self._known:
            self._known[key] = _recorded(tensors, inputs, last, output, tracer)
        return output


def _key(target: object, leaves: list[Any], spec: Any) -> Any:
    """All that decides which ops a call consists of and what they give; None where that is more than can be told."""
    if not _is_known(target):
        return None
    tensors: list[Tensor] = []
    facts: list[Any] = []
    for x in leaves:
        if isinstance(x, Tensor):
            place = next((i for i, other in enumerate(tensors) if other is x), None)
            found = _facts(x) if place is None else place
            if found is None:
                return None
            tensors.append(x)
            facts.append(found)
        elif type(x) in PLAIN:
            facts.append((type(x), repr(x) if isinstance(x, float) else x))  # 0.0 and -0.0 are equal
        else:
            return None
    autocast = tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES)
    return target, spec, tuple(facts), torch.is_grad_enabled(), autocast


DEVICES = ("cpu", "cuda")
"""Calls on tensors elsewhere are traced each time."""
OURS = ("torch", "_operator", "builtins", "monarch_compile")
"""Where functions are from that do the same each time. A user's, allowed into the graph as it is, may not."""


def _is_known(target: object) -> bool:
    """Whether a target (a method's name, a function) does the same on tensors of the same kind."""
    if isinstance(target, str):
        return True
    module = getattr(target, "__module__", None) or getattr(getattr(target, "__self__", None), "__module__", None)
    return isinstance(module, str) and module.partition(".")[0] in OURS


def _facts(x: Tensor) -> Any:
    """A tensor without its elements; None where it is of another kind, or its sizes are symbolic."""
    if (
        not isinstance(x, FakeTensor)
        or x.device.type not in DEVICES
        or x.layout is not torch.strided
        or x.constant is not None
    ):
        return None
    shape, stride = tuple(x.shape), x.stride()
    if not all(type(n) is int for n in (*shape, *stride)):
        return None
    return type(x), shape, stride, x.dtype, x.device, x.requires_grad, x.is_conj(), x.is_neg()


def _recorded(tensors: list[Tensor], inputs: list[Node], last: Node, output: Any, tracer: Any) -> Recorded | None:
    """What was traced since the node `last`; None where it must be traced each time."""
    steps: list[Node] = []
    node = last._next
    while node is not tracer.graph._root:
        if not _is_step(node) or not {*inputs, *steps}.issuperset(node.all_input_nodes):
            return None
        steps.append(node)
        node = node._next
    leaves = pytree.tree_leaves(output)
    if not all(isinstance(x, Tensor) and not _has_value(x, tracer) for x in leaves) or len(set(inputs)) != len(inputs):
        return None
    made = pytree.tree_map(lambda x: getattr(tracer.unwrap_proxy(x), "node", None), output)
    if not {*pytree.tree_leaves(made)} <= {*steps}:
        return None
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return Recorded(tuple(inputs), tuple(steps), made, {} if differentiated else _fresh(inputs, steps))


def _has_value(x: Tensor, tracer: Any) -> bool:
    """Whether a tensor's elements are known while it is traced, so that it may become a size: a new one's are not."""
    known = x.constant if isinstance(x, FakeTensor) else None
    return known is not None or getattr(get_proxy_slot(x, tracer, None), "constant", None) is not None


def _fresh(inputs: Sequence[Node], steps: Sequence[Node]) -> dict[Node, dict[str, Any]]:
    """The steps that give a tensor in memory of its own, which starts at its first element and ends with its last."""
    shared = {storage for node in inputs for storage in storages_of(node)}
    found = {}
    for node in steps:
        value = node.meta["val"]
        if isinstance(value, Tensor) and shared.isdisjoint(storages_of(node)) and value.storage_offset() == 0:
            like = {"size": value.shape, "stride": value.stride(), "dtype": value.dtype, "device": value.device}
            last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
            if value.numel() and value.untyped_storage().nbytes() == (last + 1) * value.element_size():
                found[node] = like
        shared |= storages_of(node)
    return found


UNREPEATABLE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _is_step(node: Node) -> bool:
    """Whether a node may be recorded anew from its arguments alone: it gives something, writes nothing, and makes no
    symbols."""
    if node.op != "call_function" or "val" not in node.meta:
        return False
    target = node.target
    if not isinstance(target, OpOverload):
        return target is operator.getitem
    if target.namespace != "aten" or target._schema.is_mutable or not UNREPEATABLE.isdisjoint(target.tags):
        return False
    tensors = [x for x in pytree.tree_leaves(node.meta["val"]) if isinstance(x, Tensor)]
    return all(type(n) is int for x in tensors for n in x.shape)  # not all ops that make symbols have the tag


def _again(known: Recorded, tensors: list[Tensor], inputs: list[Node], tracer: Any) -> Any:
    """Record the ops of a call that is alike; returns the output."""
    nodes: dict[Node, Node] = dict(zip(known.inputs, inputs, strict=True))
    values: dict[Node, Any] = dict(zip(known.inputs, tensors, strict=True))
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        for step in known.steps:
            target: Any = step.target
            if step in known.fresh:
                values[step] = torch.empty_strided(**known.fresh[step])
            else:
                args, kwargs = map_arg((step.args, step.kwargs), values.__getitem__)
                values[step] = target(*args, **kwargs)
            args, kwargs = map_arg((step.args, step.kwargs), nodes.__getitem__)
            name = tracer.graph._target_to_str(getattr(target, "overloadpacket", target).__name__)
            nodes[step] = node = tracer.create_node("call_function", target, args, kwargs, name)
            node.meta["val"] = extract_val(values[step])
            if isinstance(values[step], Tensor):
                track_tensor(values[step], Proxy(node, tracer), constant=None, tracer=tracer)
    return pytree.tree_map(values.__getitem__, known.output)
