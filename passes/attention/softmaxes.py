"""Which nodes are softmaxes, and of what: one op, or written by hand. The graph is only read.

A spelling by hand is an identity of real numbers that holds for any input, attention or not: weights over their own
sum, late normalisation, exp of log-softmax. A spelling is a row of SOFTMAXES; what counts as weights, a row of WEIGHTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch.fx import Graph, Node

from monarch_compile.passes.attention.masks import is_binary
from monarch_compile.passes.attention.products import MIXED
from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.graph import (
    FLOATS,
    arg,
    aten,
    dtype_of,
    inputs,
    normal_dim,
    same_shape,
    shape_of,
    switches_mode,
)
from monarch_compile.passes.memory import Write, storages_of, writes_of
from monarch_compile.refusal import Refusal


class Late(NamedTuple):
    """Late normalisation: `product` is weights @ values, of which each row is divided by the sum of its weights."""

    weights: Node
    product: Node


@dataclass(frozen=True)
class Softmax:
    """softmax(factor * scores) over `dim`, with weights of 0 where a mask says so; the value of `node`.

    dim: None of exponentials that nothing is known to normalise. drops: masks, each with whether a weight stays where
    it is True (or 1) or goes there. inner: what stands between the scores and the node. late: given where the node's
    value is the softmax times values already. closed: nodes that read this node as a part of another softmax. refusal:
    why exponentials that are normalised by hand are not read as that softmax, where it is known.
    """

    node: Node
    scores: Node
    dim: int | None
    factor: float = 1.0
    drops: tuple[tuple[Node, bool], ...] = ()
    inner: tuple[Node, ...] = ()
    late: Late | None = None
    closed: frozenset[Node] = frozenset()
    refusal: Refusal | None = None

    @property
    def rank(self) -> int:
        """How many dims the scores have."""
        return len(shape_of(self.scores))

    @property
    def masks(self) -> tuple[Node, ...]:
        """The masks, whatever they say."""
        return tuple(mask for mask, _ in self.drops)

    def through(self, *nodes: Node) -> Softmax:
        """The same, `node` and these being looked through."""
        return replace(self, inner=tuple(dict.fromkeys((*self.inner, self.node, *nodes))))


Softmaxes = Mapping[Node, Softmax]


def softmax_over(node: Node, dim: int | None) -> Softmax:
    """One op, as the softmax of its first input; None: over the last dim."""
    return Softmax(node, inputs(node)[0], normal_dim(-1 if dim is None else dim, len(shape_of(node))))


def softmaxes_of(graph: Graph) -> dict[Node, Softmax]:
    """The softmaxes of a graph by their nodes, in its order, and its other exponentials; no part of another is one.

    What is read for a softmax by hand must not be written anywhere in the graph, nor lie across a switch of grad mode
    or autocast.
    """
    writes = writes_of(graph)
    found: dict[Node, Softmax] = {}
    periods: dict[Node, int] = {}
    period = 0
    for node in graph.nodes:
        period += switches_mode(node)
        periods[node] = period
        rule = SOFTMAXES.get(node.target) if node.op == "call_function" else None
        softmax = rule(node, found) if rule is not None else None
        refusal = _refusal_of(softmax, writes, periods) if softmax is not None and softmax.inner else None
        if softmax is not None and refusal is not None:
            found.update({n: replace(found[n], refusal=refusal) for n in softmax.inner if n in found})
            softmax = None
        if softmax is None and node.op == "call_function" and (exponent := _exponent_of(node)) is not None:
            softmax = Softmax(node, exponent[0], None, exponent[1], refusal=refusal)
        if softmax is not None:
            found[node] = softmax
    return _without_parts(graph, found)


def _refusal_of(softmax: Softmax, writes: Sequence[Write], periods: Mapping[Node, int]) -> Refusal | None:
    """Why a softmax by hand is not what its ops say. periods: between which switches of a mode nodes lie."""
    read = (softmax.scores, *softmax.inner, *softmax.masks)
    storages = frozenset().union(*map(storages_of, read))
    write = next((write for write in writes if write.storages & storages), None)
    if write is not None:
        why = f"{write.node.target} writes in place to memory that a softmax written by hand reads"
        return Refusal("mutation", why, write.node)
    if any(periods[n] != periods[softmax.node] for n in read):
        return Refusal("context", "grad mode or autocast changes within a softmax written by hand", softmax.node)
    return None


def _without_parts(graph: Graph, found: Softmaxes) -> dict[Node, Softmax]:
    """Those that serve more than another softmax; of what else they serve, the parts of that one are closed off."""
    inner = {node for softmax in found.values() for node in softmax.inner}
    parts: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in inner and all(u in parts or (u in found and node in found[u].inner) for u in node.users):
            parts.add(node)
    left = {node: softmax for node, softmax in found.items() if node not in parts}
    for node in inner.intersection(left):
        wholes = [softmax for softmax in found.values() if node in softmax.inner]
        closed = {n for whole in wholes for n in (whole.node, *parts.intersection(whole.inner))}
        left[node] = replace(left[node], closed=frozenset(closed))
    return left


# ---- weights ---------------------------------------------------------------------------------------------------------


def _weights(node: Any, dim: int, known: Softmaxes) -> Softmax | None:
    """The node as weights whose sums over `dim` normalise them; probabilities are weights, too."""
    if not isinstance(node, Node) or node.op != "call_function" or dtype_of(node) not in FLOATS:
        return None
    found = known.get(node)
    if found is not None and (found.late is not None or found.dim not in (None, dim)):
        return None
    if found is None and node.target in WEIGHTS:
        found = WEIGHTS[node.target](node, dim, known)
    if found is None or dtype_of(found.scores) != dtype_of(node) or not same_shape(found.scores, node):
        return None
    return found


def _masked(node: Node, weights: Softmax | None, mask: Any, is_kept: bool) -> Softmax | None:
    if weights is None or not isinstance(mask, Node):
        return None
    return replace(weights.through(), node=node, drops=(*weights.drops, (mask, is_kept)))


def _masked_fill(node: Node, dim: int, known: Softmaxes) -> Softmax | None:
    source, mask, fill = inputs(node)
    return _masked(node, _weights(source, dim, known), mask, False) if constant_of(fill) == 0 else None


def _where(node: Node, dim: int, known: Softmaxes) -> Softmax | None:
    mask, left, right = inputs(node)
    if constant_of(right) == 0:
        return _masked(node, _weights(left, dim, known), mask, True)
    return _masked(node, _weights(right, dim, known), mask, False) if constant_of(left) == 0 else None


def _times_mask(node: Node, dim: int, known: Softmaxes) -> Softmax | None:
    for source, mask in (inputs(node)[:2], inputs(node)[1::-1]):
        weights = _weights(source, dim, known) if isinstance(mask, Node) and mask is not source else None
        if weights is not None and is_binary(mask):
            return _masked(node, weights, mask, True)
    return None


WEIGHTS: dict[object, Callable[[Node, int, Softmaxes], Softmax | None]] = {
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    aten.mul.Tensor: _times_mask,
}
"""Ops that leave weights what they are, or make them 0. Exponentials and softmaxes are weights by themselves."""


def _reduced(node: Any, op: object) -> tuple[Node, int, tuple[Node, ...]] | None:
    """(x, dim, nodes read) where `node` is x reduced by `op` over one dim, that dim kept with size 1."""
    if not isinstance(node, Node):
        return None
    if node.target is aten.unsqueeze.default:
        inner, place = inputs(node)[0], normal_dim(inputs(node)[1], len(shape_of(node)))
        found = _reduced_over(inner, op, keepdim=False)
        return (*found, (inner, node)) if found is not None and found[1] == place else None
    found = _reduced_over(node, op, keepdim=True)
    return None if found is None else (*found, (node,))


def _reduced_over(node: Any, op: object, *, keepdim: bool) -> tuple[Node, int] | None:
    if not isinstance(node, Node) or node.target is not op or node.kwargs.get("dtype") is not None:
        return None
    source, dims = inputs(node)[:2]
    if len(node.args) > 3 or bool(arg(node, 2, "keepdim", False)) != keepdim or len(dims or ()) != 1:
        return None
    return source, normal_dim(dims[0], len(shape_of(source)))


# ---- softmaxes -------------------------------------------------------------------------------------------------------


def _softmax(node: Node, known: Softmaxes) -> Softmax:
    return softmax_over(node, arg(node, 1, "dim"))


def _quotient(node: Node, known: Softmaxes) -> Softmax | None:
    above, below = inputs(node)[:2]
    return _over_sum(node, above, below, known)


def _times_reciprocal(node: Node, known: Softmaxes) -> Softmax | None:
    for above, factor in (inputs(node)[:2], inputs(node)[1::-1]):
        if isinstance(factor, Node) and (found := _reciprocal(factor)) is not None:
            below, read = found
            softmax = _over_sum(node, above, below, known)
            return None if softmax is None else replace(softmax, inner=(*softmax.inner, *read))
    return None


def _reciprocal(node: Node) -> tuple[Any, tuple[Node, ...]] | None:
    """(x, nodes read) where `node` is 1 / x."""
    if node.target is aten.mul.Tensor and constant_of(inputs(node)[1]) == 1 and isinstance(inputs(node)[0], Node):
        found = _reciprocal(inputs(node)[0])
        return None if found is None else (found[0], (*found[1], node))
    is_power = node.target is aten.pow.Tensor_Scalar and inputs(node)[1] == -1
    return (inputs(node)[0], (node,)) if is_power or node.target is aten.reciprocal.default else None


def _over_sum(node: Node, above: Any, below: Any, known: Softmaxes) -> Softmax | None:
    """weights / their sum, before or after the product with the values."""
    total = _reduced(below, aten.sum.dim_IntList)
    if total is None or not isinstance(above, Node):
        return None
    summed, dim, read = total
    weights = _weights(summed, dim, known)
    if weights is None or dtype_of(node) != dtype_of(weights.scores):
        return None
    softmax = replace(weights.through(*read, above), node=node, dim=dim)
    if summed is above or _is_same(summed, above):
        return softmax if same_shape(node, weights.scores) else None
    return replace(softmax, late=Late(summed, above)) if _is_late(node, above, summed, dim) else None


def _is_same(x: Node, y: Node) -> bool:
    """Whether two nodes, one of them weights (all of whose ops are deterministic), are one op on the same inputs."""
    return x.op == y.op == "call_function" and (x.target, x.args, x.kwargs) == (y.target, y.args, y.kwargs)


def _is_late(node: Node, product: Node, weights: Node, dim: int) -> bool:
    """(weights @ v) / sum is softmax @ v where each row of the product is divided by the sum of its own row."""
    rank = len(shape_of(product))
    if product.target not in MIXED or set(product.users) != {node} or dim != rank - 1 or not same_shape(product, node):
        return False
    mixed = MIXED[product.target](product, weights, False)
    if mixed is None or mixed.out_dims != tuple(range(rank)) or len(shape_of(weights)) != rank:
        return False
    return str(shape_of(weights)[:-1]) == str(shape_of(product)[:-1])


def _exp(node: Node, known: Softmaxes) -> Softmax | None:
    """exp of log-softmax, or of scores less their logsumexp."""
    source = inputs(node)[0]
    found = _log_softmax(source)
    if found is None:
        return None
    scores, dim, read = found
    is_cast = dtype_of(node) != (arg(source, 2, "dtype") or dtype_of(scores))
    return None if is_cast else Softmax(node, scores, normal_dim(dim, len(shape_of(node))), inner=read)


def _log_softmax(node: Node) -> tuple[Node, int, tuple[Node, ...]] | None:
    """(scores, dim, nodes read) of log-softmax."""
    if node.target is aten.log_softmax.int:
        return inputs(node)[0], arg(node, 1, "dim"), (node,)
    if node.target is not aten.sub.Tensor or arg(node, 2, "alpha", 1) != 1:
        return None
    scores, total = inputs(node)[:2]
    found = _reduced(total, aten.logsumexp.default)
    return (scores, found[1], (node, *found[2])) if found is not None and found[0] is scores else None


def _exponent_of(node: Node) -> tuple[Node, float] | None:
    """(x, factor) where `node` is e raised to factor * x."""
    if node.target is aten.pow.Scalar:
        base = constant_of(inputs(node)[0])
        is_base = base is not None and 0 < base < math.inf and base != 1
        return (inputs(node)[1], math.log(base)) if base is not None and is_base else None
    return (inputs(node)[0], math.log(EXP[node.target])) if node.target in EXP else None


EXP: dict[object, float] = {
    **dict.fromkeys((aten.exp.default, aten.exp_.default, aten.exp.out), math.e),
    **dict.fromkeys((aten.exp2.default, aten.exp2_.default, aten.exp2.out), 2.0),
}
"""Exponentials, with what they raise to their input. Those that write are never read as weights."""

SOFTMAXES: dict[object, Callable[[Node, Softmaxes], Softmax | None]] = {
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    **dict.fromkeys((aten.softmax.int_out, aten._softmax.out), _softmax),
    aten._safe_softmax.default: _softmax,
    aten.div.Tensor: _quotient,
    aten.mul.Tensor: _times_reciprocal,
    aten.exp.default: _exp,
}
"""Ops whose output may be a softmax; what was found earlier in the graph is known."""
