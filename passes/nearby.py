"""Is a softmax that of attention at all? It is if it stands between two products of matrices, read or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch.fx import Node

from monarch_compile.passes.graph import WEIGHT, ancestors_of, arg, aten, inputs, normal_dim, shape_of
from monarch_compile.passes.memory import SETS_STRIDES
from monarch_compile.passes.products import MIXED, SCORES, TRANSPOSES, swaps_matrix, viewed

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

UNREAD = frozenset(
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
        aten.cdist.default,
        aten._cdist_forward.default,
        aten.cosine_similarity.default,
    }
)
"""Products and similarities that are not read, so that attention made of them stays exact."""


def is_between_products(anchor: Node, reach: int = REACH) -> bool:
    """Whether the anchor's input comes from a matrix product, and its output goes into one, by elementwise steps."""
    above = [*_above(anchor, reach)]
    products = [n for n in above if (n.target in SCORES or is_unread_product(n)) and _gives_scores(n, anchor)]
    if not products or not any(n.target in MIXED or is_unread_mix(n) for n in _below(anchor, reach)):
        return False
    is_swapped = any(n.target in TRANSPOSES and swaps_matrix(n) for n in above)
    return is_swapped or not all(_has_weight_as_keys(n, anchor) for n in products)


def _has_weight_as_keys(node: Node, anchor: Node) -> bool:
    """Whether a product, x @ weight, is a linear layer: then softmax is over classes, experts or codes, not over keys.

    Learned queries are attention: there the weight gives the dim that softmax does not run over.
    """
    scores = SCORES[node.target](node) if node.target in SCORES else None
    if scores is None:
        return False
    rank, dim = len(shape_of(anchor)), arg(anchor, 1, "dim")
    is_over_rows = isinstance(dim, int) and normal_dim(dim, rank) == rank - 2
    keys = viewed((scores.q if is_over_rows else scores.k).node)
    return keys.op in ("placeholder", "get_attr") and not _is_given(keys)


def _gives_scores(node: Node, anchor: Node) -> bool:
    """Whether a product is the anchor's scores: in their shape, or one step from it, or with several dims for each."""
    if _is_like(node, anchor) or _has_heads_last(node, anchor) or _grid_of(node, anchor) == BOTH:
        return True
    return any(user is anchor or _is_like(user, anchor) or _has_heads_last(user, anchor) for user in node.users)


def is_unread_product(node: Node) -> bool:
    """Whether a node is a product of two computed tensors in a spelling that is not read."""
    if node.target in BY_WEIGHT:
        weight = inputs(node)[BY_WEIGHT[node.target]]
        return isinstance(weight, Node) and weight.op == "call_function" and _is_computed(weight)
    return node.target in UNREAD or _is_sum_of_products(node)


def is_unread_mix(node: Node) -> bool:
    """The same of a product with the values, to which nothing may be added."""
    return node.target is aten.baddbmm.default or is_unread_product(node)


def head_mixer(anchor: Node) -> Node | None:
    """A layer between the anchor and a product that mixes the heads of (batch, queries, keys, heads)."""
    around = itertools.chain(_above(anchor, REACH), _below(anchor, REACH))
    return next((n for n in around if _mixes_heads(n, anchor)), None)


def _above(anchor: Node, reach: int) -> Iterator[Node]:
    above = lambda n: [x for x in n.all_input_nodes if x.op == "call_function"]  # noqa: E731
    return _around(anchor, above, reach, frozenset({BOTH, ONE}))


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
    return len(own) == 2 and (own[0] == other[0] or own[1] == other[1] or own == other[::-1])


def _has_heads_last(node: Node, anchor: Node) -> bool:
    """Whether a node is the anchor's scores as (batch, queries, keys, heads)."""
    own, other = ([str(size) for size in shape_of(n)] for n in (node, anchor))
    return len(own) == len(other) == 4 and own[1:3] in (other[-2:], other[:-3:-1])


BOTH, ONE = "both", "one"


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


def _is_sum_of_products(node: Node) -> bool:
    """Whether a node is (x[..., :, None, :] * y[..., None, :, :]).sum(dim), or with another dim of the three."""
    product = inputs(node)[0] if node.target is aten.sum.dim_IntList else None
    if not isinstance(product, Node) or product.target is not aten.mul.Tensor or len(shape_of(product)) < 3:
        return False
    shapes = [shape_of(x) if isinstance(x, Node) else () for x in inputs(product)[:2]]
    whole = str(shape_of(product))
    return all(len(shape) >= 2 and str(shape) != whole for shape in shapes)


STATIC = "_dynamo_static_input_type"
"""Where Dynamo notes that an input of the graph is a module's parameter or buffer."""


def _is_computed(node: Node) -> bool:
    """Whether a tensor follows from the inputs of a call, and is no parameter or made of such alone."""
    return any(map(_is_given, ancestors_of([node])))


def _is_given(node: Node) -> bool:
    is_tensor = node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor)
    return is_tensor and WEIGHT not in node.meta and STATIC not in node.meta.get("tensor_dict", {})
