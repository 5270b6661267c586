"""From softmax up to the product of queries and keys: known steps are peeled off one by one.

A new spelling of a step is a row of UP; of the product itself, a row of SCORES in products.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.passes.attention.anchors import BY_WEIGHT, is_unread_product
from monarch_compile.passes.attention.products import SCORES, Scores
from monarch_compile.passes.attention.region import Factor, MaskTerm
from monarch_compile.passes.attention.shifts import is_small
from monarch_compile.passes.constants import DROPPED, IGNORED, constant_of
from monarch_compile.passes.graph import FLOATS, arg, aten, dtype_of, inputs, normal_dim, same_shape, shape_of
from monarch_compile.passes.views import CASTS, TRANSPOSES, VIEWS, swaps_matrix
from monarch_compile.refusal import Refused


@dataclass
class Walk:
    """What has been read so far on the way from softmax up to q k^T.

    swapped: the scores are (*lead, keys, queries) here. factors: scales known at run time only. shifts: what is added
    to whole rows, and the number that this is multiplied by. num_masked: how many of the nodes `seen`, from the first
    one on, hold masked scores.
    """

    swapped: bool = False
    scale: float = 1.0
    masks: list[MaskTerm] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    shifts: list[tuple[Node, float]] = field(default_factory=list)
    seen: list[Node] = field(default_factory=list)
    num_masked: int = 0

    def copy(self) -> Walk:
        return replace(self, masks=[*self.masks], factors=[*self.factors], shifts=[*self.shifts], seen=[*self.seen])

    def adopt(self, other: Walk) -> None:
        """Go on from where `other` has got to."""
        self.__dict__.update(other.__dict__)

    def note(self, node: Node, mask: Node, role: str, gain: float = 1.0) -> None:
        """A mask, applied to the scores `node`."""
        if self.factors:
            raise Refused("mask_scaled", "a mask is applied before a scale that is known at run time only", node)
        if role != "times" and any(later.role == "times" for later in self.masks):
            raise Refused("mask_scaled", "a mask is applied before the scores are multiplied by another", node)
        self.masks.append(MaskTerm(mask, role, shape_of(node)[:-2], gain, self.swapped))
        if role != "times":
            self.num_masked = len(self.seen)

    @property
    def keys_place(self) -> int:
        """The keys' dim, counted from the right."""
        return 2 if self.swapped else 1


def peel_up(node: Any, walk: Walk) -> tuple[Node, Scores]:
    """Peel steps until the product of queries and keys, which is returned with its operands in their roles.

    Raises:
        Refused: a step is not understood, or the product has an odd layout.
    """
    while isinstance(node, Node):
        walk.seen.append(node)
        if node.target in SCORES:
            return node, _product(node, walk)
        if node.target in SUMS:
            return _peel_sum(node, walk)
        step = UP.get(node.target)
        if is_unread_product(node) or node.target in BY_WEIGHT:
            why = f"{node.target} as the product of queries and keys has a layout that is not understood"
            raise Refused("scores_layout", why, node)
        if step is None:
            code = "softcap" if node.target is aten.tanh.default else "scores_op"
            label = getattr(node.target, "__name__", node.op)
            raise Refused(code, f"{label} stands between softmax and a product of queries and keys", node)
        above = step(node, walk)
        if step not in RESHAPING and isinstance(above, Node) and not same_shape(above, node):
            raise Refused("scores_view", f"the scores are broadcast to {list(shape_of(node))}", node)
        node = above
    raise Refused("scores_op", "softmax is not fed by a product of queries and keys", walk.seen[-1])


def _product(node: Node, walk: Walk) -> Scores:
    scores = SCORES[node.target](node)
    if scores is None:
        raise Refused("scores_layout", "the product of queries and keys has a layout that is not understood", node)
    if scores.bias is not None:
        walk.note(node, scores.bias, "add", walk.scale * scores.beta)
    sources, masked = {*walk.seen, *_origins(scores.q.node), *_origins(scores.k.node)}, {*walk.seen[: walk.num_masked]}
    for shift, factor in walk.shifts:
        if not is_small(shift, factor, sources, masked):
            why = "whole rows are shifted by a tensor of unknown size: a large one leaves nothing but rounding of them"
            raise Refused("row_shift", why, shift)
    return scores._replace(q=scores.k, k=scores.q) if walk.swapped else scores


def _origins(node: Node) -> Iterator[Node]:
    """An operand, and what it is a view or a multiple of."""
    yield node
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        yield node


def spans(value: Node, place: int) -> bool:
    """Whether a tensor may vary along the dim that is `place`-th from the right (a broadcast one does not)."""
    shape = shape_of(value)
    return len(shape) >= place and not (isinstance(shape[-place], int) and shape[-place] == 1)


# ---- sums: a mask, a bias, or a shift of whole rows ------------------------------------------------------------------

SUMS: dict[object, float] = {aten.add.Tensor: 1.0, aten.add.Scalar: 1.0, aten.sub.Tensor: -1.0, aten.sub.Scalar: -1.0}
"""Ops that add to the scores, with the sign of their second input."""


def _peel_sum(node: Node, walk: Walk) -> tuple[Node, Scores]:
    """One side of the sum is the scores, the other a mask or a bias: try both, keep the refusal that came later."""
    sign, (left, right), alpha = SUMS[node.target], inputs(node)[:2], arg(node, 2, "alpha", 1)
    if not isinstance(alpha, (int, float)):
        raise Refused("scores_op", "a mask is added with an alpha that is not a constant", node)
    sides = [(left, right, sign * alpha), (right, left, 1.0)] if sign * alpha == 1 else [(left, right, sign * alpha)]
    refusals: list[tuple[int, Refused]] = []
    for scores_side, added, factor in sides:
        if not isinstance(scores_side, Node) or not same_shape(scores_side, node):
            continue
        attempt = walk.copy()
        try:
            _note_added(node, attempt, scores_side, added, factor)
            found = peel_up(scores_side, attempt)
        except Refused as refused:
            refusals.append((len(attempt.seen), refused))
            continue
        walk.adopt(attempt)
        return found
    if not refusals:
        label = getattr(node.target, "__name__", node.op)
        neither = "neither side of a sum is" if len(sides) == 2 else f"the first operand of {label} is not"
        raise Refused("scores_op", f"{neither} a product of queries and keys", node)
    raise max(refusals, key=lambda pair: pair[0])[1]


def _note_added(node: Node, walk: Walk, scores: Node, added: Any, factor: float) -> None:
    """A tensor is a mask, unless it shifts whole rows: softmax ignores that unless it is large, and small constants."""
    constant = constant_of(added)
    if constant is not None:
        if not abs(constant * walk.scale * factor) <= IGNORED or (walk.factors and walk.masks):
            raise Refused("scores_op", f"{added} is added to the scores: not a small constant", node)
    elif not isinstance(added, Node):
        raise Refused("scores_op", f"{added} is added to the scores: not a small constant", node)
    elif spans(added, walk.keys_place) or not _is_float(added):
        walk.note(node, added, "add", walk.scale * factor)
    elif walk.masks and not (factor < 0 and _is_top_of(added, scores, walk.keys_place)):
        raise Refused("row_shift", "the scores are shifted by a tensor before they are masked", node)
    else:
        walk.shifts.append((added, walk.scale * factor))


def _is_float(node: Node) -> bool:
    return dtype_of(node) in FLOATS


def _is_top_of(value: Node, scores: Node, keys_place: int) -> bool:
    """Whether `value` is each row's largest score, by which safe softmax shifts: it cannot bring a hidden key up."""
    keys, keepdim = len(shape_of(scores)) - keys_place, True
    if value.target is aten.unsqueeze.default:
        if normal_dim(inputs(value)[1], len(shape_of(value))) != keys:
            return False
        value, keepdim = inputs(value)[0], False
    while value.target in (aten.detach.default, aten.alias.default, aten.clone.default):
        value = inputs(value)[0]
    if getattr(value.target, "__name__", "") == "getitem" and inputs(value)[1] == 0:
        value = inputs(value)[0]
    if value.target not in TOPS or inputs(value)[0] is not scores or arg(value, 2, "keepdim", False) != keepdim:
        return False
    dims = arg(value, 1, "dim")
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return [normal_dim(d, len(shape_of(scores))) for d in dims] == [keys]


TOPS = frozenset({aten.amax.default, aten.max.dim})


# ---- steps -----------------------------------------------------------------------------------------------------------


def _up_cast(node: Node, walk: Walk) -> Any:
    if dtype_of(node) not in FLOATS:
        raise Refused("scores_op", f"the scores are cast to {dtype_of(node)}", node)
    return inputs(node)[0]


def _up_view(node: Node, walk: Walk) -> Any:
    if not keeps_matrix(node):
        raise Refused("scores_view", "the scores are reshaped across rows or keys", node)
    return inputs(node)[0]


def _up_transpose(node: Node, walk: Walk) -> Any:
    if not swaps_matrix(node):
        raise Refused("scores_view", "the leading dims of the scores change places", node)
    walk.swapped = not walk.swapped
    return inputs(node)[0]


def _up_negative(node: Node, walk: Walk) -> Any:
    walk.scale = -walk.scale
    return inputs(node)[0]


def _up_scale(node: Node, walk: Walk) -> Any:
    divide = node.target in (aten.div.Tensor, aten.div.Scalar)
    left, right = inputs(node)[:2]
    pairs = [(left, right)] if divide else [(left, right), (right, left)]
    for scores, factor in pairs:
        number = constant_of(factor)
        if number is not None and isinstance(scores, Node) and number != 0 and math.isfinite(number):
            walk.scale *= 1 / number if divide else number
            return scores
    for scores, factor in pairs:
        if isinstance(factor, Node) and isinstance(scores, Node) and same_shape(scores, node):
            if not spans(factor, 1) and not spans(factor, 2) and _may_scale_queries(factor, scores):
                walk.factors.append(Factor(factor, scores, divide))
                return scores
            if not divide and spans(factor, walk.keys_place) and not same_shape(factor, node):
                walk.note(node, factor, "times")
                return scores
    odd = [number for _, factor in pairs if (number := constant_of(factor)) is not None]
    if odd:
        raise Refused("scale", f"the scores are {'divided' if divide else 'multiplied'} by {odd[0]:g}", node)
    raise Refused("scale_not_constant", "the scores are multiplied by something that is not a constant", node)


def _may_scale_queries(factor: Node, scores: Node) -> bool:
    """Whether a scale known at run time can be taken over to the queries without a change of dtype."""
    return _is_float(factor) and (dtype_of(factor) == dtype_of(scores) or not shape_of(factor))


def _up_masked_fill(node: Node, walk: Walk) -> Any:
    _note_filled(node, walk, inputs(node)[1], "drop", inputs(node)[2])
    return inputs(node)[0]


def _up_where(node: Node, walk: Walk) -> Any:
    condition, kept, other = inputs(node)
    if constant_of(other) is not None:
        _note_filled(node, walk, condition, "keep", other)
        return kept
    _note_filled(node, walk, condition, "drop", kept)
    return other


def _note_filled(node: Node, walk: Walk, mask: Any, role: str, fill: Any) -> None:
    value = constant_of(fill)
    if value is None or not isinstance(mask, Node) or dtype_of(mask) != torch.bool:
        raise Refused("mask_fill", "masked scores are filled with something that is not a constant", node)
    if not value * walk.scale <= DROPPED:
        scaled = f" and scaled by {walk.scale:g} afterwards" if walk.scale != 1 else ""
        raise Refused("mask_fill", f"masked scores are filled with {value:g}{scaled}, which does not hide a key", node)
    walk.note(node, mask, role)


def keeps_matrix(node: Node) -> bool:
    """Whether a view leaves the last two dims alone."""
    before, after = shape_of(inputs(node)[0]), shape_of(node)
    if len(before) < 2 or len(after) < 2:
        return False
    return str(before[-2:]) == str(after[-2:]) and (math.prod(before[:-2]) == math.prod(after[:-2]))


UP: dict[object, Callable[[Node, Walk], Any]] = {
    **dict.fromkeys(CASTS, _up_cast),
    **dict.fromkeys(VIEWS, _up_view),
    **dict.fromkeys(TRANSPOSES, _up_transpose),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _up_scale),
    aten.neg.default: _up_negative,
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _up_masked_fill),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _up_where),
}
RESHAPING = (_up_view, _up_transpose)
"""Steps whose input has another shape than their output."""
