"""What a dim of a tensor is made of: factors, outermost first, which reshapes split, merge and move.

As in einops, a dim is the row-major product of its factors. Two dims are known to count the same places where their
factors are alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true


class Kind(Enum):
    """What is known of a factor."""

    SPATIAL = auto()
    """An axis of an image or a video: a convolution slides along it, or it counts patches."""
    IMAGE = auto()
    """A dim of an argument that may be an image: known to be spatial once it is cut into patches."""
    FREE = auto()
    """It says nothing: what lies along it are parameters, a mask, or one element that is repeated."""
    JOINED = auto()
    """`prefix` tokens, a grid, `suffix` tokens: what `cat` makes."""
    OTHER = auto()
    """Anything else, and all that is not understood."""


@dataclass(frozen=True)
class Factor:
    """A factor of a dim, which began as a dim of a node (`origin`) and was cut since.

    cuts: (is_outer, how many outer parts) of each cut; `parent` is the factor before the last of them. along: which
    spatial axis of its image this is, outermost 0; of an IMAGE, which dim. why, node: for a report, why it is no more.
    """

    origin: tuple[Node, int]
    kind: Kind = field(compare=False)
    size: Any = field(compare=False)
    along: int = field(default=0, compare=False)
    cuts: tuple[tuple[bool, str], ...] = ()
    parent: Factor | None = field(default=None, compare=False, repr=False)
    prefix: int = 0
    suffix: int = 0
    inner: tuple[Factor, ...] = ()
    why: str = field(default="", compare=False)
    node: Node | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Axis:
    """A dim as its factors, none of size 1. source: the node that put several together."""

    factors: tuple[Factor, ...]
    source: Node | None = field(default=None, compare=False)

    @property
    def is_free(self) -> bool:
        """Whether it says nothing of the order of what lies along it."""
        return all(f.kind is Kind.FREE for f in self.factors)

    @property
    def single(self) -> Factor | None:
        """The only factor, if it has one."""
        return self.factors[0] if len(self.factors) == 1 else None

    @property
    def explained(self) -> Factor | None:
        """The first factor that says why it is no more."""
        return next((f for f in self.factors if f.why), None)

    @property
    def flattened_by(self) -> Node | None:
        """The node that flattened the axes of its grid, not one that put tokens beside them; else `source`."""
        single = self.single
        return single.node if single is not None and single.kind is Kind.JOINED else self.source


Layout = tuple[Axis, ...]
ONE = Axis(())
"""A dim of size 1."""


def axis_of(factor: Factor) -> Axis:
    """The dim that a factor alone makes."""
    return ONE if is_one(factor.size) else Axis((factor,))


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1: a symbolic one is not asked, as that would guard on it."""
    return isinstance(size, int) and size == 1


def same_size(x: Any, y: Any) -> bool:
    """Whether two sizes are provably equal, without a guard."""
    if isinstance(x, int) and isinstance(y, int):
        return x == y
    hints = [size if isinstance(size, int) else size.node.hint for size in (x, y)]
    if None not in hints and hints[0] != hints[1]:  # they differ already, for the sizes that the graph was traced with
        return False
    expressions = [size if isinstance(size, int) else size.node.expr for size in (x, y)]
    return bool(expressions[0] == expressions[1]) or bool(statically_known_true(x == y))


def whole_number(size: Any) -> int | None:
    """A size as an int, if it is known to be one."""
    if isinstance(size, int):
        return size
    found = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else None
    return None if found is None else int(found)


# ---- reshapes --------------------------------------------------------------------------------------------------------


def regrouped(factors: Sequence[Factor], sizes: Sequence[Any]) -> list[tuple[Factor, ...] | None]:
    """The factors of each of the dims, of `sizes`, that a reshape makes of some factors; None where it mixes them."""
    found: list[tuple[Factor, ...] | None] = []
    starts = [0]
    for stop in _meeting_places([f.size for f in factors], sizes):
        given, wanted = factors[starts[-1] : stop[0]], sizes[len(found) : stop[1]]
        groups = _dealt(list(given), wanted)
        found += groups if groups is not None else [() if is_one(size) else None for size in wanted]
        starts.append(stop[0])
    return [None if group is None else _merged(group) for group in found]


def _meeting_places(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[int, int]]:
    """How many sizes of each have the same product, at every place where they do; the last is all of both."""
    left, right = ([1, *accumulate(sizes, lambda x, y: x * y)] for sizes in (before, after))
    places, i = [], 0
    for j in range(1, len(right)):
        if j == len(right) - 1:
            places.append((len(before), j))
            break
        match = next((k for k in range(i, len(left)) if same_size(left[k], right[j])), None)
        if match is not None:
            places.append((match, j))
            i = match
    return places


def _dealt(factors: list[Factor], sizes: Sequence[Any]) -> list[tuple[Factor, ...]] | None:
    """Factors dealt out to dims of `sizes`, cut where a dim takes a part of one; None where they do not divide."""
    found = []
    for place, size in enumerate(sizes):
        group: list[Factor] = []
        while not is_one(size):
            if not factors:
                return None
            first = factors.pop(0)
            if same_size(first.size, size):
                group.append(first)
                break
            if (rest := _quotient(size, first.size, [f.size for f in factors])) is not None:
                group.append(first)
                size = rest
                continue
            rest = _quotient(first.size, size, sizes[place + 1 :])
            if rest is None or first.kind is Kind.JOINED:
                return None
            outer, inner = _cut(first, size, rest)
            group.append(outer)
            factors.insert(0, inner)
            break
        found.append(tuple(group))
    return None if factors else found


def _quotient(whole: Any, part: Any, others: Sequence[Any]) -> Any:
    """`whole` / `part`, where it is a known whole number above 1, or a product of the first few `others`."""
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if 0 < part < whole and whole % part == 0 else None
    products = accumulate(others, lambda x, y: x * y)
    return next((p for p in products if not is_one(p) and same_size(part * p, whole)), None)


def _cut(factor: Factor, outer: Any, inner: Any) -> tuple[Factor, Factor]:
    parts = []
    for is_outer, size in ((True, outer), (False, inner)):
        cuts = (*factor.cuts, (is_outer, str(outer)))
        parts.append(
            Factor(factor.origin, factor.kind, size, factor.along, cuts, factor, why=factor.why, node=factor.node)
        )
    return parts[0], parts[1]


def cut_evenly(factor: Factor, inner: int) -> tuple[Factor, Factor] | None:
    """A factor cut into pieces of `inner`; None where that leaves a rest, or may."""
    outer = factor.size // inner
    if factor.kind is Kind.JOINED or not same_size(outer * inner, factor.size):
        return None
    return _cut(factor, outer, inner)


def _merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Factors, with neighbours that were cut from one put together again."""
    found: list[Factor] = []
    for factor in factors:
        found.append(factor)
        while len(found) > 1 and are_halves(found[-2], found[-1]):
            found.pop()
            whole = found.pop().parent
            assert whole is not None
            found.append(whole)
    return tuple(found)


def are_halves(outer: Factor, inner: Factor) -> bool:
    """Whether two factors are the outer and the inner part of one."""
    if not outer.cuts or not inner.cuts or outer.parent != inner.parent:
        return False
    (is_outer, count), (is_other_outer, other) = outer.cuts[-1], inner.cuts[-1]
    return is_outer and not is_other_outer and count == other


# ---- what several tensors say of one dim -----------------------------------------------------------------------------


def agreed(axes: Sequence[Axis], node: Node, dim: int, size: Any) -> Axis:
    """What the operands of an elementwise op agree on for a dim of its output; free dims are not asked."""
    said = [axis for axis in axes if not axis.is_free]
    if not said:
        return next(iter(axes), other(node, dim, size, "it is made by the op itself"))
    first = next((axis for axis in said if is_placed(axis)), said[0])
    against = next((axis for axis in said if not _are_alike(first.factors, axis.factors)), None)
    if against is None:
        return first
    blamed = against.explained
    if not is_placed(first):
        return other(node, dim, size, blamed.why if blamed else "", blamed.node if blamed else None)
    why = f": {blamed.why}" if blamed else ""
    return other(node, dim, size, f"tokens of a grid meet others that are not proven to lie alike{why}", node)


def _are_alike(x: Sequence[Factor], y: Sequence[Factor]) -> bool:
    """Whether two dims have the same factors, or the same axes, of equal sizes, of two images."""
    return len(x) == len(y) and all(f == g or _is_alike(f, g) for f, g in zip(x, y, strict=True))


def _is_alike(f: Factor, g: Factor) -> bool:
    if f.kind is not g.kind or not same_size(f.size, g.size):
        return False
    if f.kind is Kind.JOINED:
        return (f.prefix, f.suffix) == (g.prefix, g.suffix) and _are_alike(f.inner, g.inner)
    sides = [[is_outer for is_outer, _ in factor.cuts] for factor in (f, g)]
    return f.kind is Kind.SPATIAL and f.along == g.along and sides[0] == sides[1]


def is_placed(axis: Axis) -> bool:
    """Whether anything along a dim has a place in an image."""
    return any(f.kind in (Kind.SPATIAL, Kind.JOINED) for f in axis.factors)


class JoinedGrid(NamedTuple):
    """How many tokens are before a grid and after it, and its spatial factors."""

    prefix: int
    suffix: int
    factors: tuple[Factor, ...]


def grid_of(axis: Axis) -> JoinedGrid | None:
    """A dim that is a grid of two or three axes and the tokens beside it; None for any other."""
    single = axis.single
    if single is not None and single.kind is Kind.JOINED:
        found = JoinedGrid(single.prefix, single.suffix, single.inner)
    else:
        found = JoinedGrid(0, 0, axis.factors)
    return found if _is_grid(found.factors) else None


def _is_grid(factors: Sequence[Factor]) -> bool:
    """Two or three different axes. Outer parts of one beside inner parts of another are no neighbourhood."""
    if len(factors) not in (2, 3) or any(f.kind is not Kind.SPATIAL for f in factors):
        return False
    sides = {is_outer for f in factors for is_outer, _ in f.cuts}
    return len({f.along for f in factors}) == len(factors) and len(sides) < 2


def with_patches(layout: Layout) -> Layout:
    """The layout, where it shows an image to be cut into patches: their places are spatial then.

    Dims of an argument, each cut in two, with the outer parts together as one dim, or two or three next to each
    other, and all the inner parts together in another, the features: (h, p), (w, p) become (h, w) and (.., p, p).
    """
    found = list(layout)
    for place, axis in enumerate(layout):
        factors = axis.factors
        if len(factors) not in (2, 3) or any(f.kind is not Kind.IMAGE or not f.cuts for f in factors):
            continue
        dims = [f.along for f in factors]
        one_image = len({f.origin[0] for f in factors}) == 1 and len(set(dims)) == len(dims)
        whole = one_image and all(len(f.cuts) == 1 for f in factors)
        if whole and any(_holds_halves(factors, rest) for at, rest in enumerate(layout) if at not in (0, place)):
            order = sorted(dims)
            spatial = tuple(
                Factor(f.origin, Kind.SPATIAL, f.size, order.index(f.along), f.cuts, f.parent) for f in factors
            )
            found[place] = Axis(spatial, axis.source)
    return tuple(found)


def _holds_halves(factors: Sequence[Factor], axis: Axis) -> bool:
    is_batch = any(g.kind is Kind.IMAGE and g.along == 0 for g in axis.factors)
    return not is_batch and all(any(are_halves(f, g) for g in axis.factors) for f in factors)


def other(node: Node, dim: int, size: Any, why: str, blamed: Node | None = None) -> Axis:
    """A dim of which nothing is known but why."""
    return axis_of(Factor((node, dim), Kind.OTHER, size, why=why, node=blamed or node))


def free(node: Node, dim: int, size: Any, why: str = "it is made of parameters alone") -> Axis:
    """A dim that says nothing."""
    return axis_of(Factor((node, dim), Kind.FREE, size, why=why, node=node))


def spatial(node: Node, dim: int, size: Any, along: int) -> Axis:
    """A spatial dim that begins at a node."""
    return axis_of(Factor((node, dim), Kind.SPATIAL, size, along))


def total(factors: Sequence[Factor]) -> Any:
    """How many places there are along a dim."""
    return math.prod(f.size for f in factors)
