"""What a graph does beside its sites, as far as the choice depends on it: products with weights, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from monarch_compile.calls import Calls, Launcher, is_trained
from monarch_compile.passes.capture.enclosed import all_graphs
from monarch_compile.passes.graph import aten, inputs, placeholders, shape_of, value_of
from monarch_compile.passes.views import viewed

LARGE = 2**16
"""What symbolic sizes are taken to be, so that nothing depends on what they were in the call that was captured."""

STEPS = 4
"""FLOP are rounded down to this many steps in each factor of two: a class token more or less makes no difference."""


def _columns(node: Node) -> Any:
    """The size that a product with a matrix of weights sums over; 0 where the matrix is no weight."""
    place = 1 if node.target is aten.addmm.default else 0
    weight = inputs(node)[place + 1]
    return shape_of(inputs(node)[place])[-1] if _is_weight(weight) and len(shape_of(weight)) == 2 else 0


def _of_linear(node: Node) -> Any:
    return shape_of(inputs(node)[0])[-1]


def _of_convolution(node: Node) -> Any:
    return math.prod(shape_of(inputs(node)[1])[1:])


DENSE: dict[Any, Callable[[Node], Any]] = {
    aten.linear.default: _of_linear,
    aten.matmul.default: _columns,
    aten.mm.default: _columns,
    aten.addmm.default: _columns,
    aten.convolution.default: _of_convolution,
    aten.conv1d.default: _of_convolution,
    aten.conv2d.default: _of_convolution,
    aten.conv3d.default: _of_convolution,
}
"""Products with weights, and how many products of numbers each number of their output takes."""


@dataclass(frozen=True)
class Surroundings:
    """launcher: who launches the graph's kernels. trained: nodes that a backward pass goes through.

    flops: of products with weights, for symbolic sizes of `LARGE`; products: how many they are; sites: how many
    sites share them.
    """

    launcher: str
    trained: frozenset[Node]
    flops: int
    products: int
    sites: int

    @staticmethod
    def of(gm: GraphModule, num_sites: int, launcher: Launcher, trained: frozenset[Node]) -> Surroundings:
        """Those of a graph with so many sites, its bodies included."""
        found = [(node, DENSE[node.target](node)) for body in all_graphs(gm) for node in body.graph.nodes
                 if node.target in DENSE]  # fmt: skip
        dense = [(node, terms) for node, terms in found if terms != 0]
        flops = sum(2 * _large(terms) * math.prod(map(_large, shape_of(node))) for node, terms in dense)
        return Surroundings(launcher.of(symbolic=_is_symbolic(gm)), trained, flops, len(dense), max(1, num_sites))

    def calls(self, output: Node, batch: Any, seq_len: Any) -> Calls:
        """How the site that gives `output` is called, of so many sequences of this length."""
        rows = _large(batch) * _large(seq_len)
        trains = output in self.trained
        share = 1 / self.sites
        return Calls(self.launcher, trains, _rounded(self.flops / rows * share), self.products * share, share)


def trained_nodes(gm: GraphModule, example_inputs: Sequence[Any]) -> frozenset[Node]:
    """The nodes that need a gradient where the graph is called as with these inputs; those of bodies all or none."""
    if not is_trained(example_inputs):
        return frozenset()
    heads = zip(placeholders(gm), example_inputs, strict=True)
    found = {node for node, x in heads if isinstance(x, torch.Tensor) and x.requires_grad}
    enabled = True
    for node in gm.graph.nodes:
        if "set_grad_enabled" in str(node.target):
            enabled = bool(inputs(node)[0])
        elif enabled and node.target is not aten.detach.default and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    bodies = (node for body in all_graphs(gm) if body is not gm for node in body.graph.nodes)
    return frozenset({*found, *bodies})


def _is_weight(node: Any) -> bool:
    """Whether a matrix is an input of the graph, or one seen otherwise: not made of what the graph computes."""
    node = viewed(node)
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")


def _is_symbolic(gm: GraphModule) -> bool:
    values: Iterable[Any] = (value_of(node) for node in placeholders(gm))
    return any(isinstance(v, torch.SymInt) or _has_symbols(v) for v in values)


def _has_symbols(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape)


def _large(size: Any) -> int:
    """A size, with every symbol in it `LARGE`."""
    if isinstance(size, int):
        return size
    return _evaluated(size.node.expr)


@lru_cache(maxsize=1024)
def _evaluated(expr: sympy.Expr) -> int:
    return max(1, int(expr.subs(dict.fromkeys(expr.free_symbols, LARGE))))


def _rounded(flops: float) -> float:
    """Down to the next step; a little less than a step counts as one."""
    return 0.0 if flops < 1 else float(2 ** (math.floor(STEPS * math.log2(flops) + 0.1) / STEPS))
