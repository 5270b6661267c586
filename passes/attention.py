"""THE attention matcher: anchored on softmax or scaled_dot_product_attention, it peels known steps off both sides.

A new spelling is a row of UP (a step between q k^T and softmax), of DOWN (between softmax and the product with v), or
of the product tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from monarch_compile.passes.graph import FLOATS, arg, aten, dtype_of, inputs, normal_dim, same_shape, shape_of
from monarch_compile.passes.memory import is_written
from monarch_compile.passes.products import MIXED, SCORES, Scores
from monarch_compile.passes.region import AttentionRegion, MaskTerm, Miss, Missed, Operand, Site, frame_of

SOFTMAX_OPS = frozenset({aten.softmax.int, aten._softmax.default})
SDPA_OP = aten.scaled_dot_product_attention.default
OPAQUE_OPS = frozenset({aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default})
"""torch.nn's inference fast paths: attention that cannot be seen into."""


@dataclass
class Walk:
    """What has been read so far on the way from softmax up to q k^T."""

    scale: float = 1.0
    masks: list[MaskTerm] = field(default_factory=list)
    seen: list[Node] = field(default_factory=list)

    def copy(self) -> Walk:
        return replace(self, masks=list(self.masks), seen=list(self.seen))


def find_sites(gm: GraphModule) -> list[Site]:
    """Every attention site of a pre-dispatch ATen graph, in graph order; near misses included."""
    sites: list[Site] = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        try:
            if node.target in OPAQUE_OPS:
                raise Miss("fused_layer", f"{node.target} hides its attention inside one op", node)
            if node.target is SDPA_OP:
                sites.append(_from_sdpa(node))
            elif node.target in SOFTMAX_OPS and _feeds_product(node):
                sites.append(_from_softmax(node))
        except Miss as miss:
            sites.append(Missed(node, miss.code, miss.reason, miss.node))
    return sites


def _from_sdpa(node: Node) -> AttentionRegion:
    q, k, v = inputs(node)[:3]
    mask, dropout_p = arg(node, 3, "attn_mask"), arg(node, 4, "dropout_p", 0.0)
    scale = node.kwargs.get("scale")
    if dropout_p != 0:
        raise Miss("dropout_active", f"attention dropout is active (p={dropout_p})", node)
    if scale is not None and not isinstance(scale, (int, float)):
        raise Miss("scale_not_constant", "the scale is not a constant", node)
    rank = len(shape_of(q))
    if rank not in (2, 3, 4) or any(len(shape_of(x)) != rank for x in (k, v)):
        raise Miss(
            "rank", f"q, k and v must share a rank of 2 to 4; found {[len(shape_of(x)) for x in (q, k, v)]}", node
        )
    lead = shape_of(q)[:-2]
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
        enable_gqa=bool(node.kwargs.get("enable_gqa", False)),
    )


def _from_softmax(anchor: Node) -> AttentionRegion:
    rank = len(shape_of(anchor))
    if rank < 2 or normal_dim(arg(anchor, 1, "dim"), rank) != rank - 1:
        raise Miss(
            "softmax_dim", f"softmax runs over dim {arg(anchor, 1, 'dim')}, not over the keys (the last dim)", anchor
        )
    walk = Walk()
    scores_node, scores = _peel_up(inputs(anchor)[0], walk)
    output, below = _peel_down(anchor)
    mixed = MIXED[output.target](output, below[-1])
    if mixed is None:
        raise Miss("values_layout", "the product with the values has a layout that is not understood", output)
    interior = (*walk.seen, anchor, *below[1:])
    _require_single_use(walk.seen, {*interior, output})
    leads = [m.lead for m in walk.masks] or [shape_of(n)[:-2] for n in interior]
    pv_lead = shape_of(below[-1])[:-2]
    return AttentionRegion(
        anchor=anchor,
        output=output,
        q=scores.q,
        k=scores.k,
        v=mixed.v,
        scale=walk.scale * scores.alpha,
        masks=tuple(walk.masks),
        lead=frame_of(max(leads, key=len)),
        qk_lead=shape_of(scores_node)[:-2],
        pv_lead=pv_lead,
        out_dims=mixed.out_dims,
        interior=(*interior, output),
    )


def _require_single_use(scores: list[Node], inside: set[Node]) -> None:
    for node in scores:
        for user in node.users:
            if user not in inside:
                raise Miss("scores_reused", f"the attention scores are also used by {user.name}", user)


# ---- up: from softmax to q k^T ---------------------------------------------------------------------------------------


def _peel_up(node: Any, walk: Walk) -> tuple[Node, Scores]:
    """Peel steps until the product of queries and keys."""
    while isinstance(node, Node):
        walk.seen.append(node)
        if node.target in SCORES:
            scores = SCORES[node.target](node)
            if scores is None:
                raise Miss("scores_layout", "the product of queries and keys has a layout that is not understood", node)
            if scores.bias is not None:
                walk.masks.append(MaskTerm(scores.bias, "add", shape_of(node)[:-2], walk.scale * scores.beta))
            return node, scores
        if node.target in SUMS:
            return _peel_sum(node, walk)
        step = UP.get(node.target)
        if step is None:
            code = "softcap" if node.target is aten.tanh.default else "scores_op"
            label = getattr(node.target, "__name__", node.op)
            raise Miss(code, f"{label} stands between softmax and a product of queries and keys", node)
        above = step(node, walk)
        if step is not _up_view and isinstance(above, Node) and not same_shape(above, node):
            raise Miss("scores_view", f"the scores are broadcast to {list(shape_of(node))}", node)
        node = above
    raise Miss("scores_op", "softmax is not fed by a product of queries and keys", walk.seen[-1])


SUMS: dict[object, float] = {aten.add.Tensor: 1.0, aten.add.Scalar: 1.0, aten.sub.Tensor: -1.0, aten.sub.Scalar: -1.0}
"""Ops that add to the scores, with the sign of their second input."""


def _peel_sum(node: Node, walk: Walk) -> tuple[Node, Scores]:
    """One side of the sum is the scores, the other a mask or a bias: try both, keep the nearer miss."""
    sign, (left, right), alpha = SUMS[node.target], inputs(node)[:2], arg(node, 2, "alpha", 1)
    if not isinstance(alpha, (int, float)):
        raise Miss("scores_op", "a mask is added with an alpha that is not a constant", node)
    sides = [(left, right, sign * alpha), (right, left, 1.0)] if sign * alpha == 1 else [(left, right, sign * alpha)]
    misses: list[tuple[int, Miss]] = []
    for scores_side, added, factor in sides:
        if not isinstance(scores_side, Node) or not same_shape(scores_side, node):
            continue
        attempt = walk.copy()
        try:
            _note_added(node, attempt, added, factor)
            found = _peel_up(scores_side, attempt)
        except Miss as miss:
            misses.append((len(attempt.seen), miss))
            continue
        walk.scale, walk.masks, walk.seen = attempt.scale, attempt.masks, attempt.seen
        return found
    if not misses:
        raise Miss("scores_op", "neither side of a sum is a product of queries and keys", node)
    raise max(misses, key=lambda pair: pair[0])[1]


def _note_added(node: Node, walk: Walk, added: Any, factor: float) -> None:
    """A tensor is a mask; softmax ignores a constant, unless it is as large as what hides a key."""
    constant = constant_of(added)
    if constant is None and isinstance(added, Node):
        walk.masks.append(MaskTerm(added, "add", shape_of(node)[:-2], walk.scale * factor))
    elif constant is None or not abs(constant * walk.scale * factor) <= IGNORED:
        raise Miss("scores_op", f"{added} is added to the scores: not a small constant", node)


IGNORED = 1e2
"""A constant this small, added to all scores, leaves hidden keys hidden."""


def constant_of(value: Any) -> float | None:
    """The value of a number, or of a closed expression of one element; None when it depends on an input."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value.op == "get_attr":
        return _attribute_constant(value)
    if value.op != "call_function" or not (value.target is FULL or shape_of(value) in ((), (1,))):
        return None
    if value.target is FULL:
        fill = inputs(value)[1]
        number = float(fill) if isinstance(fill, (bool, int, float)) else None
    else:
        operands = [constant_of(a) for a in inputs(value) if isinstance(a, (Node, int, float))]
        rule = CONSTANT_OPS.get(value.target)
        number = rule(operands) if rule is not None and None not in operands else None
    return None if number is None or is_written(value) else held_by(number, dtype_of(value))


def held_by(number: float, dtype: torch.dtype | None) -> float | None:
    """What a tensor of a dtype makes of a number: rounded to the dtype; None where an int or bool would change it."""
    if dtype in FLOATS:
        return float(torch.tensor(number, dtype=dtype, device="cpu"))
    if dtype is None or dtype.is_floating_point or dtype.is_complex or not float(number).is_integer():
        return None
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return number if low <= number <= high else None


def _attribute_constant(value: Node) -> float | None:
    held = getattr(value.graph.owning_module, str(value.target), None)
    if not isinstance(held, torch.Tensor) or held.numel() != 1 or not str(value.target).startswith("_tensor_constant"):
        return None
    return None if is_written(value) else float(held)


FULL = aten.full.default

CONSTANT_OPS: dict[object, Callable[[list[Any]], float | None]] = {
    aten.lift_fresh_copy.default: lambda xs: xs[0],
    aten.clone.default: lambda xs: xs[0],
    aten.detach.default: lambda xs: xs[0],
    aten.detach_.default: lambda xs: xs[0],
    aten.alias.default: lambda xs: xs[0],
    aten.to.dtype: lambda xs: xs[0],
    aten.sqrt.default: lambda xs: math.sqrt(xs[0]) if xs[0] >= 0 else None,
    aten.rsqrt.default: lambda xs: xs[0] ** -0.5 if xs[0] > 0 else None,
    aten.reciprocal.default: lambda xs: 1 / xs[0] if xs[0] else None,
    aten.scalar_tensor.default: lambda xs: xs[0],
    aten.mul.Tensor: lambda xs: xs[0] * xs[1],
    aten.div.Tensor: lambda xs: xs[0] / xs[1] if xs[1] else None,
    aten.pow.Tensor_Scalar: lambda xs: xs[0] ** xs[1] if xs[0] > 0 else None,
}


def _up_cast(node: Node, walk: Walk) -> Any:
    if dtype_of(node) not in FLOATS:
        raise Miss("scores_op", f"the scores are cast to {dtype_of(node)}", node)
    return inputs(node)[0]


def _up_view(node: Node, walk: Walk) -> Any:
    if not _keeps_matrix(node):
        raise Miss("scores_view", "the scores are reshaped across rows or keys", node)
    return inputs(node)[0]


def _up_scale(node: Node, walk: Walk) -> Any:
    divide = node.target in (aten.div.Tensor, aten.div.Scalar)
    pairs = (
        [(inputs(node)[0], inputs(node)[1])]
        if divide
        else [(inputs(node)[0], inputs(node)[1]), (inputs(node)[1], inputs(node)[0])]
    )
    for scores, factor in pairs:
        number = constant_of(factor)
        if number is not None and isinstance(scores, Node) and number != 0 and math.isfinite(number):
            walk.scale *= 1 / number if divide else number
            return scores
    raise Miss("scale_not_constant", "the scores are multiplied by something that is not a constant", node)


def _up_masked_fill(node: Node, walk: Walk) -> Any:
    _add_bool_mask(node, walk, inputs(node)[1], "drop", inputs(node)[2])
    return inputs(node)[0]


def _up_where(node: Node, walk: Walk) -> Any:
    condition, kept, other = inputs(node)
    if constant_of(other) is not None:
        _add_bool_mask(node, walk, condition, "keep", other)
        return kept
    _add_bool_mask(node, walk, condition, "drop", kept)
    return other


def _add_bool_mask(node: Node, walk: Walk, mask: Any, role: str, fill: Any) -> None:
    value = constant_of(fill)
    if value is None or not isinstance(mask, Node):
        raise Miss("mask_fill", "masked scores are filled with something that is not a constant", node)
    if not value * walk.scale <= DROPPED:
        raise Miss("mask_fill", f"masked scores are filled with {value:g}, which does not hide a key", node)
    walk.masks.append(MaskTerm(mask, role, shape_of(node)[:-2]))


DROPPED = -1e4
"""A score at or below this hides a key: exp() of it is 0 beside any visible score."""


def _keeps_matrix(node: Node) -> bool:
    """Whether a view leaves the last two dims alone."""
    before, after = shape_of(inputs(node)[0]), shape_of(node)
    if len(before) < 2 or len(after) < 2:
        return False
    return str(before[-2:]) == str(after[-2:]) and (math.prod(before[:-2]) == math.prod(after[:-2]))


UP: dict[object, Callable[[Node, Walk], Any]] = {
    aten.to.dtype: _up_cast,
    aten._to_copy.default: _up_cast,
    aten.to.dtype_layout: _up_cast,
    aten.type_as.default: _up_cast,
    aten.reshape.default: _up_view,
    aten.view.default: _up_view,
    aten.unsqueeze.default: _up_view,
    aten.squeeze.dim: _up_view,
    aten.expand.default: _up_view,
    aten.contiguous.default: _up_view,
    aten.clone.default: _up_view,
    aten.mul.Tensor: _up_scale,
    aten.mul.Scalar: _up_scale,
    aten.div.Tensor: _up_scale,
    aten.div.Scalar: _up_scale,
    aten.masked_fill.Scalar: _up_masked_fill,
    aten.masked_fill.Tensor: _up_masked_fill,
    aten.where.self: _up_where,
    aten.where.ScalarOther: _up_where,
    aten.where.ScalarSelf: _up_where,
}


# ---- down: from softmax to the product with v ------------------------------------------------------------------------

DOWN_CASTS = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default})
DOWN_VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
    }
)


def _peel_down(anchor: Node) -> tuple[Node, list[Node]]:
    """The product with v, and the nodes from softmax to the probabilities it takes."""
    chain = [anchor]
    while True:
        node = chain[-1]
        users = list(node.users)
        if len(users) != 1:
            extra = next((u for u in users if not _is_step_down(u)), users[-1])
            raise Miss("probs_reused", f"the attention probabilities are also used by {extra.name}", extra)
        (user,) = users
        if user.target in MIXED:
            return user, chain
        if user.target is aten.dropout.default:
            raise Miss("dropout_active", f"attention dropout is active (p={arg(user, 1, 'p')})", user)
        if not _is_step_down(user):
            label = getattr(user.target, "__name__", user.op)
            raise Miss("probs_op", f"{label} stands between softmax and the product with the values", user)
        chain.append(user)


def _is_step_down(node: Node) -> bool:
    if node.target in DOWN_CASTS:
        return dtype_of(node) in FLOATS
    return node.target in MIXED or (node.target in DOWN_VIEWS and _keeps_matrix(node))


def _feeds_product(anchor: Node) -> bool:
    """Whether the softmax's output reaches a matrix product within a few steps: else it is no attention."""
    frontier, seen = [anchor], {anchor}
    for _ in range(6):
        users = [u for n in frontier for u in n.users if u not in seen]
        if any(u.target in MIXED for u in users):
            return True
        seen.update(users)
        frontier = [u for u in users if inputs(u) and isinstance(inputs(u)[0], Node) and _keeps_matrix(u)]
    return False
