"""Which form each site of a plan takes: a small choice problem, independent of any model.

The metric's growth is taken to be additive over sites, `sum_i weight_i * error_i ** power`, with error_i the relative
error of site i's own output. That is a guide for the search only: a plan's metric is always measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monarch_compile.family import Form

LEVELS = 2000
"""Steps of the metric that a selection distinguishes."""


@dataclass(frozen=True)
class Candidate:
    """One form of one site: predicted seconds, and the relative error of the site's output. No form: exact."""

    form: Form | None
    seconds: float
    error: float


Assignment = dict[str, Candidate]


def pareto(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates that no other beats in both time and error, from the fastest to the most accurate."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.seconds, c.error)):
        if not kept or candidate.error < kept[-1].error:
            kept.append(candidate)
    return tuple(kept)


@dataclass(frozen=True)
class Growth:
    """How the metric is taken to grow with the sites' errors."""

    weights: Mapping[str, float]
    power: float

    def of(self, assignment: Mapping[str, Candidate]) -> float:
        """The metric that an assignment is expected to have."""
        return math.fsum(self.at(name, candidate) for name, candidate in assignment.items())

    def at(self, name: str, candidate: Candidate) -> float:
        """One site's part of it."""
        return self.weights[name] * candidate.error**self.power if candidate.error else 0.0


def fitted_power(fast: Sequence[float], accurate: Sequence[float], fast_metric: float, accurate_metric: float) -> float:
    """The power that explains two measured assignments, from their sites' errors; between 0.5 and 3, 1 if unknown."""
    errors = [math.fsum(e * e for e in side) for side in (fast, accurate)]
    if min(*errors, fast_metric, accurate_metric) <= 0 or errors[0] == errors[1]:
        return 1.0
    power = 2 * math.log(fast_metric / accurate_metric) / math.log(errors[0] / errors[1])
    return min(3.0, max(0.5, power))


def select(fronts: Mapping[str, Sequence[Candidate]], growth: Growth, target: float) -> Assignment:
    """For each site one candidate of its front: the least time with an expected metric of at most `target`.

    A multiple-choice knapsack by dynamic programming over `LEVELS` levels of the metric, each part rounded up: the
    target is kept, and the time is within that rounding of the least. Each front ends with the exact form, so that
    every target of at least 0 can be met.
    """
    fastest = {name: front[0] for name, front in fronts.items()}
    if growth.of(fastest) <= target:
        return fastest
    levels = {name: [_level(growth.at(name, c), target) for c in front] for name, front in fronts.items()}
    least = np.zeros(LEVELS + 1)  # least[n]: the least time of the sites so far with a metric of at most n levels
    choices = []
    for name, front in fronts.items():
        times = np.stack([_spent(least, level) + c.seconds for c, level in zip(front, levels[name], strict=True)])
        choices.append(times.argmin(0))
        least = times.min(0)
    left, chosen = LEVELS, {}
    for (name, front), choice in reversed(list(zip(fronts.items(), choices, strict=True))):
        place = int(choice[left])
        chosen[name] = front[place]
        left -= int(levels[name][place])
    return {name: chosen[name] for name in fronts}


def _level(part: float, target: float) -> int:
    """A part of the metric in levels of the target, rounded up; beyond all levels where it cannot fit."""
    if part == 0:
        return 0
    return LEVELS + 1 if part > target else math.ceil(part / target * LEVELS)


def _spent(least: NDArray[np.float64], level: int) -> NDArray[np.float64]:
    """The least times with `level` levels set aside; inf where there are not as many."""
    shifted = np.full_like(least, math.inf)
    if level <= LEVELS:
        shifted[level:] = least[: len(least) - level]
    return shifted
