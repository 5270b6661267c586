"""What is close to a block linear and is none: told, so that it is not missed in silence."""

from __future__ import annotations

import math

from torch.fx import Node

from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.graph import aten, inputs, shape_of
from monarch_compile.passes.linear.elements import Elements, is_static, source_of_moves
from monarch_compile.passes.linear.orders import link, reading, symbols_of
from monarch_compile.passes.linear.products import Product, Roles, batched, product_of
from monarch_compile.passes.weights import is_computed
from monarch_compile.refusal import Refusal, Refused

STEPS = frozenset(
    {
        aten.relu.default,
        aten.gelu.default,
        aten.silu.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.neg.default,
        aten.abs.default,
        aten.square.default,
        aten.softmax.int,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.dropout.default,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.pow.Tensor_Scalar,
        aten.clamp.default,
        aten.detach.default,
    }
)
"""Ops that give each element of their first operand, in its place, changed, or without its gradient."""
REORDERS = frozenset(
    {
        aten.index.Tensor,
        aten.index_select.default,
        aten.gather.default,
        aten.flip.default,
        aten.roll.default,
        aten.channel_shuffle.default,
        aten.pixel_shuffle.default,
    }
)
"""Ops that put elements in another order than views can."""


def near_miss(last: Roles) -> None:
    """Raise Refused where a product follows another one of block-diagonal weights, by ops that a block linear has not.

    Blocks that read only their own block of the product before, as experts do, are no near miss.
    """
    if is_computed(last.weight_node):
        return
    passed = STEPS | REORDERS
    source, between = source_of_moves(last.other_node, passed)
    before = product_of(source)
    if before is None or not is_static(last.sizes(last.batch)) or math.prod(last.sizes(last.batch)) < 2:
        return
    if not any(_is_first(before, weight, last, source) for weight in (1, 0)):
        return
    culprit = next((node for node in reversed(between) if node.target in passed), None)
    if culprit is None:
        why = "how the second product reads the first is not known"
        raise Refused("block_order", why, _first_move(between) or last.product.node)
    if culprit.target in REORDERS:
        why = f"{culprit.target} reorders what is between the two products"
        raise Refused("block_order", why, culprit)
    raise Refused("block_step", f"{culprit.target} stands between the two products", culprit)


def unread(node: Node) -> Refusal | None:
    """Why a node that multiplies by factors of a block linear, by an op that is not read, ends none; else None."""
    if node.target is aten.einsum.default and _is_whole_einsum(node):
        why = "one einsum multiplies by all factors: products of two tensors each are read"
        return Refusal("block_step", why, node)
    if node.target is not aten.baddbmm.default:
        return None
    product = batched(node, *inputs(node)[1:3])
    for weight in (1, 0):
        last = product.roles(weight)
        if last is None or not (last.batch and last.columns and last.sums) or is_computed(last.weight_node):
            continue
        source, _ = source_of_moves(last.other_node)
        before = product_of(source)
        if before is not None and any(_is_first(before, place, last, source) for place in (1, 0)):
            why = "aten.baddbmm adds to the second product while its blocks are apart"
            return Refusal("block_step", why, node)
    return None


def _is_whole_einsum(node: Node) -> bool:
    """Whether an einsum is a block linear: of one tensor that is computed, the input, and of two or three factors.

    Its letters are then: of features in a block, of blocks of the input, of ranks, and of blocks of the output.
    """
    named, out = einsum_letters(node)
    given = [(x, {*letters}) for x, letters in named if is_computed(x)]
    factors = [{*letters} for x, letters in named if not is_computed(x)]
    if len(given) != 1 or len(factors) not in (2, 3):
        return False
    own = given[0][1]
    sizes = {letter: size for x, letters in named for letter, size in zip(letters, shape_of(x), strict=True)}
    uses = {letter: sum(letter in factor for factor in factors) for letter in sizes}
    summed = {*sizes} - {*out}
    blocks = [x for x in own & summed if uses[x] > 1 and str(sizes[x]) != "1"]
    out_blocks = [x for x in {*out} - own if uses[x] > 1 and str(sizes[x]) != "1"]
    features = [x for x in own & summed if uses[x] == 1]
    ranks = [x for x in summed - own if uses[x] > 1]
    return all((blocks, out_blocks, features, ranks))


def _first_move(between: list[Node]) -> Node | None:
    return between[-1] if between else None


def _is_first(before: Product, weight: int, last: Roles, source: Node) -> bool:
    """Whether a product is one with block-diagonal weights, whose blocks the last one mixes, as far as is known."""
    first = before.roles(weight)
    if first is None or not (first.batch and first.columns and first.sums) or is_computed(first.weight_node):
        return False
    sizes = first.sizes(first.batch)
    if not is_static(sizes) or math.prod(sizes) < 2:
        return False
    symbols = symbols_of("i", len(last.product.sizes))
    elements = Elements(through=STEPS)
    index = reading(elements, last, symbols, source)
    if index is None:
        return True
    found = link(last, first, symbols, index)
    return found is not None and found.mixes
