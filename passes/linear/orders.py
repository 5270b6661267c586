"""Proofs of the order in which one product reads another: on every index, exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
from torch.fx import Node

from monarch_compile.passes.elements.values import place
from monarch_compile.passes.linear.elements import Elements, evaluated, flat, grid_of, is_static
from monarch_compile.passes.linear.products import Labels, Roles
from monarch_compile.refusal import Refused


def symbols_of(prefix: str, count: int) -> list[Any]:
    """So many indices, named after what they index."""
    return [place(f"{prefix}{number}") for number in range(count)]


def index_of(labels: Labels, symbols: Sequence[Any]) -> tuple[Any, ...]:
    """The index into an operand of a product at the symbols of its labels."""
    return tuple(sympy.Integer(0) if label is None else symbols[label] for label in labels)


@dataclass(frozen=True)
class Link:
    """How a product reads the one before.

    blocks, columns: of the product before, by (block of this one, what this one sums over), counted as one number each.
    tokens: of each token dim of the product before, the index, in the symbols of this one.
    """

    blocks: Any
    columns: Any
    tokens: tuple[Any, ...]

    @property
    def mixes(self) -> bool:
        """Whether a block reads other blocks than the one of its own number."""
        own = np.arange(self.blocks.shape[0])[:, None]
        return bool((self.blocks != own).any())

    @property
    def transposes(self) -> bool:
        """Whether what is summed over are the blocks of the product before, and the blocks are its columns."""
        blocks, sums = self.blocks.shape
        return bool((self.blocks == np.arange(sums)).all() and (self.columns == np.arange(blocks)[:, None]).all())


def link(outer: Roles, inner: Roles, symbols: Sequence[Any], index: Sequence[Any]) -> Link | None:
    """The link of a product with the one before, whose result it reads at `index`, in the symbols of its labels.

    None where tokens and features are not apart: the operand called the weight is none.
    """
    if not is_static([*outer.sizes(outer.batch), *outer.sizes(outer.sums)]):
        return None
    at: Mapping[int, Any] = dict(zip(inner.product.out, index, strict=True))
    tokens = {symbols[label] for label in outer.tokens}
    features = [at[label] for label in (*inner.batch, *inner.columns)]
    own_tokens = tuple(at[label] for label in inner.tokens)
    if any(expr.free_symbols & tokens for expr in features):
        return None
    if any(expr.free_symbols - tokens for expr in own_tokens):
        return None
    labels = (*outer.batch, *outer.sums)
    sizes = outer.sizes(labels)
    try:
        grid = grid_of([symbols[label] for label in labels], sizes)
        found = []
        for own in (inner.batch, inner.columns):
            number = flat([evaluated(at[label], grid) for label in own], inner.sizes(own))
            found.append(np.broadcast_to(number, sizes).reshape(math.prod(outer.sizes(outer.batch)), -1))
    except ValueError:
        return None
    return Link(found[0], found[1], own_tokens)


@dataclass(frozen=True)
class Interleaving:
    """The order of what is between the two factors of Monarch; fields as in `BlockLinearRegion`."""

    columns: bool
    sums: bool
    rank: int


def interleaving(found: Link, in_blocks: int, columns: int, node: Node) -> Interleaving:
    """The order of what is between, where every block of the output reads `rank` columns of every input block.

    Raises:
        Refused: it does not, or in an order that no view of the factors undoes.
    """
    out_blocks, sums = found.blocks.shape
    if sums % in_blocks or columns % out_blocks or sums // in_blocks != columns // out_blocks:
        why = (
            f"{out_blocks} blocks read {sums} numbers each of {in_blocks} blocks of {columns}: not the same number of "
            "each"
        )
        raise Refused("block_rank", why, node)
    rank = sums // in_blocks
    out, place_of = np.arange(out_blocks)[:, None], np.arange(sums)
    for sums_interleaved in (False, True):
        block, number = (place_of % in_blocks, place_of // in_blocks) if sums_interleaved else divmod(place_of, rank)
        if not (found.blocks == block).all():
            continue
        for columns_interleaved in (False, True):
            wanted = number * out_blocks + out if columns_interleaved else out * rank + number
            if (found.columns == wanted).all():
                return Interleaving(columns_interleaved, sums_interleaved, rank)
    raise Refused("block_order", "what is between the two products is in an order that no Monarch matrix has", node)


def is_the_same_order(indices: Sequence[Any], sizes: Sequence[Any], symbols: Sequence[Any], own: Sequence[Any]) -> bool:
    """Whether elements at `indices` into dims of `sizes` come in the order of `symbols`, into dims of sizes `own`."""
    one, other = (flat(at, list(map(_expr, dims))) for at, dims in ((indices, sizes), (symbols, own)))
    firsts = {symbol: 0 for symbol, size in zip(symbols, own, strict=True) if isinstance(size, int) and size == 1}
    if sympy.expand(sympy.sympify(one - other).subs(firsts)) == 0:
        return True
    if not is_static([*sizes, *own]):
        return False
    try:
        grid = grid_of(symbols, list(own))
        return bool(np.all(evaluated(sympy.sympify(one), grid) == evaluated(sympy.sympify(other), grid)))
    except ValueError:
        return False


def _expr(size: Any) -> Any:
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


def reading(elements: Elements, outer: Roles, symbols: Sequence[Any], source: Node) -> tuple[Any, ...] | None:
    """Where in `source` a product reads its operand that is no weight; None where that is not known."""
    found = elements.read(outer.other_node, index_of(outer.other_labels, symbols))
    return found[1] if found is not None and found[0] is source else None
