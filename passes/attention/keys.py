"""Does a softmax run over keys, or over the classes, codes or experts of a layer, x @ weight?

Learned queries are attention: there the weight gives the dim that softmax does not run over. So are learned keys beside
computed ones. Keys that layers make of weights alone are no layer's weight where the queries are made like that, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from monarch_compile.passes.attention.dims import Sources, sources_of
from monarch_compile.passes.attention.products import SCORES, pairing_of
from monarch_compile.passes.attention.softmaxes import Softmax
from monarch_compile.passes.graph import aten, shape_of
from monarch_compile.passes.weights import is_computed, is_made_by


@dataclass(frozen=True)
class Between:
    """A softmax, and what is near it.

    products: above, of two tensors; layers: other products with weights. passed: nodes above that still hold scores.
    values: what the products below mix.
    """

    anchor: Softmax
    products: frozenset[Node]
    layers: frozenset[Node]
    passed: frozenset[Node]
    values: tuple[Node, ...]

    @property
    def dim(self) -> int:
        """The dim that softmax runs over; the last, where that is not known."""
        return self.anchor.rank - 1 if self.anchor.dim is None else self.anchor.dim


def runs_over_keys(near: Between) -> bool:
    """Whether the dim that softmax runs over comes from anything computed, as far as that is known."""
    keys = [*_givers(near, near.dim)]
    if any(_are_computed(product, operands) for product, operands in keys if operands):
        return not _is_of_features(near)
    if None in (operands for _, operands in keys) or not any(operands for _, operands in keys):
        return bool(near.products)
    return bool(near.products) and any(is_made_by(n, _is_layer) for _, operands in keys for n in operands or ())


def _are_computed(product: Node, operands: list[Node]) -> bool:
    """Whether a dim that several operands share, such as one of heads, is no weight's."""
    return all(is_computed(n, before=product) for n in operands)


def _is_layer(node: Node) -> bool:
    return node.target in SCORES or node.target in (aten.linear.default, aten.addmm.default)


def _givers(near: Between, dim: int) -> Iterator[tuple[Node, list[Node] | None]]:
    """Products above a softmax, each with the operands that give a dim of its input; None where that is not known."""
    ends, pending, seen = near.products | near.layers, [(near.anchor.scores, dim)], set()
    while pending:
        at = pending.pop()
        if at in seen or not (at[0] in ends or at[0] in near.passed):
            continue
        seen.add(at)
        sources = _operands(*at) if at[0] in ends else sources_of(*at)
        if sources is None or at[0] in ends:
            yield at[0], None if sources is None else [n for n, _ in sources]
        else:
            pending += sources


def _operands(product: Node, dim: int) -> Sources | None:
    pairing, sources = pairing_of(product), sources_of(product, dim)
    while pairing is not None and sources and sources[0][0] is not pairing:
        sources = sources_of(*sources[0])
    return sources_of(*sources[0]) if pairing is not None and sources else sources


# ---- softmax over tokens that is none over keys ----------------------------------------------------------------------


def _is_of_features(near: Between) -> bool:
    """Whether the queries are weights, and either the values are constant or what is mixed is no token of its own.

    Then softmax is a heat map that says where something is, or it normalises the features of linear attention's keys.
    """
    last = near.anchor.rank - 1
    if near.dim < last - 1:
        return False
    rows = last if near.dim == last - 1 else last - 1
    queries = [*_givers(near, rows)]
    if not any(operands for _, operands in queries) or None in (operands for _, operands in queries):
        return False
    if any(_are_computed(product, operands) for product, operands in queries if operands):
        return False
    return not any(map(is_computed, near.values)) or _is_summed_at_once(near.anchor, rows)


def _is_summed_at_once(anchor: Softmax, rows: int) -> bool:
    """Whether all that becomes of the mixture is a sum over its rows, in a product with something computed."""
    pending, found = [(anchor.node, rows, anchor.late is not None)], False
    while pending:
        node, dim, is_mixed = pending.pop()
        for user in node.users:
            places = [d for d in range(len(shape_of(user))) if (node, dim) in (sources_of(user, d) or ())]
            is_product = user.target in SCORES
            if is_mixed and is_product and not places:
                if not any(is_computed(n) for n in user.all_input_nodes if n is not node):
                    return False
                found = True
            elif len(places) != 1 or (is_mixed and is_product):
                return False
            else:
                pending.append((user, places[0], is_mixed or is_product))
    return found
