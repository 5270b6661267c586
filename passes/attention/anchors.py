"""Is a softmax that of attention at all? It is if it stands between two products of matrices, read or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

from torch.fx import Node

from monarch_compile.passes.attention.keys import Between, runs_over_keys
from monarch_compile.passes.attention.products import MIXED, SCORES, pairing_of
from monarch_compile.passes.graph import arg, aten, inputs, normal_dim, shape_of
from monarch_compile.passes.memory import SETS_STRIDES
from monarch_compile.passes.weights import is_computed

SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default, aten.softmax.int_out, aten._safe_softmax.default})
OWN_MASK = frozenset({aten._masked_softmax.default})
"""Softmaxes that also apply a mask."""
EXP = frozenset({aten.exp.default, aten.exp2.default})
"""Found by these is what is no softmax over the keys: one that is has been folded."""

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


def is_attention(anchor: Node) -> bool:
    """Whether the anchor stands between two products of matrices, and runs over keys."""
    near = between_products(anchor)
    return near is not None and runs_over_keys(near)


def is_no_attention(node: Node) -> bool:
    """Whether a node is a softmax between two products that runs over something else than keys."""
    near = between_products(node) if node.target in SOFTMAXES | EXP else None
    return near is not None and bool(near.products) and not runs_over_keys(near)


def between_products(anchor: Node) -> Between | None:
    """The products, or layers, that the anchor's input comes from and its output goes into, by elementwise steps."""
    reach = REACH_OF_EXP if anchor.target in EXP else REACH
    below = {anchor: None, **dict.fromkeys(_below(anchor, reach))}
    mixes = [n for n in below if n.target in MIXED or is_unread_mix(n)]
    if not mixes:
        return None
    above = [*_above(anchor, reach)]
    scores = [n for n in above if _gives_scores(n, anchor)]
    near = Between(
        anchor,
        _softmax_dim(anchor),
        products=frozenset(n for n in scores if n.target in SCORES or is_unread_product(n)),
        layers=frozenset(n for n in scores if anchor.target not in EXP and _is_layer(n, anchor)),
        passed=frozenset(n for n in above if _is_passed(n, anchor, GRIDS_ABOVE)),
        values=tuple(x for mix in mixes for x in mix.all_input_nodes if x not in below),
    )
    return near if near.products | near.layers else None


def _is_layer(node: Node, anchor: Node) -> bool:
    """Whether a node is x @ weight; a convolution is that where its kernels are of one place."""
    if node.target not in BY_WEIGHT or _mixes_heads(node, anchor):
        return False
    return node.target not in CONVOLUTIONS or all(str(n) == "1" for n in shape_of(inputs(node)[1])[2:])


def _softmax_dim(anchor: Node) -> int:
    """The dim that softmax runs over; the last, where that is not known."""
    rank = len(shape_of(anchor))
    dim = arg(anchor, 2 if anchor.target in OWN_MASK else 1, "dim")
    return normal_dim(dim, rank) if isinstance(dim, int) else rank - 1


def _gives_scores(node: Node, anchor: Node) -> bool:
    """Whether a product is the anchor's scores: in their shape, or one step from it, or with several dims for each."""
    if _is_like(node, anchor) or _has_heads_last(node, anchor) or _grid_of(node, anchor) == BOTH:
        return True
    return any(user is anchor or _is_like(user, anchor) or _has_heads_last(user, anchor) for user in node.users)


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


def head_mixer(anchor: Node) -> Node | None:
    """A layer between the anchor and a product that mixes the heads of (batch, queries, keys, heads)."""
    around = itertools.chain(_above(anchor, REACH), _below(anchor, REACH))
    return next((n for n in around if _mixes_heads(n, anchor)), None)


def _above(anchor: Node, reach: int) -> Iterator[Node]:
    above = lambda n: [x for x in n.all_input_nodes if x.op == "call_function"]  # noqa: E731
    return _around(anchor, above, reach, GRIDS_ABOVE)


def _below(anchor: Node, reach: int) -> Iterator[Node]:
    return _around(anchor, lambda n: list(n.users), reach, frozenset({BOTH}))


def _around(anchor: Node, following: Callable[[Node], list[Node]], reach: int, grids: frozenset[str]) -> Iterator[Node]:
    """Nodes around the anchor, not past a product or a layer, nor past what changes both of the last two dims.

    grids: what else may be passed, of what `_grid_of` gives.
    """
    frontier, seen = [anchor], {anchor}
    for _ in range(reach):
        found = [n for at in frontier for n in following(at) if n not in seen]
        seen.update(found)
        yield from found
        frontier = [n for n in found if _is_passed(n, anchor, grids)]


def _is_passed(node: Node, anchor: Node, grids: frozenset[str]) -> bool:
    if node.target in SETS_STRIDES:
        return _mixes_heads(node, anchor)
    if is_unread_product(node):
        return False
    return _is_like(node, anchor) or _has_heads_last(node, anchor) or _grid_of(node, anchor) in grids


def _is_like(node: Node, anchor: Node) -> bool:
    """Whether a node still holds scores: one of its last two dims is one of the anchor's, in its place or swapped."""
    own, other = ([str(size) for size in shape_of(n)[-2:]] for n in (node, anchor))
    if getattr(node.target, "__name__", "") == "getitem":
        return True
    return len(own) == len(other) == 2 and (own[0] == other[0] or own[1] == other[1] or own == other[::-1])


def _has_heads_last(node: Node, anchor: Node) -> bool:
    """Whether a node is the anchor's scores as (batch, queries, keys, heads)."""
    own, other = ([str(size) for size in shape_of(n)] for n in (node, anchor))
    return len(own) == len(other) == 4 and own[1:3] in (other[-2:], other[:-3:-1])


BOTH, ONE = "both", "one"
GRIDS_ABOVE = frozenset({BOTH, ONE})


def _grid_of(node: Node, anchor: Node) -> str:
    """Whether a node is the anchor's scores with BOTH, or ONE, of queries and keys as several dims; "" if neither.

    Relative positions in an image are added so, by row and by column: (batch, rows, columns, key rows, key columns).
    """
    shape, places, found = shape_of(node), [], len(shape_of(node))
    if found < 3:
        return ""
    for size in reversed(shape_of(anchor)[-2:]):
        start = next((i for i in range(found - 1, -1, -1) if str(math.prod(shape[i:found])) == str(size)), None)
        if start is None:
            return ""
        places.append(found - start)
        found = start
    return ("", ONE, BOTH)[sum(n > 1 for n in places)]


def _mixes_heads(node: Node, anchor: Node) -> bool:
    return node.target is aten.linear.default and _has_heads_last(node, anchor) and not is_unread_product(node)
