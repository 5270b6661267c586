"""THE attention matcher: anchored on softmax or scaled_dot_product_attention, it peels known steps off both sides.

Up to the product of queries and keys: scores.py. Down to the product with the values: here, a row of DOWN for a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from monarch_compile.passes.attention.anchors import head_mixer, is_attention, is_unread_mix
from monarch_compile.passes.attention.hidden import hidden_attention
from monarch_compile.passes.attention.products import MIXED
from monarch_compile.passes.attention.region import AttentionRegion, MaskTerm, Operand, Site, frame_of
from monarch_compile.passes.attention.scores import Walk, keeps_matrix, peel_up
from monarch_compile.passes.attention.softmaxes import Softmax, softmax_over, softmaxes_of
from monarch_compile.passes.canonical import DROPOUTS
from monarch_compile.passes.capture.bodies import WHY, bodies_of
from monarch_compile.passes.capture.enclosed import CLOSED, is_opened
from monarch_compile.passes.capture.trace import to_aten
from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.graph import (
    FLOATS,
    arg,
    aten,
    dtype_of,
    inputs,
    modules_of,
    same_shape,
    shape_of,
)
from monarch_compile.passes.memory import must_be_kept
from monarch_compile.passes.state import RefusedSite
from monarch_compile.passes.views import CASTS, TRANSPOSES, VIEWS, swaps_matrix
from monarch_compile.refusal import Refusal, Refused

SDPA_OP = aten.scaled_dot_product_attention.default
OWN_MASK = aten._masked_softmax.default
"""A softmax that also applies a mask."""
MAX_RANK = 6

MIXED_HEADS = frozenset({"scores_op", "scores_view", "scores_layout", "probs_op"})
"""What a refusal is called at a layer that mixes heads, or at the views around it."""


def find_sites(gm: GraphModule) -> list[Site]:
    """Every attention site of a pre-dispatch ATen graph, in graph order; refused ones included."""
    sites: list[Site] = []
    softmaxes = softmaxes_of(gm.graph)
    for node in gm.graph.nodes:
        softmax = softmaxes.get(node)
        if node.op != "call_function":
            continue
        if isinstance(node.target, HigherOrderOperator):
            sites += _inside(node)
            continue
        try:
            hidden = hidden_attention(node)
            if hidden is not None:
                sites.append(RefusedSite(node, hidden))
            elif node.target is SDPA_OP:
                sites.append(_from_sdpa(node))
            elif softmax is not None and is_attention(softmax):
                sites.append(_from_softmax(softmax))
            elif node.target is OWN_MASK and is_attention(softmax_over(node, arg(node, 2, "dim"))):
                raise Refused("normalisation", f"{node.target} applies a mask of its own", node)
        except Refused as refused:
            refusal = refused.refusal if softmax is None else _without_mixer(softmax, refused.refusal)
            sites.append(RefusedSite(node, refusal))
    return sites


def _without_mixer(softmax: Softmax, refusal: Refusal) -> Refusal:
    """A refusal at a softmax; where a layer mixes heads, the views around it are not what is in the way."""
    mixer = head_mixer(softmax) if refusal.code in MIXED_HEADS else None
    if mixer is None:
        return refusal
    return Refusal("heads_mixed", "a layer mixes the heads of the scores, or of the probabilities", mixer)


def _inside(node: Node) -> list[Site]:
    """The attention in the bodies of a higher-order op: as any other where they are opened, else kept as it is."""
    if is_opened(node):
        return [site for body in modules_of(node).values() for site in find_sites(body)]
    name = str(getattr(node.target, "__name__", node.target))
    if name == "flex_attention":
        return [RefusedSite(node, Refusal("flex_attention", "FlexAttention stays the exact attention it is", node))]
    why = f"it stands in the body of {WHY.get(name, name)}, which {node.meta.get(CLOSED) or 'is kept as it is'}"
    sites = [site for body in bodies_of(node, to_aten) for site in find_sites(body)]
    return [RefusedSite(site.anchor, Refusal("in_body", why, site.anchor)) for site in sites]


def _from_sdpa(node: Node) -> AttentionRegion:
    q, k, v = inputs(node)[:3]
    mask, dropout_p = arg(node, 3, "attn_mask"), arg(node, 4, "dropout_p", 0.0)
    scale = node.kwargs.get("scale")
    if dropout_p != 0:
        raise Refused("dropout_active", f"attention dropout is active (p={dropout_p})", node)
    if scale is not None and not isinstance(scale, (int, float)):
        raise Refused("scale_not_constant", "the scale is not a constant", node)
    rank = len(shape_of(q))
    if not 2 <= rank <= MAX_RANK or any(len(shape_of(x)) != rank for x in (k, v)):
        found = [len(shape_of(x)) for x in (q, k, v)]
        raise Refused("rank", f"q, k and v must share a rank of 2 to {MAX_RANK}; found {found}", node)
    lead = shape_of(q)[:-2]
    group = _group_of(node, q, k, v) if node.kwargs.get("enable_gqa", False) else 1
    masks = []
    if isinstance(mask, Node):
        role = "keep" if mask.meta["val"].dtype == torch.bool else "add"
        masks.append(MaskTerm(mask, role, lead))
    identity = tuple(range(rank))
    return AttentionRegion(
        anchor=node,
        output=node,
        q=Operand(q, identity),
        k=Operand(k, identity),
        v=Operand(v, identity),
        scale=float(scale) if scale is not None else 1.0 / math.sqrt(shape_of(q)[-1]),
        masks=tuple(masks),
        lead=frame_of(lead),
        qk_lead=lead,
        pv_lead=lead,
        out_dims=identity,
        interior=(node,),
        is_causal=bool(arg(node, 5, "is_causal", False)),
        group=group,
        scores_dtype=dtype_of(node),
    )


def _group_of(node: Node, q: Node, k: Node, v: Node) -> int:
    """How many query heads share a key head under enable_gqa."""
    own, *others = (shape_of(x)[-3:-2] for x in (q, k, v))
    heads = [x[0] for x in (own, *others) if x and isinstance(x[0], int)]
    if len(heads) != 3 or (len(shape_of(q)) == 3 and heads[0] != heads[1]):
        raise Refused("gqa", "grouped-query attention needs four dims and static numbers of heads", node)
    if heads[1] != heads[2]:
        raise Refused("gqa", f"keys have {heads[1]} heads and values {heads[2]}", node)
    return int(heads[0] // heads[1])


def _from_softmax(softmax: Softmax) -> AttentionRegion:
    anchor, swapped = softmax.node, _is_swapped(softmax)
    walk = Walk(swapped, softmax.factor, _masks_of(softmax, swapped))
    scores_node, scores = peel_up(softmax.scores, walk)
    if softmax.late is None:
        down = _peel_down(anchor, swapped)
        output = product = down.product
    else:
        down = Down([softmax.late.weights], swapped)
        output, product = anchor, softmax.late.product
    below = down.chain
    mixed = MIXED[product.target](product, below[-1], down.swapped)
    if mixed is None and MIXED[product.target](product, below[-1], not down.swapped) is not None and swapped:
        why = f"softmax runs over dim {softmax.dim}, the product with the values sums over another"
        raise Refused("softmax_dim", why, anchor)
    if mixed is None:
        raise Refused("values_layout", "the product with the values has a layout that is not understood", product)
    interior = tuple(dict.fromkeys((*walk.seen, *softmax.inner, anchor, *below[1:], output)))
    _require_single_use("the attention scores", walk.seen, {*interior})
    _require_single_use("parts of a softmax written by hand", softmax.inner, {*interior})
    masks = (*walk.masks, *down.masks)
    leads = [m.lead for m in masks] or [shape_of(n)[:-2] for n in (*walk.seen, *below)]
    return AttentionRegion(
        anchor=anchor,
        output=output,
        q=scores.q,
        k=scores.k,
        v=mixed.v,
        scale=walk.scale * scores.alpha,
        masks=masks,
        lead=frame_of(max(leads, key=len)),
        qk_lead=shape_of(scores_node)[:-2],
        pv_lead=shape_of(below[-1])[:-2],
        out_dims=mixed.out_dims,
        interior=interior,
        factors=tuple(walk.factors),
        scores_dtype=dtype_of(scores_node),
    )


def _is_swapped(softmax: Softmax) -> bool:
    """Whether its scores are (*lead, keys, queries)."""
    rank, dim = softmax.rank, softmax.dim
    if softmax.refusal is not None:
        raise Refused(*softmax.refusal)
    if dim is None:
        why = "the scores are exponentiated, and what normalises them is not known to be their sum over the keys"
        raise Refused("normalisation", why, softmax.node)
    if rank < 2 or dim < rank - 2:
        why = f"softmax runs over dim {dim}, not over the keys (one of the last two dims)"
        raise Refused("softmax_dim", why, softmax.node)
    return dim == rank - 2


def _masks_of(softmax: Softmax, swapped: bool) -> list[MaskTerm]:
    """What makes weights 0 hides their scores."""
    lead = shape_of(softmax.scores)[:-2]
    roles = [(mask, "keep" if is_kept else "drop") for mask, is_kept in reversed(softmax.drops)]
    return [MaskTerm(mask, role, lead, swapped=swapped) for mask, role in roles]


def _require_single_use(what: str, nodes: Iterable[Node], inside: set[Node]) -> None:
    """Every use of the scores must go with the rewrite: be inside, or serve nothing but what is inside."""
    for node in nodes:
        for user in node.users:
            if user not in inside and not _serves_only(user, inside):
                raise Refused("scores_reused", f"{what} are also used by {user.name}", user)


MAX_SERVANTS = 16
"""How many nodes beside the chain may stand between the scores and a use that is inside (a row's maximum is two)."""


def _serves_only(node: Node, inside: set[Node]) -> bool:
    """Whether all that is computed from `node` is inside, by way of a few nodes that nobody else reads."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.op != "call_function" or must_be_kept(current) or not current.users or len(seen) > MAX_SERVANTS:
            return False
        found = [user for user in current.users if user not in inside and user not in seen]
        seen.update(found)
        pending += found
    return True


# ---- down: from softmax to the product with v ------------------------------------------------------------------------


@dataclass
class Down:
    """What has been read on the way from softmax down: the nodes, masks on the probabilities, and the product.

    swapped: the probabilities are (*lead, keys, queries) here.
    """

    chain: list[Node]
    swapped: bool
    masks: list[MaskTerm] = field(default_factory=list)

    @property
    def product(self) -> Node:
        """The probabilities' one user."""
        return next(iter(self.chain[-1].users))


def _peel_down(anchor: Node, swapped: bool) -> Down:
    """To the product with v."""
    down = Down([anchor], swapped)
    while True:
        node = down.chain[-1]
        users = list(node.users)
        if len(users) != 1:
            extra = next((u for u in users if not _may_step_down(u)), users[-1])
            raise Refused("probs_reused", f"the attention probabilities are also used by {extra.name}", extra)
        (user,) = users
        if user.target in MIXED:
            return down
        if is_unread_mix(user):
            why = f"{user.target} as the product with the values has a layout that is not understood"
            raise Refused("values_layout", why, user)
        if user.target in DROPOUTS:
            raise Refused("dropout_active", f"attention dropout is active (p={arg(user, 1, 'p')})", user)
        step = DOWN.get(user.target)
        if step is None or not step(user, down):
            label = getattr(user.target, "__name__", user.op)
            raise Refused("probs_op", f"{label} stands between softmax and the product with the values", user)
        down.chain.append(user)


def _may_step_down(node: Node) -> bool:
    return node.target in MIXED or node.target in DOWN


def _down_cast(node: Node, down: Down) -> bool:
    return dtype_of(node) in FLOATS


def _down_view(node: Node, down: Down) -> bool:
    return keeps_matrix(node)


def _down_transpose(node: Node, down: Down) -> bool:
    down.swapped ^= swaps_matrix(node)
    return swaps_matrix(node)


def _down_nan_to_num(node: Node, down: Down) -> bool:
    """Probabilities are NaN only in rows that see no key, which give 0 here too."""
    return arg(node, 1, "nan") in (None, 0)


def _down_masked(node: Node, down: Down) -> bool:
    probs, mask, fill = inputs(node)
    return constant_of(fill) == 0 and _note_again(node, down, probs, mask, "again")


def _down_where(node: Node, down: Down) -> bool:
    mask, kept, other = inputs(node)
    return constant_of(other) == 0 and _note_again(node, down, kept, mask, "again_keep")


def _down_times(node: Node, down: Down) -> bool:
    left, right = inputs(node)[:2]
    mask = right if left is down.chain[-1] else left
    return _note_again(node, down, down.chain[-1], mask, "times")


def _note_again(node: Node, down: Down, probs: Any, mask: Any, role: str) -> bool:
    """A mask that may take away from the probabilities what the scores' masks have hidden, and no more."""
    if probs is not down.chain[-1] or mask is probs or not isinstance(mask, Node) or not same_shape(probs, node):
        return False
    if role != "times" and dtype_of(mask) != torch.bool:
        return False
    down.masks.append(MaskTerm(mask, role, shape_of(node)[:-2], swapped=down.swapped))
    return True


DOWN: dict[object, Callable[[Node, Down], bool]] = {
    **dict.fromkeys(CASTS, _down_cast),
    **dict.fromkeys(VIEWS, _down_view),
    **dict.fromkeys(TRANSPOSES, _down_transpose),
    aten.nan_to_num.default: _down_nan_to_num,
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _down_masked),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther), _down_where),
    aten.mul.Tensor: _down_times,
}
