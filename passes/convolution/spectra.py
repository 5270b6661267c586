"""The frequency domain of a graph, read as sums of products of transforms of real tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.convolution.transforms import (
    FORWARD,
    is_complex,
    is_forward,
    is_inverse,
    is_same,
    number_of,
)
from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.graph import arg, aten, inputs, normal_dim, shape_of, value_of
from monarch_compile.passes.views import source_dims
from monarch_compile.refusal import Refused

Dims = tuple[int | None, ...]
"""For each dim of a tensor, the dim of another that it is; None where that is broadcast."""

MOST_TERMS = 8


@dataclass(frozen=True)
class Factor:
    """The transform of the real tensor `source` as it lies in a complex one of dims `dims`."""

    source: Node
    dims: Dims
    conjugated: bool = False


@dataclass(frozen=True)
class Term:
    """The product of factors with number * sqrt(points) ** power."""

    number: float
    power: int
    factors: tuple[Factor, ...]

    def times(self, number: float, power: int = 0) -> Term:
        return replace(self, number=self.number * number, power=self.power + power)


@dataclass(frozen=True)
class Spectrum:
    """A complex tensor: a sum of terms, over the frequencies of `points` points along dim `axis`.

    half: only the first points // 2 + 1 frequencies are there.
    """

    axis: int
    points: Any
    half: bool
    terms: tuple[Term, ...]

    @property
    def is_whole(self) -> bool:
        """Whether all frequencies are there."""
        return not self.half or (isinstance(self.points, int) and self.points <= 2)

    def moved(self, places: Dims, axis: int) -> Spectrum:
        """As a tensor whose dim i is this one's dim places[i], or broadcast where that is None."""

        def placed(factor: Factor) -> Factor:
            return replace(factor, dims=tuple(None if i is None else factor.dims[i] for i in places))

        terms = tuple(replace(term, factors=tuple(map(placed, term.factors))) for term in self.terms)
        return replace(self, axis=axis, terms=terms)

    def times(self, number: float, power: int = 0) -> Spectrum:
        """Multiplied by number * sqrt(points) ** power."""
        return replace(self, terms=tuple(term.times(number, power) for term in self.terms))


class Reader:
    """Reads complex nodes.

    read: what was read, by node: those that disappear where all is lowered that reads them.
    """

    def __init__(self) -> None:
        self.read: dict[Node, Spectrum] = {}

    def __call__(self, node: Node) -> Spectrum:
        """What a node is.

        Raises:
            Refused: it is no sum of products of transforms of real tensors along one dim, or in an unknown spelling.
        """
        if node not in self.read:
            rule = _forward if is_forward(node) else RULES.get(node.target)
            if rule is None:
                raise _unknown(node)
            self.read[node] = rule(node, self)
        return self.read[node]


def transforms_above(node: Node) -> frozenset[Node]:
    """The forward transforms that a node is made of by ops on complex tensors and on their parts, not by inverses."""
    found, pending, seen = set(), [node], {node}
    while pending:
        current = pending.pop()
        if is_forward(current):
            found.add(current)
            continue
        if is_inverse(current):
            continue
        above = [x for x in current.all_input_nodes if x not in seen and _leads_up(x)]
        seen.update(above)
        pending += above
    return frozenset(found)


def _leads_up(node: Node) -> bool:
    """Whether a complex tensor may be made of a node by way of it: a complex one, its parts, or several of them."""
    return is_complex(node) or node.target in BY_PARTS or isinstance(value_of(node), (tuple, list))


BY_PARTS = frozenset(
    {
        aten.real.default,
        aten.imag.default,
        aten.view_as_real.default,
        aten.select.int,
        aten.mul.Tensor,
        aten.sub.Tensor,
        aten.add.Tensor,
        aten.stack.default,
    }
)
"""What complex products are written with where they are written with real numbers."""


def _unknown(node: Node) -> Refused:
    if not transforms_above(node):
        return Refused("learned_spectrum", f"{node.name} is no transform of a filter, but a spectrum itself", node)
    return Refused("spectrum_op", f"{node.name} in the frequency domain is not understood", node)


def _forward(node: Node, read: Reader) -> Spectrum:
    transform = FORWARD[node.target](node)
    source = transform.source
    while is_complex(source) and source.target in CASTS_TO_COMPLEX:
        source = inputs(source)[0]
    if is_complex(source):
        raise Refused("complex_signal", f"{node.name} is the transform of a complex tensor", node)
    factor = Factor(source, tuple(range(len(shape_of(source)))))
    return Spectrum(transform.axis, transform.points, transform.half, (Term(1.0, transform.power, (factor,)),))


CASTS_TO_COMPLEX = frozenset({aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout})


def _aligned(spectrum: Spectrum, node: Node, rank: int) -> Spectrum:
    """As broadcast to a result of `rank` dims."""
    own = len(shape_of(node))
    places = (*[None] * (rank - own), *range(own))
    return spectrum.moved(places, spectrum.axis + rank - own)


def _alike(node: Node, one: Spectrum, other: Spectrum) -> bool:
    """Whether both lie along one dim with the same points, which is required; returns whether either is half."""
    if one.axis != other.axis or not is_same(one.points, other.points):
        why = f"transforms of {one.points} and {other.points} points, or along different dims, meet"
        raise Refused("transform_points", why, node)
    return one.half or other.half


def _product(node: Node, one: Spectrum, other: Spectrum) -> Spectrum:
    half = _alike(node, one, other)
    terms = tuple(
        Term(a.number * b.number, a.power + b.power, (*a.factors, *b.factors))
        for a, b in product(one.terms, other.terms)
    )
    if len(terms) > MOST_TERMS or any(len(term.factors) > 2 for term in terms):
        raise Refused("several_factors", "more than two transforms are multiplied", node)
    return Spectrum(one.axis, one.points, half, terms)


def _scaled(node: Node, spectrum: Spectrum, factor: Any, sign: int) -> Spectrum:
    """Times a number (sign 1), or divided by it (-1)."""
    size = number_of(factor)
    if isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) and is_same(size, spectrum.points):
        return spectrum.times(1.0, 2 * sign)
    number = constant_of(factor)
    if number is None or (sign < 0 and number == 0):
        raise Refused("scale_not_constant", f"{node.name} scales a spectrum by what is no constant", node)
    return spectrum.times(number if sign > 0 else 1 / number)


def _mul(node: Node, read: Reader) -> Spectrum:
    one, other = inputs(node)[:2]
    if not is_complex(one):
        one, other = other, one
    if not is_complex(one):
        raise _unknown(node)
    if is_complex(other):
        first, second = read(one), read(other)
        rank = len(shape_of(node))
        return _product(node, _aligned(first, one, rank), _aligned(second, other, rank))
    spectrum = read(one)
    if isinstance(other, Node) and constant_of(other) is None and shape_of(other) not in ((), (1,)):
        raise Refused("learned_spectrum", "a spectrum is multiplied by a real tensor that is no constant", node)
    return _aligned(_scaled(node, spectrum, other, 1), one, len(shape_of(node)))


def _div(node: Node, read: Reader) -> Spectrum:
    one, other = inputs(node)[:2]
    if not is_complex(one) or is_complex(other) or node.kwargs:
        raise _unknown(node)
    return _aligned(_scaled(node, read(one), other, -1), one, len(shape_of(node)))


def _add(node: Node, read: Reader) -> Spectrum:
    one, other = inputs(node)[:2]
    alpha = constant_of(arg(node, 2, "alpha", 1))
    if not is_complex(one) or not is_complex(other) or alpha is None:
        raise _unknown(node)
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    rank = len(shape_of(node))
    first, second = _aligned(read(one), one, rank), _aligned(read(other), other, rank).times(sign * alpha)
    half = _alike(node, first, second)
    terms = (*first.terms, *second.terms)
    if len(terms) > MOST_TERMS:
        raise Refused("several_factors", f"more than {MOST_TERMS} transforms are added", node)
    return Spectrum(first.axis, first.points, half, terms)


def _conj(node: Node, read: Reader) -> Spectrum:
    spectrum = read(inputs(node)[0])

    def turned(term: Term) -> Term:
        return replace(term, factors=tuple(replace(f, conjugated=not f.conjugated) for f in term.factors))

    return replace(spectrum, terms=tuple(map(turned, spectrum.terms)))


def _same(node: Node, read: Reader) -> Spectrum:
    return read(inputs(node)[0])


def _cast(node: Node, read: Reader) -> Spectrum:
    if not is_complex(node):
        raise _unknown(node)
    return read(inputs(node)[0])


def _from_parts(node: Node, read: Reader) -> Spectrum:
    parts = inputs(node)[0]
    if parts.target is not aten.view_as_real.default:
        raise _unknown(node)
    read.read[parts] = read(inputs(parts)[0])
    return read.read[parts]


def _transposed(node: Node, read: Reader) -> Spectrum:
    spectrum, order = read(inputs(node)[0]), source_dims(node)
    return spectrum.moved(tuple(order), order.index(spectrum.axis))


def _unsqueezed(node: Node, read: Reader) -> Spectrum:
    spectrum, rank = read(inputs(node)[0]), len(shape_of(node))
    place = normal_dim(inputs(node)[1], rank)
    old = [*range(rank - 1)]
    places = (*old[:place], None, *old[place:])
    return spectrum.moved(places, places.index(spectrum.axis))


def _expanded(node: Node, read: Reader) -> Spectrum:
    """`expand`; what it repeats along the frequencies is no spectrum."""
    source = inputs(node)[0]
    spectrum = _aligned(read(source), source, len(shape_of(node)))
    if not is_same(shape_of(node)[spectrum.axis], shape_of(source)[read(source).axis]):
        raise _unknown(node)
    return spectrum


def _reshaped(node: Node, read: Reader) -> Spectrum:
    """`reshape` and `squeeze`, where dims of size 1 come or go, and nothing else changes."""
    source = inputs(node)[0]
    spectrum = read(source)
    old = [i for i, size in enumerate(shape_of(source)) if not _is_one(size) or i == spectrum.axis]
    new = [i for i, size in enumerate(shape_of(node)) if not _is_one(size)]
    if _is_one(shape_of(source)[spectrum.axis]):
        raise _unknown(node)
    if [str(shape_of(source)[i]) for i in old] != [str(shape_of(node)[i]) for i in new]:
        raise _unknown(node)
    place = dict(zip(new, old, strict=True))
    places = tuple(place.get(i) for i in range(len(shape_of(node))))
    return spectrum.moved(places, places.index(spectrum.axis))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _sliced(node: Node, read: Reader) -> Spectrum:
    """The first half of the frequencies, or all of a dim."""
    source = inputs(node)[0]
    spectrum = read(source)
    dim = normal_dim(arg(node, 1, "dim", 0), len(shape_of(source)))
    own, kept = shape_of(source)[dim], shape_of(node)[dim]
    if is_same(own, kept) and arg(node, 4, "step", 1) == 1:
        return spectrum
    is_first = arg(node, 2, "start") in (None, 0) and arg(node, 4, "step", 1) == 1
    if dim == spectrum.axis and is_first and not spectrum.half and is_same(kept, spectrum.points // 2 + 1):
        return replace(spectrum, half=True)
    raise Refused("spectrum_op", f"{node.name} takes a part of a spectrum", node)


def _narrowed(node: Node, read: Reader) -> Spectrum:
    source = inputs(node)[0]
    spectrum, dim = read(source), normal_dim(inputs(node)[1], len(shape_of(source)))
    is_first = dim == spectrum.axis and inputs(node)[2] == 0 and not spectrum.half
    if is_first and is_same(shape_of(node)[dim], spectrum.points // 2 + 1):
        return replace(spectrum, half=True)
    raise Refused("spectrum_op", f"{node.name} takes a part of a spectrum", node)


def _einsum(node: Node, read: Reader) -> Spectrum:
    """A product that sums over nothing."""
    named, out = einsum_letters(node)
    if len(named) != 2 or not all(is_complex(x) for x, _ in named):
        raise _unknown(node)
    placed = []
    for x, letters in named:
        spectrum = read(x)
        summed = [c for c in letters if c not in out and not _is_one(shape_of(x)[letters.index(c)])]
        if summed:
            raise Refused("channels_mixed", f"{node.name} sums over dim {summed[0]!r} of {inputs(node)[0]!r}", node)
        if letters[spectrum.axis] not in out:
            raise _unknown(node)
        places = tuple(letters.index(c) if c in letters else None for c in out)
        placed.append(spectrum.moved(places, out.index(letters[spectrum.axis])))
    return _product(node, *placed)


def _mixed(node: Node, read: Reader) -> Spectrum:
    raise Refused("channels_mixed", f"{node.target} sums over channels in the frequency domain", node)


Rule = Callable[[Node, Reader], Spectrum]

RULES: dict[Any, Rule] = {
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.neg.default: lambda node, read: read(inputs(node)[0]).times(-1.0),
    aten._conj.default: _conj,
    aten.conj.default: _conj,
    aten.conj_physical.default: _conj,
    aten._conj_physical.default: _conj,
    aten.resolve_conj.default: _same,
    aten.resolve_neg.default: _same,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    aten.to.dtype: _cast,
    aten._to_copy.default: _cast,
    aten.to.dtype_layout: _cast,
    aten.view_as_complex.default: _from_parts,
    aten.transpose.int: _transposed,
    aten.swapaxes.default: _transposed,
    aten.swapdims.default: _transposed,
    aten.permute.default: _transposed,
    aten.t.default: _transposed,
    aten.mT.default: _transposed,
    aten.movedim.int: _transposed,
    aten.movedim.intlist: _transposed,
    aten.unsqueeze.default: _unsqueezed,
    aten.expand.default: _expanded,
    aten.reshape.default: _reshaped,
    aten.view.default: _reshaped,
    aten.squeeze.default: _reshaped,
    aten.squeeze.dim: _reshaped,
    aten.slice.Tensor: _sliced,
    aten.narrow.default: _narrowed,
    aten.einsum.default: _einsum,
    aten.sum.default: _mixed,
    aten.sum.dim_IntList: _mixed,
    aten.mean.dim: _mixed,
    aten.matmul.default: _mixed,
    aten.bmm.default: _mixed,
    aten.mm.default: _mixed,
}
"""Ops on complex tensors, and how they are read."""
