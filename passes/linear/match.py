"""Finds block linears: a product with a block-diagonal weight, a permutation, and another such product."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from monarch_compile.passes.capture.bodies import WHY, bodies_of
from monarch_compile.passes.capture.enclosed import CLOSED, is_opened
from monarch_compile.passes.capture.trace import to_aten
from monarch_compile.passes.graph import dtype_of, modules_of
from monarch_compile.passes.linear.elements import Elements, is_static, source_of_moves
from monarch_compile.passes.linear.ending import ending_of
from monarch_compile.passes.linear.near import near_miss, unread
from monarch_compile.passes.linear.orders import Link, interleaving, link, reading, symbols_of
from monarch_compile.passes.linear.products import Product, Roles, product_of
from monarch_compile.passes.linear.region import BlockLinearRegion, Ending, Site
from monarch_compile.passes.state import RefusedSite
from monarch_compile.passes.weights import is_computed
from monarch_compile.refusal import Refusal, Refused


def find_sites(gm: GraphModule) -> list[Site]:
    """Every block linear of a graph and of the bodies in it, in its order; what is close to one is refused."""
    sites: list[Site] = []
    taken: set[Node] = set()
    told: set[Node] = set()
    for node in reversed(
        gm.graph.nodes
    ):  # the last product of BLAST before those that would be Monarch's by themselves
        if node.op != "call_function":
            continue
        if isinstance(node.target, HigherOrderOperator):
            sites += reversed(_inside(node))
            continue
        product = product_of(node) if node not in taken else None
        site: Site | None
        if product is None:
            refusal = unread(node)
            site = None if refusal is None else RefusedSite(node, refusal)
        else:
            site = _site(product, taken, told)
        if isinstance(site, BlockLinearRegion) or (site is not None and node not in told):
            sites.append(site)
        if isinstance(site, BlockLinearRegion):
            taken |= {*site.inside, site.output}
    return sites[::-1]


def _inside(node: Node) -> list[Site]:
    """The sites in the bodies of a higher-order op: as any other where they are opened, else kept."""
    if is_opened(node):
        return [site for body in modules_of(node).values() for site in find_sites(body)]
    name = str(getattr(node.target, "__name__", node.target))
    why = f"it stands in the body of {WHY.get(name, name)}, which {node.meta.get(CLOSED) or 'is kept as it is'}"
    sites = [site for body in bodies_of(node, to_aten) for site in find_sites(body)]
    return [RefusedSite(site.anchor, Refusal("in_body", why, site.anchor)) for site in sites]


def _site(last: Product, taken: set[Node], told: set[Node]) -> Site | None:
    """The block linear that a product ends, the reason why it is none where it is close to one, or None.

    taken: nodes that belong to other regions. told: products before ones that were refused, which grows; those may end
    a block linear of their own, but no second refusal is about them.
    """
    if last.is_elementwise:
        return None
    refused: RefusedSite | None = None
    for weight in (1, 0):
        roles = last.roles(weight)
        if roles is None or not (roles.batch and roles.columns and roles.sums):
            continue
        try:
            region = _region(roles, frozenset(taken | told))
            if region is not None and last.node in told and _is_coupling(region):
                return None
            if region is not None:
                return region
            if source_of_moves(roles.other_node)[0] not in taken | told:
                near_miss(roles)
        except Refused as refusal:
            if not is_computed(roles.weight_node):
                told.add(source_of_moves(roles.other_node)[0])
                refused = refused or RefusedSite(last.node, refusal.refusal)
    return refused


def _is_coupling(region: BlockLinearRegion) -> bool:
    """Whether the last product may be the coupling of a BLAST that was refused: one number of each input block."""
    return region.coupling is None and region.rank == 1


def _region(last: Roles, taken: frozenset[Node]) -> BlockLinearRegion | None:
    """The region that a product with a weight ends; None where what it reads is no other such product."""
    source, between = source_of_moves(last.other_node)
    before = product_of(source)
    if before is None or source in taken:
        return None
    elements = Elements()
    symbols = symbols_of("i", len(last.product.sizes))
    index = reading(elements, last, symbols, source)
    if index is None:
        return None
    found = _blast(last, before, symbols, index, between, taken)
    if found is not None:
        return found
    for weight in (1, 0):
        first = before.roles(weight)
        if first is None or not (first.batch and first.columns and first.sums):
            continue
        own = link(last, first, symbols, index)
        if own is None or not own.mixes or min(_count(first, first.batch), _count(last, last.batch)) < 2:
            continue
        return _monarch(last, first, own, symbols, between, taken)
    return None


def _count(roles: Roles, labels: Iterable[int]) -> int:
    sizes = roles.sizes(tuple(labels))
    return math.prod(sizes) if is_static(sizes) else 0


def _monarch(
    last: Roles, first: Roles, found: Link, symbols: Sequence[Any], between: Sequence[Node], taken: frozenset[Node]
) -> BlockLinearRegion:
    node = last.product.node
    columns = _count(first, first.columns)
    if not columns or not is_static(first.sizes(first.sums)) or not is_static(last.sizes(last.columns)):
        raise Refused("symbolic_dims", "features or blocks of a factor have symbolic sizes", node)
    order = interleaving(found, _count(first, first.batch), columns, node)
    ending = _ended(last, symbols, found.tokens, first, taken)
    inside = (*first.product.inside, *reversed(between), *last.product.inside[:-1], *_inside_of(last, ending))
    return _made(first, last, None, order.columns, order.sums, order.rank, ending, inside)


def _blast(
    last: Roles, middle: Product, symbols: Sequence[Any], index: Sequence[Any], between: Sequence[Node],
    taken: frozenset[Node],
) -> BlockLinearRegion | None:  # fmt: skip
    """BLAST, whose factors are coupled by a product with a diagonal for each block; None where there is none."""
    for weight in (1, 0):
        coupling = middle.roles(weight)
        if coupling is None or not (coupling.batch and coupling.columns and coupling.sums):
            continue
        own = link(last, coupling, symbols, index)
        if own is None or not own.transposes:
            continue
        source, moves = source_of_moves(coupling.other_node)
        before = product_of(source)
        if before is None or source in taken:
            continue
        inner = symbols_of("c", len(middle.sizes))
        read = reading(Elements(), coupling, inner, source)
        if read is None:
            continue
        for first_weight in (1, 0):
            first = before.roles(first_weight)
            if first is None or not (first.batch and first.columns and first.sums):
                continue
            tokens = _coupled_tokens(coupling, first, inner, read)
            if tokens is None or not is_static(first.sizes(first.sums)):
                continue
            moved = {inner[label]: at for label, at in zip(coupling.tokens, own.tokens, strict=True)}
            outer = [expr.subs(moved, simultaneous=True) for expr in tokens]
            ending = _ended(last, symbols, outer, first, taken)
            inside = (*before.inside, *reversed(moves), *middle.inside, *reversed(between), *last.product.inside[:-1])
            rank = _count(coupling, coupling.batch)
            return _made(first, last, coupling, False, False, rank, ending, (*inside, *_inside_of(last, ending)))
    return None


def _coupled_tokens(
    coupling: Roles, first: Roles, symbols: Sequence[Any], index: Sequence[Any]
) -> tuple[Any, ...] | None:
    """Token indices of the first product, where the coupling sums over its blocks, and its columns are the ranks."""
    found = link(coupling, first, symbols, index)
    if found is None or _count(first, first.batch) < 2:
        return None
    ranks, blocks = found.blocks.shape
    whole = _count(first, first.batch) == blocks and _count(first, first.columns) == ranks
    return found.tokens if found.transposes and whole else None


def _ended(last: Roles, symbols: Sequence[Any], tokens: Sequence[Any], first: Roles, taken: frozenset[Node]) -> Ending:
    ending = ending_of(last, symbols, tokens, first.sizes(first.tokens), taken)
    if ending is None:
        why = "the tokens of the second product are in another order than those of the first"
        raise Refused("block_order", why, last.product.node)
    return ending


def _inside_of(last: Roles, ending: Ending) -> tuple[Node, ...]:
    """The last product and what follows, but for the output."""
    found = (last.product.node, *ending.inside)
    return tuple(dict.fromkeys(node for node in found if node is not ending.output))


def _made(
    first: Roles, last: Roles, coupling: Roles | None, columns: bool, sums: bool, rank: int, ending: Ending,
    inside: tuple[Node, ...],
) -> BlockLinearRegion:  # fmt: skip
    """The region, if nothing else reads what is inside.

    Raises:
        Refused: something does, or products are of several dtypes.
    """
    inside = tuple(dict.fromkeys(inside))
    own = {*inside, ending.output}
    for node in inside:
        if not own.issuperset(node.users):
            raise Refused("block_reused", "what is between the two products is read elsewhere too", node)
    dtype = dtype_of(last.product.node)
    assert dtype is not None
    for node in (*inside, ending.output):
        if dtype_of(node) is not dtype:
            raise Refused("dtype", f"it computes in {dtype_of(node)} and {dtype}", node)
    return BlockLinearRegion(first, last, coupling, columns, sums, rank, ending, inside, dtype)
