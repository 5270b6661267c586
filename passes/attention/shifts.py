"""What rows of scores are shifted by: softmax ignores it, but a large shift leaves nothing of them but rounding."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from monarch_compile.passes.constants import IGNORED
from monarch_compile.passes.graph import arg, aten, inputs
from monarch_compile.passes.views import CASTS, PARTS, TRANSPOSES, VIEWS

MAX_NODES = 16
"""How many nodes a shift may be made of."""
MAX_DEGREE = 4
"""How many factors made of queries, keys or scores a product may have."""


@dataclass(frozen=True)
class Size:
    """A bound: at most `gain` times a product of `degree` elements of the sources; a number has degree 0."""

    degree: int
    gain: float


Bound = Size | None
"""None: there is none that is known."""


def is_small(shift: Node, factor: float, sources: Set[Node], masked: Set[Node]) -> bool:
    """Whether a shift times a number is computed from `sources` (queries, keys, scores) and nothing else, in a few
    steps that do not make it large. `masked` sources hold large numbers: their maxima alone are small."""
    size = _Sizes(sources, masked).of(shift)
    return size is not None and size.degree <= MAX_DEGREE and size.gain * max(1.0, abs(factor)) <= IGNORED


@dataclass
class _Sizes:
    """Bounds of nodes, found so far by node and by whether its maximum alone is read."""

    sources: Set[Node]
    masked: Set[Node]
    found: dict[tuple[Node, bool], Bound] = field(default_factory=dict)

    def of(self, value: Any, *, as_maximum: bool = False) -> Bound:
        """The bound of a node or number."""
        if isinstance(value, (int, float)):
            return Size(0, abs(value))
        if not isinstance(value, Node):
            return None
        if value in self.sources:
            return None if value in self.masked and not as_maximum else Size(1, 1.0)
        key = value, as_maximum
        if key not in self.found:
            self.found[key] = None  # while it is looked for
            rule = RULES.get(value.target)
            known = rule is not None and len(self.found) <= MAX_NODES
            self.found[key] = rule(self, value, as_maximum) if rule is not None and known else None
        return self.found[key]


Rule = Callable[[_Sizes, Node, bool], Bound]


def _same(sizes: _Sizes, node: Node, as_maximum: bool) -> Bound:
    return sizes.of(inputs(node)[0], as_maximum=as_maximum)


def _no_larger(sizes: _Sizes, node: Node, _: bool) -> Bound:
    return sizes.of(inputs(node)[0])


def _maximum(sizes: _Sizes, node: Node, _: bool) -> Bound:
    return sizes.of(inputs(node)[0], as_maximum=True)


def _sum(sizes: _Sizes, node: Node, _: bool) -> Bound:
    """Of two operands, the second times `alpha`; one of them may be subtracted from the other."""
    one, other = (sizes.of(x) for x in inputs(node)[:2])
    alpha = sizes.of(arg(node, 2, "alpha", 1))
    if one is None or other is None or alpha is None:
        return None
    return Size(max(one.degree, other.degree), one.gain + other.gain * max(1.0, alpha.gain))


def _product(sizes: _Sizes, node: Node, _: bool) -> Bound:
    one, other = (sizes.of(x) for x in inputs(node)[:2])
    if one is None or other is None:
        return None
    return Size(one.degree + other.degree, max(1.0, one.gain) * max(1.0, other.gain))


def _einsum(sizes: _Sizes, node: Node, _: bool) -> Bound:
    found = [sizes.of(x) for x in inputs(node)[1]]
    known = [x for x in found if x is not None]
    if len(known) < len(found):
        return None
    return Size(sum(x.degree for x in known), math.prod(max(1.0, x.gain) for x in known))


def _quotient(sizes: _Sizes, node: Node, _: bool) -> Bound:
    size, divisor = sizes.of(inputs(node)[0]), inputs(node)[1]
    if size is None or not isinstance(divisor, (int, float)) or divisor == 0:
        return None
    return Size(size.degree, size.gain * max(1.0, 1 / abs(divisor)))


def _power(sizes: _Sizes, node: Node, _: bool) -> Bound:
    size, exponent = sizes.of(inputs(node)[0]), inputs(node)[1] if len(inputs(node)) > 1 else 2
    if size is None or exponent not in (1, 2, 3, 4):
        return None
    return Size(size.degree * int(exponent), max(1.0, size.gain) ** int(exponent))


def _norm(sizes: _Sizes, node: Node, _: bool) -> Bound:
    """Of order 1, 2 or infinity; one of a small order is a large power."""
    return sizes.of(inputs(node)[0]) if arg(node, 1, "ord", 2) in (1, 2, math.inf) else None


def _one_of(places: slice) -> Rule:
    """One of some operands, or a number between them."""

    def rule(sizes: _Sizes, node: Node, _: bool) -> Bound:
        given = [x for x in (*inputs(node)[places], *node.kwargs.values()) if x is not None]
        found = [sizes.of(x) for x in given]
        known = [x for x in found if x is not None]
        if len(known) < len(found) or not known:
            return None
        return Size(max(x.degree for x in known), max(x.gain for x in known))

    return rule


MAXIMA = (aten.amax.default, aten.max.dim, aten.max.default, aten.logsumexp.default)
COPIES = (aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default)
SHRINKING = (
    *(aten.amin.default, aten.min.dim, aten.min.default, aten.mean.default, aten.mean.dim),
    *(aten.sum.default, aten.sum.dim_IntList),
    *(aten.neg.default, aten.abs.default, aten.relu.default, aten.sqrt.default, aten.expand_as.default),
)
RULES: dict[object, Rule] = {
    **dict.fromkeys((*VIEWS, *PARTS, *TRANSPOSES), _no_larger),  # of a part, all may be masked
    **dict.fromkeys((*CASTS, *COPIES, operator.getitem), _same),
    **dict.fromkeys(MAXIMA, _maximum),
    **dict.fromkeys(SHRINKING, _no_larger),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), _sum),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _sum),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), _product),  # other scores
    aten.einsum.default: _einsum,
    **dict.fromkeys((aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim), _norm),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _quotient),
    **dict.fromkeys((aten.pow.Tensor_Scalar, aten.square.default), _power),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
                    _one_of(slice(1, 3))),
    **dict.fromkeys((aten.maximum.default, aten.minimum.default), _one_of(slice(0, 2))),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default), _one_of(slice(0, 3))),
    aten.masked_fill.Scalar: _one_of(slice(0, 3, 2)),
}  # fmt: skip
"""By operator: a spelling of a shift is a row."""
