"""What follows from the inputs of a call, and what is a parameter, a buffer or a constant, or made of such alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.passes.capture.enclosed import given_to, given_value
from monarch_compile.passes.graph import WEIGHT, ancestors_of, shape_of
from monarch_compile.passes.memory import storages_of, writes_of

STATIC = "_dynamo_static_input_type"
"""Where Dynamo notes that an input of the graph stays in its place: a module's tensor, or one that is said to."""


def is_computed(node: Node, before: Node | None = None) -> bool:
    """Whether a tensor follows from the inputs of a call.

    before: also from what is written, earlier than this node, to memory that the tensor is read from, such as a cache.
    """
    return any(map(_is_given, ancestors_of([node]))) or (before is not None and _is_filled(node, before))


def is_made_by(node: Node, is_layer: Callable[[Node], bool]) -> bool:
    """Whether a tensor is made by a layer; single numbers, which only scale it, are not looked at."""
    found = ancestors_of([node], lambda n: str(math.prod(shape_of(n))) != "1")
    return any(n.op == "call_function" and is_layer(n) for n in found)


def _is_filled(node: Node, before: Node) -> bool:
    order = {n: place for place, n in enumerate(before.graph.nodes)}
    memory = frozenset().union(*map(storages_of, ancestors_of([node])))
    writes = [w for w in writes_of(before.graph) if w.place < order[before] and w.storages & memory]
    return any(is_computed(n) for w in writes for n in w.node.all_input_nodes)


def _is_given(node: Node) -> bool:
    if node.op != "placeholder" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if given_to(node) is not None:
        outside = given_value(node)
        return outside is None or is_computed(outside)
    return not _is_weight(node)


def _is_weight(node: Node) -> bool:
    """Whether an input of the graph is a parameter or a module's tensor: a cache that stays in its place is neither."""
    if WEIGHT in node.meta:
        return True
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    if STATIC not in node.meta.get("tensor_dict", {}):
        return False
    if source is None or isinstance(node.meta.get("example_value"), torch.nn.Parameter):
        return True
    kind = source.guard_source() if callable(source.guard_source) else source.guard_source
    return bool(kind.is_unspecialized_nn_module())
