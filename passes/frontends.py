"""What a family gives the passes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from monarch_compile.config import MonarchConfig
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.state import Choice, Pass
from monarch_compile.passes.surroundings import Surroundings
from monarch_compile.registry import FAMILIES, Modules


@dataclass(frozen=True)
class Frontend:
    """A family's way from a graph to its op, as plain functions.

    op: the operator that stands for a lowered site; its first `num_tensors` arguments are tensors or None.
    trained_op: what may stand for a site that is differentiated; it has the arguments of `op`, and the result of `op`
        as the first of several. None where `op` itself does.
    prepare: passes before matching, for what the family spells in many ways.
    laid_out: a fake tensor like the op's result, with the strides that the op gives it.
    find: every site of a graph and of the bodies in it that are opened, refused ones included, in the graph's order.
    choose: what is decided about a site, by its name, the options, what its graph does beside it, and what
        the dims of its tensors are made of.
    lower: rewrites a site as it was chosen; returns the op's node.
    finish: passes after lowering.
    """

    family: str
    op: Any
    num_tensors: int
    laid_out: Callable[[Tensor], Tensor]
    find: Callable[[GraphModule], list[Any]]
    choose: Callable[[Any, str, MonarchConfig, Surroundings, Layouts], Choice]
    lower: Callable[[Choice], Node]
    prepare: tuple[Pass, ...] = ()
    finish: tuple[Pass, ...] = ()
    trained_op: Any = None


def frontends(gm: GraphModule | None = None) -> tuple[Frontend, ...]:
    """Those of all families; of a graph, without those whose operators (`Modules.occurs_with`) neither it nor a body in
    it has: importing them would make every other compilation wait."""
    found = FAMILIES.values() if gm is None else _may_occur(gm)
    return tuple(_frontend(modules.frontend) for modules in found)


def _may_occur(gm: GraphModule) -> list[Modules]:
    bodies = [body for body in gm.modules() if isinstance(body, GraphModule)]
    names = " ".join({str(n.target) for body in bodies for n in body.graph.nodes if n.op.startswith("call")})
    return [
        modules
        for modules in FAMILIES.values()
        if not modules.occurs_with or any(part in names for part in modules.occurs_with)
    ]


@functools.cache
def _frontend(module: str) -> Frontend:
    found: Frontend = importlib.import_module(module).FRONTEND
    return found
