"""The two matrix products of attention, in every spelling: matmul, bmm, baddbmm, einsum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.fx import Node

from monarch_compile.passes.attention.region import Operand
from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, same_shape, shape_of
from monarch_compile.passes.views import TRANSPOSES, source_dims


class Scores(NamedTuple):
    """alpha * q k^T + beta * bias."""

    q: Operand
    k: Operand
    alpha: float = 1.0
    bias: Node | None = None
    beta: float = 1.0


class Mixed(NamedTuple):
    """probabilities @ v; the node's dims are `out_dims` of (*lead, seq_len_q, value_dim)."""

    v: Operand
    out_dims: tuple[int, ...]


def _aligned(node: Node, rank: int, swap: bool = False) -> Operand:
    """The node's dims against the right end of `rank` dims, the last two swapped for a transposed operand."""
    own = list(range(len(shape_of(node))))
    if swap:
        own[-2:] = [own[-1], own[-2]]
    return Operand(node, (*(None,) * (rank - len(own)), *own))


def _matmul_scores(node: Node) -> Scores | None:
    lhs, rhs = inputs(node)[0], inputs(node)[1]
    rank = len(shape_of(node))
    if not _are_matrices(lhs, rhs) or rank < 2:
        return None
    return Scores(_aligned(lhs, rank), _aligned(rhs, rank, swap=True))


def _baddbmm_scores(node: Node) -> Scores | None:
    bias, lhs, rhs = inputs(node)[0], inputs(node)[1], inputs(node)[2]
    beta, alpha = arg(node, 3, "beta", 1), arg(node, 4, "alpha", 1)
    if not _are_matrices(lhs, rhs) or not all(isinstance(x, (int, float)) for x in (alpha, beta)):
        return None
    kept = bias if beta != 0 and isinstance(bias, Node) else None
    return Scores(_aligned(lhs, 3), _aligned(rhs, 3, swap=True), float(alpha), kept, float(beta))


def _einsum_scores(node: Node) -> Scores | None:
    terms = einsum_terms(node)
    if terms is None:
        return None
    (x, x_dims), (y, y_dims), out = terms
    summed = [c for c in x_dims if c in y_dims and c not in out]
    if len(summed) != 1 or len(out) < 2:
        return None
    row, column = out[-2], out[-1]
    for (q, q_dims), (k, k_dims) in (((x, x_dims), (y, y_dims)), ((y, y_dims), (x, x_dims))):
        extra = set(q_dims + k_dims) - set(out) - set(summed)
        if row in q_dims and row not in k_dims and column in k_dims and column not in q_dims and not extra:
            lead, inner = out[:-2], summed[0]
            return Scores(_by_letter(q, q_dims, lead + row + inner), _by_letter(k, k_dims, lead + column + inner))
    return None


def _matmul_mixed(node: Node, probs: Node, swapped: bool) -> Mixed | None:
    lhs, rhs = inputs(node)[0], inputs(node)[1]
    rank = len(shape_of(node))
    if lhs is rhs or probs is not (rhs if swapped else lhs) or not _are_matrices(lhs, rhs):
        return None
    if len(shape_of(probs)) != rank:
        return None
    dims = tuple(range(rank))
    if swapped:  # v^T p^T
        return Mixed(_aligned(lhs, rank, swap=True), (*dims[:-2], dims[-1], dims[-2]))
    return Mixed(_aligned(rhs, rank), dims)


def _einsum_mixed(node: Node, probs: Node, swapped: bool) -> Mixed | None:
    terms = einsum_terms(node)
    if terms is None:
        return None
    (x, x_dims), (y, y_dims), out = terms
    if (x is probs) == (y is probs):
        return None
    (p_dims, v, v_dims) = (x_dims, y, y_dims) if x is probs else (y_dims, x, x_dims)
    lead, row, column = (p_dims[:-2], p_dims[-1], p_dims[-2]) if swapped else (p_dims[:-2], p_dims[-2], p_dims[-1])
    value = [c for c in v_dims if c not in p_dims]
    if len(value) != 1 or column not in v_dims or row in v_dims or sorted(out) != sorted(lead + row + value[0]):
        return None
    frame = lead + row + value[0]
    return Mixed(_by_letter(v, v_dims, lead + column + value[0]), tuple(frame.index(c) for c in out))


def _by_letter(node: Node, own: str, wanted: str) -> Operand:
    return Operand(node, tuple(own.index(c) if c in own else None for c in wanted))


def _are_matrices(*nodes: object) -> bool:
    return all(isinstance(n, Node) and len(shape_of(n)) >= 2 for n in nodes)


def einsum_terms(node: Node) -> tuple[tuple[Node, str], tuple[Node, str], str] | None:
    """Both operands with their letters, and the output's letters; None for anything unusual."""
    named, out = einsum_letters(node)
    return (named[0], named[1], out) if len(named) == 2 else None


class Simplified(NamedTuple):
    """`operand` times `factor` is what was given; `skipped` are the nodes no longer read."""

    operand: Operand
    factor: float
    skipped: tuple[Node, ...]


def simplify(operand: Operand, constant_of: Callable[[object], float | None]) -> Simplified:
    """The operand with transposes folded into `dims`, and the constant factor taken off it."""
    factor, skipped = 1.0, []
    while operand.node.op == "call_function":
        node, target = operand.node, operand.node.target
        if target in TRANSPOSES:
            source = source_dims(node)
            operand = Operand(inputs(node)[0], tuple(None if d is None else source[d] for d in operand.dims))
            skipped.append(node)
            continue
        scale = constant_of(inputs(node)[1]) if target in SCALES else None
        inner = inputs(node)[0] if inputs(node) else None
        if not scale or not isinstance(inner, Node) or dtype_of(inner) != dtype_of(node) or not same_shape(inner, node):
            break
        factor *= 1 / scale if SCALES[target] else scale
        operand = Operand(inner, operand.dims)
        skipped.append(node)
    return Simplified(operand, factor, tuple(skipped))


SCALES: dict[object, bool] = {
    aten.mul.Tensor: False,
    aten.mul.Scalar: False,
    aten.div.Tensor: True,
    aten.div.Scalar: True,
}
"""Ops that scale their first input by their second; True where they divide by it."""


def pairing_of(node: Node) -> Node | None:
    """The op that pairs rows of two tensors, if a node sums up what it makes: their products, or their distances.

    x[..., :, None, :] * y[..., None, :, :] is one, with the None at other dims too.
    """
    found = inputs(node)[0] if node.target in SUMS_OF_PAIRS else None
    while isinstance(found, Node) and found.target in SQUARES:
        found = inputs(found)[0]
    if not isinstance(found, Node) or found.target not in PAIRS or len(shape_of(found)) < 3:
        return None
    shapes = [shape_of(x) if isinstance(x, Node) else () for x in inputs(found)[:2]]
    whole = str(shape_of(found))
    return found if all(len(shape) >= 2 and str(shape) != whole for shape in shapes) else None


SUMS_OF_PAIRS = frozenset({aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim})
SQUARES = frozenset({aten.square.default, aten.pow.Tensor_Scalar, aten.abs.default})
PAIRS = frozenset({aten.mul.Tensor, aten.sub.Tensor})

SCORES: dict[object, Callable[[Node], Scores | None]] = {
    aten.matmul.default: _matmul_scores,
    aten.mm.default: _matmul_scores,
    aten.bmm.default: _matmul_scores,
    aten.baddbmm.default: _baddbmm_scores,
    aten.einsum.default: _einsum_scores,
}

MIXED: dict[object, Callable[[Node, Node, bool], Mixed | None]] = {  # (product, probabilities, whether swapped)
    aten.matmul.default: _matmul_mixed,
    aten.mm.default: _matmul_mixed,
    aten.bmm.default: _matmul_mixed,
    aten.einsum.default: _einsum_mixed,
}
