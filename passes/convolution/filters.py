"""One filter in the time domain for what a graph has as a sum of spectra."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from monarch_compile.passes.convolution.placing import placed
from monarch_compile.passes.convolution.region import ConvolutionRegion, FilterTerm, Part
from monarch_compile.passes.convolution.scales import Scale, scales_of
from monarch_compile.passes.convolution.sizes import Sizes
from monarch_compile.passes.graph import aten, dtype_of


def needs_all_points(part: Part) -> bool:
    """Whether a part's filter has all points of the transform: a sum of filters, or one that is reversed."""
    return len(part.terms) > 1 or part.terms[0].reversed


def is_plain(region: ConvolutionRegion, part: Part) -> bool:
    """Whether a part has one filter, which is taken as it is."""
    return not needs_all_points(part) and scales_of(region, part).result.power == 0


def filter_len_of(region: ConvolutionRegion, part: Part) -> Any:
    """The length of a part's filter as it is made."""
    return region.points if needs_all_points(part) else part.terms[0].operand.size(region.frame.axis)


def filter_dtype_of(region: ConvolutionRegion, part: Part) -> torch.dtype:
    """Its dtype."""
    dtypes = [_precise_dtype(region, term) for term in part.terms]
    own = dtype_of(part.terms[0].operand.node)
    if is_plain(region, part) and own is not None:
        return own
    return torch.float64 if torch.float64 in dtypes else region.dtype


def _precise_dtype(region: ConvolutionRegion, term: FilterTerm) -> torch.dtype:
    """float64 where a filter has it, else what the graph computes in."""
    return torch.float64 if dtype_of(term.operand.node) is torch.float64 else region.dtype


class FilterBuilder:
    """Makes filters of shape (channels, filter_len) where the graph inserts now."""

    def __init__(self, graph: Graph, region: ConvolutionRegion, sizes: Sizes) -> None:
        self._graph = graph
        self._region = region
        self._sizes = sizes

    def filter_of(self, part: Part, power: int) -> Node:
        """A part's filter, times sqrt(points) ** power, an even one, where that is no number."""
        if is_plain(self._region, part):
            return self._placed(part.terms[0])
        scales = scales_of(self._region, part).filters or (Scale(1.0, 0),) * len(part.terms)
        made = self._whole if needs_all_points(part) else self._precise
        terms = [self._scaled(made(term), scale) for term, scale in zip(part.terms, scales, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = self._call(aten.add.Tensor, total, term)
        return self._scaled(total, Scale(1.0, power))

    def _call(self, target: Any, *args: Any) -> Node:
        node: Node = self._graph.call_function(target, args)
        return node

    def _placed(self, term: FilterTerm) -> Node:
        frame, length = self._region.frame, term.operand.size(self._region.frame.axis)
        lead = [frame.sizes[place] for place in frame.channels]
        places = (*frame.channels, frame.axis)
        merged = (frame.num_channels, length)
        return placed(self._graph, term.operand, places, (*lead, length), merged, self._sizes)

    def _precise(self, term: FilterTerm) -> Node:
        """A filter, not rounded to less than the graph computes in."""
        h, dtype = self._placed(term), _precise_dtype(self._region, term)
        return h if dtype_of(term.operand.node) is dtype else self._call(aten.to.dtype, h, dtype)

    def _whole(self, term: FilterTerm) -> Node:
        """All points of a filter, padded with zeros or cut, and reversed in time where it is."""
        points, length = self._region.points, term.operand.size(self._region.frame.axis)
        h = self._precise(term)
        if str(points) != str(length):
            h = self._call(aten.constant_pad_nd.default, h, [0, self._difference(points, length)])
        if term.reversed:
            h = self._call(aten.roll.default, self._call(aten.flip.default, h, [-1]), [1], [-1])
        return h

    def _difference(self, one: Any, other: Any) -> Any:
        if isinstance(one, int) and isinstance(other, int):
            return one - other
        return self._call(operator.sub, self._sizes(one), self._sizes(other))

    def _scaled(self, h: Node, scale: Scale) -> Node:
        if scale.number != 1.0:
            h = self._call(aten.mul.Tensor, h, scale.number)
        for _ in range(abs(scale.power) // 2):
            target = aten.mul.Tensor if scale.power > 0 else aten.div.Tensor
            h = self._call(target, h, self._sizes(self._region.points))
        return h
