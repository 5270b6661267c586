"""Which of two transforms is the filter's, and how the dims of their product become (batch, channels, length)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.passes.convolution.inputs import before_casts
from monarch_compile.passes.convolution.region import FilterTerm, Frame, Operand, Part
from monarch_compile.passes.convolution.spectra import Factor, Spectrum, Term
from monarch_compile.passes.graph import dtype_of, shape_of, value_of
from monarch_compile.passes.weights import is_computed
from monarch_compile.refusal import Refused

MOST_DIMS = 5

Key = tuple[Node, tuple[int | None, ...]]


@dataclass(frozen=True)
class Roles:
    """The input of a convolution, and the convolutions that its transform is a factor of."""

    u: Operand
    parts: tuple[Part, ...]
    frame: Frame


def roles_of(spectrum: Spectrum, node: Node) -> Roles:
    """Read a sum of products of transforms, `node`, as convolutions of one input with filters.

    Raises:
        Refused: it is none, or no filter is shared by a batch.
    """
    if any(len(term.factors) != 2 for term in spectrum.terms):
        raise Refused("spectrum_op", "a transform is added to a product of transforms", node)
    rank = len(shape_of(node))
    if rank > MOST_DIMS:
        raise Refused(
            "convolution_layout", f"the product of the transforms has {rank} dims, more than {MOST_DIMS}", node
        )
    common = set.intersection(*({_key(factor) for factor in term.factors} for term in spectrum.terms))
    if not common:
        raise Refused("several_inputs", "transforms of different inputs are multiplied, and the products added", node)
    u = _input(common, spectrum, node)
    parts = _parts(spectrum.terms, u)
    operands = [term.operand for part in parts for term in part.terms]
    frame = _frame(Operand(*u), operands, spectrum.axis, shape_of(node), node)
    _require_views(Operand(*u), frame, node)
    return Roles(Operand(*u), parts, frame)


def _key(factor: Factor) -> Key:
    return factor.source, factor.dims


def _varying(operand: Operand, axis: int) -> frozenset[int]:
    """The dims of the product, but for the transformed one, along which an operand differs."""
    return frozenset(place for place in range(len(operand.dims)) if place != axis and operand.varies(place))


def _input(common: Iterable[Key], spectrum: Spectrum, node: Node) -> Key:
    """The factor that is in every term and is no filter: it differs where the others do, and along a batch."""
    first = spectrum.terms[0].factors
    found = [_key(factor) for factor in first if _key(factor) in common]
    if len(found) == 1:
        return found[0]
    one, other = (_varying(Operand(*key), spectrum.axis) for key in found)
    if one == other:
        return max(found, key=lambda key: _looks_like_input(key[0]))
    alone = min((*(one - other), *(other - one)))
    return found[0] if alone in one else found[1]


def _looks_like_input(source: Node) -> tuple[Any, ...]:
    """What tells the input from the filter where both have the same dims: a batch of 1, data, a dtype of fewer bits."""
    dtype = dtype_of(before_casts(source))
    return len(shape_of(source)), is_computed(source), 0 if dtype is None else -dtype.itemsize


def _parts(terms: Iterable[Term], u: Key) -> tuple[Part, ...]:
    """The terms in which the input is not conjugated, and those in which it is: these are reversed in time."""
    found: dict[bool, list[FilterTerm]] = {False: [], True: []}
    for term in terms:
        place = next(i for i, factor in enumerate(term.factors) if _key(factor) == u)
        own, other = term.factors[place], term.factors[1 - place]
        turned = other.conjugated != own.conjugated
        found[own.conjugated].append(FilterTerm(Operand(*_key(other)), term.number, term.power, turned))
    return tuple(Part(is_reversed, tuple(filters)) for is_reversed, filters in found.items() if filters)


def _frame(u: Operand, filters: Sequence[Operand], axis: int, sizes: tuple[Any, ...], node: Node) -> Frame:
    own = _varying(u, axis)
    channels = frozenset().union(*(_varying(operand, axis) for operand in filters))
    others = [place for place in range(len(sizes)) if place != axis]
    shared = [place for place in others if place not in channels]
    if len(own & channels) > 1 and not own - channels and not _has_batch(u, filters):
        raise Refused("filter_per_sequence", "every sequence has a filter of its own", node)
    return Frame(sizes, axis, tuple(shared), tuple(place for place in others if place in channels))


def _has_batch(u: Operand, filters: Iterable[Operand]) -> bool:
    """Whether the input has a dim that no filter has, be it of size 1."""
    return any(
        own is not None and all(one is None for one in others)
        for own, *others in zip(u.dims, *(operand.dims for operand in filters), strict=True)
    )


def _require_views(u: Operand, frame: Frame, node: Node) -> None:
    """Refuse where the input cannot be seen as (batch, channels, length) without a copy; symbolic ones are copied."""
    value = value_of(u.node)
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride(), *frame.sizes)):
        return
    for places in (frame.batch, frame.channels):
        merged = [place for place in places if u.varies(place)]
        if len(merged) < len([place for place in places if frame.sizes[place] != 1]):
            continue  # what is repeated along a dim is copied anyhow
        dims = [dim for place in merged if (dim := u.dims[place]) is not None]
        if not _merges(value, dims):
            why = f"dims {dims} of the input cannot be merged without a copy"
            raise Refused("convolution_layout", why, node)


def _merges(value: torch.Tensor, dims: list[int]) -> bool:
    """Whether dims, in this order, are one dim of some stride."""
    steps = [(value.shape[dim], value.stride(dim)) for dim in dims]
    return all(stride == size * after for (_, stride), (size, after) in pairwise(steps))
