"""Softmax written by hand becomes softmax: weights over their own sum, late normalisation, log-softmax.

Every rule is an identity of real numbers that holds for any input, site or not. A rule is a row of FOLDS; what counts
as weights is a row of WEIGHTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from monarch_compile.passes.attention.masks import is_binary
from monarch_compile.passes.attention.products import MIXED
from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.graph import (
    FLOATS,
    arg,
    aten,
    call_like,
    dtype_of,
    inputs,
    normal_dim,
    same_shape,
    shape_of,
    switches_mode,
)
from monarch_compile.passes.memory import must_be_kept, storages_of, writes_of


class Recipe(NamedTuple):
    """What makes a node anew."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Folded:
    """A softmax that stands for what was written by hand, and how that was made: kept for a site that stays exact."""

    softmax: Node
    original: Node
    recipes: Mapping[Node, Recipe]


def fold_softmaxes(gm: GraphModule) -> tuple[Folded, ...]:
    """Rewrite hand-written softmaxes; returns what was folded, in the graph's order.

    What is read for a fold must not be written anywhere in the graph, nor lie across a switch of grad mode or autocast.
    """
    written = frozenset().union(*(write.storages for write in writes_of(gm.graph)))
    period = 0
    pairs: list[tuple[Node, Node]] = []
    periods: dict[Node, int] = {}
    for node in list(gm.graph.nodes):
        period += switches_mode(node)
        periods[node] = period
        fold = FOLDS.get(node.target) if node.op == "call_function" else None
        found = fold(node) if fold is not None else None
        if found is None or any(storages_of(n) & written or periods[n] != period for n in found.read):
            continue
        with gm.graph.inserting_before(node):
            result = found.build(node)
        if dtype_of(result) != dtype_of(node) or not same_shape(result, node):
            continue
        periods[result] = period
        node.replace_all_uses_with(result)
        pairs.append((result, node))
    if not pairs:
        return ()
    recipes = {n: Recipe(n.op, n.target, n.args, dict(n.kwargs), dict(n.meta)) for n in gm.graph.nodes}
    gm.graph.eliminate_dead_code(must_be_kept)
    left = set(gm.graph.nodes)
    gone = {node: recipe for node, recipe in recipes.items() if node not in left}
    return tuple(Folded(result, node, gone) for result, node in pairs)


def unfold_softmaxes(gm: GraphModule, folded: Sequence[Folded]) -> int:
    """Put back what each fold that is still in the graph stands for; returns how many.

    A fold is an identity of real numbers: in floating point the two may differ, where scores are huge. So what stays
    exact stays as it was written. One whose operands other passes have replaced keeps its softmax.
    """
    changed = 0
    for fold in reversed(folded):  # a later one may hold an earlier one
        left = set(gm.graph.nodes)
        if fold.softmax not in left or not fold.softmax.users:
            continue
        order = _needed(fold, left)
        if order is None:
            continue
        made: dict[Node, Node] = {}
        with gm.graph.inserting_before(fold.softmax):
            for node in order:
                made[node] = _made(gm, fold.recipes[node], made, node.name)
        fold.softmax.replace_all_uses_with(made[fold.original])
        changed += 1
    if changed:
        gm.graph.eliminate_dead_code(must_be_kept)
    return changed


def _made(gm: GraphModule, recipe: Recipe, made: Mapping[Node, Node], name: str) -> Node:
    args, kwargs = map_arg((recipe.args, recipe.kwargs), lambda n: made.get(n, n))
    node = gm.graph.create_node(recipe.op, recipe.target, args, kwargs, name=name)
    node.meta = dict(recipe.meta)
    return node


def _needed(fold: Folded, left: set[Node]) -> list[Node] | None:
    """The nodes to make anew, each after its operands; None where an operand is neither in the graph nor known."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> bool:
        if node in left or node in order:
            return True
        if node not in fold.recipes:
            return False
        recipe = fold.recipes[node]
        operands: list[Node] = []
        map_arg((recipe.args, recipe.kwargs), operands.append)
        if not all(visit(operand) for operand in operands):
            return False
        order[node] = None
        return True

    return list(order) if visit(fold.original) else None


@dataclass(frozen=True)
class Weights:
    """exp(factor * scores), 0 where a mask says so. drops: masks, each with True where a weight is 0 or where it stays.

    read: the nodes that were looked through.
    """

    scores: Node
    read: tuple[Node, ...]
    factor: float = 1.0
    drops: tuple[tuple[Node, bool], ...] = ()

    def softmax(self, like: Node, dim: int) -> Node:
        """softmax of the scores that these are the weights of."""
        scores = self.scores
        if self.factor != 1:
            scores = call_like(like, aten.mul.Tensor, (scores, self.factor))
        for mask, is_kept in self.drops:
            if dtype_of(mask) != torch.bool:
                dropped = call_like(like, aten.eq.Scalar, (mask, 0))
            else:
                dropped = call_like(like, aten.logical_not.default, (mask,)) if is_kept else mask
            scores = call_like(like, aten.masked_fill.Scalar, (scores, dropped, -math.inf))
        return call_like(like, aten.softmax.int, (scores, dim))


@dataclass(frozen=True)
class Fold:
    """A rewriting that has been proved: the nodes it reads, and how to build it before a node."""

    read: tuple[Node, ...]
    build: Callable[[Node], Node]


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weights(node: Any, dim: int) -> Weights | None:
    """The node as weights whose sums over `dim` normalise them."""
    if not isinstance(node, Node) or node.op != "call_function" or dtype_of(node) not in FLOATS:
        return None
    rule = WEIGHTS.get(node.target)
    found = rule(node, dim) if rule is not None else None
    if found is None or dtype_of(found.scores) != dtype_of(node) or not same_shape(found.scores, node):
        return None
    return replace(found, read=(*found.read, node))


def _from_exp(node: Node, dim: int) -> Weights | None:
    return Weights(inputs(node)[0], (inputs(node)[0],), math.log(2) if node.target is aten.exp2.default else 1.0)


def _from_softmax(node: Node, dim: int) -> Weights | None:
    """Probabilities are weights too: what a mask leaves of them may be normalised anew."""
    if arg(node, 2, "dtype") is not None or normal_dim(inputs(node)[1], len(shape_of(node))) != dim:
        return None
    return Weights(inputs(node)[0], (inputs(node)[0],))


def _dropping(weights: Weights | None, mask: Any, is_kept: bool) -> Weights | None:
    if weights is None or not isinstance(mask, Node):
        return None
    return replace(weights, read=(*weights.read, mask), drops=(*weights.drops, (mask, is_kept)))


def _from_masked_fill(node: Node, dim: int) -> Weights | None:
    source, mask, fill = inputs(node)
    return _dropping(_weights(source, dim), mask, False) if constant_of(fill) == 0 else None


def _from_where(node: Node, dim: int) -> Weights | None:
    mask, source, other = inputs(node)
    return _dropping(_weights(source, dim), mask, True) if constant_of(other) == 0 else None


def _from_product(node: Node, dim: int) -> Weights | None:
    for source, mask in (inputs(node)[:2], inputs(node)[1::-1]):
        weights = _weights(source, dim) if isinstance(mask, Node) and mask is not source else None
        if weights is not None and is_binary(mask):
            return _dropping(weights, mask, True)
    return None


WEIGHTS: dict[object, Callable[[Node, int], Weights | None]] = {
    aten.exp.default: _from_exp,
    aten.exp2.default: _from_exp,
    aten.softmax.int: _from_softmax,
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _from_masked_fill),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther), _from_where),
    aten.mul.Tensor: _from_product,
}


def _summed(node: Any) -> tuple[Node, int, tuple[Node, ...]] | None:
    """(x, dim, nodes read) where `node` is the sum of x over one dim, that dim kept with size 1."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.unsqueeze.default:
        inner, place = inputs(node)[0], normal_dim(inputs(node)[1], len(shape_of(node)))
        found = _sum_over(inner, keepdim=False)
        return (*found, (inner, node)) if found is not None and found[1] == place else None
    found = _sum_over(node, keepdim=True)
    return None if found is None else (*found, (node,))


def _sum_over(node: Any, *, keepdim: bool) -> tuple[Node, int] | None:
    if not isinstance(node, Node) or node.target is not aten.sum.dim_IntList or node.kwargs.get("dtype") is not None:
        return None
    source, dims = inputs(node)[:2]
    if len(node.args) > 3 or bool(arg(node, 2, "keepdim", False)) != keepdim or len(dims or ()) != 1:
        return None
    return source, normal_dim(dims[0], len(shape_of(source)))


# ---- folds -----------------------------------------------------------------------------------------------------------


def _fold_quotient(node: Node) -> Fold | None:
    return _quotient(node, *inputs(node)[:2])


def _fold_times_reciprocal(node: Node) -> Fold | None:
    for above, factor in (inputs(node)[:2], inputs(node)[1::-1]):
        if isinstance(factor, Node) and (below := _reciprocal_of(factor)) is not None:
            found = _quotient(node, above, below)
            return None if found is None else replace(found, read=(*found.read, factor))
    return None


def _reciprocal_of(node: Node) -> Any:
    """x where `node` is 1 / x."""
    if node.target is aten.mul.Tensor and constant_of(inputs(node)[1]) == 1 and isinstance(inputs(node)[0], Node):
        return _reciprocal_of(inputs(node)[0])
    is_power = node.target is aten.pow.Tensor_Scalar and inputs(node)[1] == -1
    return inputs(node)[0] if is_power or node.target is aten.reciprocal.default else None


def _quotient(node: Node, above: Any, below: Any) -> Fold | None:
    """weights / their sum, before or after the product with the values."""
    total = _summed(below)
    if total is None or not isinstance(above, Node):
        return None
    summed, dim, read = total
    weights = _weights(summed, dim)
    if weights is None:
        return None
    read = (*read, *weights.read)
    if summed is above or _is_same(summed, above):
        return Fold((*read, above), lambda like: weights.softmax(like, dim))
    return _late(node, above, summed, weights, dim, (*read, above))


def _is_same(x: Node, y: Node) -> bool:
    """Whether two nodes, one of them weights (all of whose ops are deterministic), are one op on the same inputs."""
    return x.op == y.op == "call_function" and (x.target, x.args, x.kwargs) == (y.target, y.args, y.kwargs)


def _late(node: Node, product: Node, summed: Node, weights: Weights, dim: int, read: tuple[Node, ...]) -> Fold | None:
    """(weights @ v) / sum is softmax @ v where each row of the product is divided by the sum of its own row."""
    rank = len(shape_of(product))
    if product.target not in MIXED or set(product.users) != {node} or dim != rank - 1:
        return None
    mixed = MIXED[product.target](product, summed, False)
    if mixed is None or mixed.out_dims != tuple(range(rank)) or len(shape_of(summed)) != rank:
        return None
    if str(shape_of(summed)[:-1]) != str(shape_of(product)[:-1]):
        return None

    def build(like: Node) -> Node:
        probs = weights.softmax(like, dim)
        args = map_arg(product.args, lambda n: probs if n is summed else n)
        return call_like(like, product.target, args, dict(product.kwargs))

    return Fold((*read, mixed.v.node), build)


def _fold_exp(node: Node) -> Fold | None:
    """exp of log-softmax, or of scores less their logsumexp."""
    source = inputs(node)[0]
    if not isinstance(source, Node) or source.op != "call_function":
        return None
    if source.target is aten.log_softmax.int:
        given = inputs(source)
        dtype = {} if (cast := arg(source, 2, "dtype")) is None else {"dtype": cast}
        return Fold((given[0], source), lambda like: call_like(like, aten.softmax.int, given[:2], dtype))
    if source.target is not aten.sub.Tensor or arg(source, 2, "alpha", 1) != 1:
        return None
    scores, total = inputs(source)[:2]
    if not isinstance(total, Node) or total.target is not aten.logsumexp.default or inputs(total)[0] is not scores:
        return None
    dims = inputs(total)[1]
    if not arg(total, 2, "keepdim", False) or len(dims) != 1:
        return None
    return Fold((scores, source, total), lambda like: call_like(like, aten.softmax.int, (scores, dims[0])))


FOLDS: dict[object, Callable[[Node], Fold | None]] = {
    aten.div.Tensor: _fold_quotient,
    aten.mul.Tensor: _fold_times_reciprocal,
    aten.exp.default: _fold_exp,
}
