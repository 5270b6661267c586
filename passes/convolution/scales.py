"""Scales of a convolution: of its spectra, of its filters and of its result, as one number where they can be."""

from __future__ import annotations

from typing import Any, NamedTuple

from monarch_compile.passes.convolution.region import ConvolutionRegion, Part


class Scale(NamedTuple):
    """number * sqrt(points) ** power."""

    number: float
    power: int

    def at(self, points: Any) -> Scale:
        """As a number alone where `points` is one."""
        if self.power == 0 or not isinstance(points, int):
            return self
        whole, odd = divmod(self.power, 2)
        return Scale(self.number * float(points) ** whole * float(points) ** (odd / 2), 0)


class Scales(NamedTuple):
    """result: of the convolution; filters: of each filter of a part, or None where each is 1."""

    result: Scale
    filters: tuple[Scale, ...] | None


def scales_of(region: ConvolutionRegion, part: Part) -> Scales:
    """What filters share is a scale of the result."""
    ending = region.ending
    own = [Scale(term.number, term.power) for term in part.terms]
    if len(set(own)) == 1:
        number, power = own[0]
        return Scales(Scale(ending.number * number, ending.power + power).at(region.points), None)
    filters = tuple(scale.at(region.points) for scale in own)
    return Scales(Scale(ending.number, ending.power).at(region.points), filters)


def all_scales(region: ConvolutionRegion) -> list[Scale]:
    """Every scale of a region."""
    found = []
    for part in region.parts:
        result, filters = scales_of(region, part)
        found += [result, *(filters or ())]
    return found
