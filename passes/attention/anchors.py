"""Is a softmax that of attention at all? It is if it stands between two products of matrices, read or not."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator

from torch.fx import Node

from monarch_compile.passes.attention.keys import Between, runs_over_keys
from monarch_compile.passes.attention.products import MIXED, SCORES, pairing_of
from monarch_compile.passes.attention.softmaxes import Softmax
from monarch_compile.passes.graph import aten, inputs, shape_of
from monarch_compile.passes.memory import SETS_STRIDES
from monarch_compile.passes.weights import is_computed

REACH, REACH_OF_EXP = 32, 10
"""Steps from an anchor within which there must be a product on either side: exp stands in many other places, too."""

BY_WEIGHT: dict[object, int] = {
    aten.linear.default: 1,
    aten.addmm.default: 2,
    aten.conv1d.default: 1,
    aten.conv2d.default: 1,
}
"""Ops that are a product if their second factor is computed, not a layer's weight; with that factor's place."""

CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default})

SIMILARITIES = frozenset({aten.cdist.default, aten._cdist_forward.default, aten.cosine_similarity.default})

UNREAD = SIMILARITIES | frozenset(
    {
        aten.matmul.out,
        aten.mm.out,
        aten.bmm.out,
        aten.baddbmm.out,
        aten.addmm.out,
        aten.inner.default,
        aten.tensordot.default,
        aten.linalg_multi_dot.default,
        aten.mv.default,
    }
)
"""Products and similarities that are not read, so that attention made of them stays exact."""


def is_attention(anchor: Softmax) -> bool:
    """Whether the anchor stands between two products of matrices, and runs over keys."""
    near = between_products(anchor)
    return near is not None and runs_over_keys(near)


def is_no_attention(anchor: Softmax) -> bool:
    """Whether the anchor stands between two products and runs over something else than keys."""
    near = between_products(anchor)
    return near is not None and bool(near.products) and not runs_over_keys(near)


def between_products(anchor: Softmax) -> Between | None:
    """The products, or layers, that the anchor's input comes from and its output goes into, by elementwise steps."""
    is_bare = anchor.dim is None
    reach = REACH_OF_EXP if is_bare else REACH
    below = [*_below(anchor, reach)]
    mixes = [n for n in below if n.target in MIXED or is_unread_mix(n)]
    if not mixes:
        return None
    above = [*_above(anchor, reach)]
    scores = [n for n in above if _gives_scores(n, anchor)]
    own = {*anchor.inner, anchor.node, *below}
    near = Between(
        anchor,
        products=frozenset(n for n in scores if n.target in SCORES or is_unread_product(n)),
        layers=frozenset(n for n in scores if not is_bare and _is_layer(n, anchor)),
        passed=frozenset(n for n in above if _is_passed(n, anchor, GRIDS_ABOVE)),
        values=tuple(x for mix in mixes for x in mix.all_input_nodes if x not in own),
    )
    return near if near.products | near.layers else None


def _is_layer(node: Node, anchor: Softmax) -> bool:
    """Whether a node is x @ weight; a convolution is that where its kernels are of one place."""
    if node.target not in BY_WEIGHT or _mixes_heads(node, anchor):
        return False
    return node.target not in CONVOLUTIONS or all(str(n) == "1" for n in shape_of(inputs(node)[1])[2:])


def _gives_scores(node: Node, anchor: Softmax) -> bool:
    """Whether a product is the anchor's scores: in their shape, or one step from it, or with several dims for each."""
    if _is_like(node, anchor) or _has_heads_last(node, anchor) or _grid_of(node, anchor) == BOTH:
        return True
    return node is anchor.scores or any(_is_like(u, anchor) or _has_heads_last(u, anchor) for u in node.users)


def is_unread_product(node: Node) -> bool:
    """Whether a node is a product of two computed tensors in a spelling that is not read."""
    if node.target in BY_WEIGHT:
        weight = inputs(node)[BY_WEIGHT[node.target]]
        return isinstance(weight, Node) and is_computed(weight)
    return node.target in UNREAD or pairing_of(node) is not None


def is_unread_mix(node: Node) -> bool:
    """The same of a product with the values, to which nothing may be added."""
    pairing = pairing_of(node)
    if node.target in SIMILARITIES or (pairing is not None and pairing.target is aten.sub.Tensor):
        return False
    return node.target is aten.baddbmm.default or is_unread_product(node)


def head_mixer(anchor: Softmax) -> Node | None:
    """A layer between the anchor and a product that mixes the heads of (batch, queries, keys, heads)."""
    around = itertools.chain(_above(anchor, REACH), _below(anchor, REACH))
    return next((n for n in around if _mixes_heads(n, anchor)), None)


def _above(anchor: Softmax, reach: int) -> Iterator[Node]:
    first = [n for n in (anchor.scores, *anchor.masks) if n.op == "call_function"]
    return _around(anchor, first, _read_by, reach, GRIDS_ABOVE)


def _read_by(node: Node) -> list[Node]:
    """What an op reads; of one of several outputs, such as the largest scores, what the op that gives them reads."""
    source = node.all_input_nodes[0] if node.target is operator.getitem else node
    return [x for x in source.all_input_nodes if x.op == "call_function"]


def _below(anchor: Softmax, reach: int) -> Iterator[Node]:
    first = [*anchor.node.users] if anchor.late is None else [anchor.late.product]
    return _around(anchor, first, lambda n: list(n.users), reach, frozenset({BOTH}))


def _around(
    anchor: Softmax, first: list[Node], following: Callable[[Node], list[Node]], reach: int, grids: frozenset[str]
) -> Iterator[Node]:
    """Nodes around the anchor, not past a product or a layer, nor past what changes both of the last two dims.

    grids: what else may be passed, of what `_grid_of` gives.
    """
    found, seen = first, {anchor.node, *anchor.closed}
    for _ in range(reach):
        found = [n for n in dict.fromkeys(found) if n not in seen]
        seen.update(found)
        yield from found
        found = [x for n in found if _is_passed(n, anchor, grids) for x in following(n)]


def _is_passed(node: Node, anchor: Softmax, grids: frozenset[str]) -> bool:
    if node.target in SETS_STRIDES:
        return _mixes_heads(node, anchor)
    if is_unread_product(node):
        return False
    return _is_like(node, anchor) or _has_heads_last(node, anchor) or _grid_of(node, anchor) in grids


def _is_like(node: Node, anchor: Softmax) -> bool:
    """Whether a node still holds scores: one of its last two dims is one of the anchor's, in its place or swapped."""
    own, other = ([str(size) for size in shape_of(n)[-2:]] for n in (node, anchor.scores))
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    return len(own) == len(other) == 2 and (own[0] == other[0] or own[1] == other[1] or own == other[::-1])


def _has_heads_last(node: Node, anchor: Softmax) -> bool:
    """Whether a node is the anchor's scores as (batch, queries, keys, heads)."""
    own, other = ([str(size) for size in shape_of(n)] for n in (node, anchor.scores))
    return len(own) == len(other) == 4 and own[1:3] in (other[-2:], other[:-3:-1])


BOTH, ONE = "both", "one"
GRIDS_ABOVE = frozenset({BOTH, ONE})


def _grid_of(node: Node, anchor: Softmax) -> str:
    """Whether a node is the anchor's scores with BOTH, or ONE, of queries and keys as several dims; "" if neither.

    Relative positions in an image are added so, by row and by column: (batch, rows, columns, key rows, key columns).
    """
    shape, places, found = shape_of(node), [], len(shape_of(node))
    if found < 3:
        return ""
    for size in reversed(shape_of(anchor.scores)[-2:]):
        start = next((i for i in range(found - 1, -1, -1) if str(math.prod(shape[i:found])) == str(size)), None)
        if start is None:
            return ""
        places.append(found - start)
        found = start
    return ("", ONE, BOTH)[sum(n > 1 for n in places)]


def _mixes_heads(node: Node, anchor: Softmax) -> bool:
    return node.target is aten.linear.default and _has_heads_last(node, anchor) and not is_unread_product(node)
