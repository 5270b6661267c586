"""What rank each layer gets under a budget for all of them."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from monarch_compile.errors import InputError

NOTHING = 1e-12
"""A share of a squared norm that is rounding."""


@dataclass(frozen=True)
class Curve:
    """A layer's error by rank.

    lost: share of the squared norm that is lost with rank step * i, at place i, convex and falling. step: ranks are
    multiples of it. each: parameters of each step. dense: those of the dense weight.
    """

    name: str
    lost: Sequence[float]
    step: int
    each: int
    dense: int

    @property
    def most(self) -> int:
        """The most steps that help and keep the factors smaller than the dense weight; at least 1."""
        enough = next((i for i, x in enumerate(self.lost) if x <= NOTHING * self.lost[0]), len(self.lost) - 1)
        return max(1, min(enough, (self.dense - 1) // self.each))


def ranks_within(curves: Sequence[Curve], budget: float) -> Mapping[str, int]:
    """The rank of each layer under a budget for all: the same share of its parameters for each; what is left, and what
    a layer has no use for, goes where it helps most.

    Ranks with which the lost shares, summed over layers, are least were tried: layers that lose little by themselves
    then get very little, and the error of whole models is larger. budget: share of all parameters.

    Raises:
        InputError: the budget is less than the least rank of every layer takes.
    """
    room = int(budget * sum(curve.dense for curve in curves))
    least = sum(curve.each for curve in curves)
    if least > room:
        share = least / sum(curve.dense for curve in curves)
        raise InputError(f"budget={budget} is below {share:.4f}, which the least rank of every layer takes")
    steps = {curve.name: min(int(budget * curve.dense) // curve.each, curve.most) for curve in curves}
    if min(steps.values()) < 1:  # a layer so small that its share is no rank
        steps = dict.fromkeys(steps, 1)
    room -= sum(steps[curve.name] * curve.each for curve in curves)

    def gain(curve: Curve, at: int) -> float:
        return (curve.lost[at] - curve.lost[at + 1]) / curve.each

    queue = [(-gain(c, steps[c.name]), place) for place, c in enumerate(curves) if steps[c.name] < c.most]
    heapq.heapify(queue)
    while queue:
        _, place = heapq.heappop(queue)
        curve = curves[place]
        if curve.each > room:
            continue
        room -= curve.each
        steps[curve.name] += 1
        if steps[curve.name] < curve.most:
            heapq.heappush(queue, (-gain(curve, steps[curve.name]), place))
    return {curve.name: steps[curve.name] * curve.step for curve in curves}
