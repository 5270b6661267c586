"""Factors of weights: the best ones there are, and exact where nothing has to be left out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monarch_compile.errors import InputError
from monarch_compile.linear.compression.factors import (
    Factors,
    Spectrum,
    blast_factors,
    grid_of,
    refitted,
    squared,
)
from monarch_compile.linear.compression.moments import blocks_of_moment
from monarch_compile.linear.compression.ranks import Curve, ranks_within

NUM_BLOCKS = st.integers(1, 4)
SIZE = st.integers(1, 5)
SEED = st.integers(0, 2**20)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(seed: int, size: int, rows: int) -> Tensor:
    """Of correlated inputs; singular where there are fewer rows than features."""
    x = drawn(seed, rows, size) @ drawn(seed + 1, size, size) + drawn(seed + 2, size)
    return x.mT @ x / rows


@settings(deadline=None, max_examples=60)
@given(NUM_BLOCKS, SIZE, SIZE, SEED)
def test_a_compressed_weight_expands_to_its_projection(num_blocks: int, p: int, q: int, seed: int) -> None:
    """Each block is the truncated singular value decomposition of its own, and full rank is the weight."""
    weight = drawn(seed, num_blocks * q, num_blocks * p)
    spectrum = Spectrum.of(weight, num_blocks)
    for rank in range(1, min(p, q) + 1):
        found = spectrum.factors(rank)
        for block, own in zip(
            grid_of(weight, num_blocks).flatten(0, 1), grid_of(found.weight, num_blocks).flatten(0, 1), strict=True
        ):
            left, values, right = torch.linalg.svd(block, full_matrices=False)
            torch.testing.assert_close(own, (left[:, :rank] * values[:rank]) @ right[:rank], rtol=0, atol=1e-6)
        lost = squared(weight - found.weight, None)
        assert abs(lost - float(spectrum.lost()[rank])) <= 1e-9 * squared(weight, None)
    torch.testing.assert_close(
        spectrum.factors(min(p, q)).weight, weight, rtol=0, atol=1e-12 * float(weight.abs().max())
    )


@settings(deadline=None, max_examples=100)
@given(NUM_BLOCKS, st.integers(2, 5), st.integers(2, 5), SEED, st.floats(1e-4, 3))
def test_no_other_factors_are_closer(num_blocks: int, p: int, q: int, seed: int, size: float) -> None:
    """The block SVD against random changes of its factors, in the Frobenius norm."""
    weight = drawn(seed, num_blocks * q, num_blocks * p)
    best = Spectrum.of(weight, num_blocks).factors(1)
    least = squared(weight - best.weight, None)
    for number in range(1, 6):
        changed = Factors(*(x + size * drawn(seed + 10 * number + i, *x.shape) for i, x in enumerate(best[:2])))
        assert squared(weight - changed.weight, None) >= least * (1 - 1e-12)


@settings(deadline=None, max_examples=60)
@given(NUM_BLOCKS, st.integers(2, 4), st.integers(2, 4), SEED, st.integers(1, 40))
def test_data_aware_factors_are_the_best_for_each_block_and_refitting_never_hurts(
    num_blocks: int, p: int, q: int, seed: int, rows: int
) -> None:
    weight = drawn(seed, num_blocks * q, num_blocks * p)
    moment = moment_of(seed + 1, num_blocks * p, rows)
    blocks = blocks_of_moment(moment, num_blocks, damping=0)
    spectrum = Spectrum.of(weight, num_blocks, blocks)
    found = spectrum.factors(1)

    def by_block(factors: Factors) -> float:
        error = grid_of(weight - factors.weight, num_blocks)
        return float(((error @ blocks) * error).sum())

    assert by_block(found) == pytest.approx(float(spectrum.lost()[1]), rel=1e-8, abs=1e-8 * float(spectrum.lost()[0]))
    plain = Spectrum.of(weight, num_blocks).factors(1)
    slack = 1e-9 * squared(weight, moment) + 1e-12
    assert by_block(found) <= by_block(plain) + slack
    before, after = (squared(weight - f.weight, moment) for f in (found, refitted(found, weight, moment)))
    assert after <= before + slack
    whole = spectrum.factors(min(p, q))
    torch.testing.assert_close(refitted(whole, weight, moment).weight, whole.weight, rtol=1e-6, atol=1e-6)


def test_refitting_uses_what_inputs_have_in_common() -> None:
    """Where all blocks of the input are the same, one factor could do the work of all."""
    same = drawn(0, 200, 4).repeat(1, 4)
    weight = drawn(1, 16, 16)
    moment = same.mT @ same / 200
    found = Spectrum.of(weight, 4, blocks_of_moment(moment, 4)).factors(1)
    before, after = (squared(weight - f.weight, moment) for f in (found, refitted(found, weight, moment)))
    assert after < 1e-6 * before  # 4 directions for 4 features


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(2, 4), st.integers(1, 4), SEED, st.booleans())
def test_blast_is_no_worse_than_plain_low_rank_and_never_gets_worse(
    num_blocks: int, p: int, q: int, rank: int, seed: int, is_weighed: bool
) -> None:
    weight = drawn(seed, num_blocks * q, num_blocks * p)
    moment = moment_of(seed + 1, num_blocks * p, 50) if is_weighed else None
    blocks = None if moment is None else blocks_of_moment(moment, num_blocks)

    def lost(iterations: int) -> float:
        error = grid_of(weight - blast_factors(weight, num_blocks, rank, iterations, blocks).weight, num_blocks)
        weighed = error if blocks is None else error @ blocks
        return float((weighed * error).sum())

    whole = squared(weight, moment) + 1e-30
    errors = [lost(iterations) for iterations in (1, 2, 5, 20)]
    assert all(after <= before + 1e-6 * whole for before, after in pairwise(errors))
    if moment is None:
        left = torch.linalg.svdvals(weight)[rank:]
        assert errors[0] <= float(left.square().sum()) + 1e-9 * whole


def test_blast_reaches_a_weight_that_is_one() -> None:
    u, s, v = drawn(0, 3, 4, 2), drawn(1, 3, 3, 2), drawn(2, 3, 2, 4)
    weight = Factors(v, u, s).weight
    found = blast_factors(weight, 3, 2, 300)
    plain = torch.linalg.svdvals(weight)[2:].square().sum()
    assert squared(weight - found.weight, None) < 0.05 * float(plain)


def test_blast_beyond_full_rank_is_exact() -> None:
    weight = drawn(3, 6, 6)
    assert squared(weight - blast_factors(weight, 2, 8, 3).weight, None) < 1e-16 * squared(weight, None)


@pytest.mark.parametrize("weight", [torch.zeros(6, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)])
def test_degenerate_weights(weight: Tensor) -> None:
    for factors in (Spectrum.of(weight, 2).factors(1), blast_factors(weight, 2, 2, 3)):
        assert all(bool(x.isfinite().all()) for x in factors if x is not None)
        assert squared(weight - factors.weight, None) <= squared(weight, None) + 1e-12


def curve(name: str, lost: list[float], each: int = 10, dense: int = 100, step: int = 2) -> Curve:
    return Curve(name, lost, step, each, dense)


def test_a_budget_goes_where_it_helps_most() -> None:
    flat = curve("flat", [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    steep = curve("steep", [1.0, 0.4, 0.1, 0.01, 0.0, 0.0])
    assert ranks_within([flat, steep], 0.3) == {"flat": 4 * 2, "steep": 2 * 2}
    assert ranks_within([flat, steep], 0.2) == {"flat": 2 * 2, "steep": 2 * 2}
    assert sum(ranks_within([flat, steep], 0.99).values()) == 2 * 10  # no more than there is
    with pytest.raises(InputError, match=r"below 0\.1000"):
        ranks_within([flat, steep], 0.05)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=5), min_size=1, max_size=3), st.floats(0.2, 0.9))
def test_no_other_ranks_within_the_budget_lose_less(falls: list[list[float]], budget: float) -> None:
    curves = []
    for number, steps in enumerate(falls):
        steps = sorted(steps, reverse=True)
        curves.append(curve(str(number), [sum(steps[i:]) for i in range(len(steps) + 1)], step=1))
    found = ranks_within(curves, budget)
    room = int(budget * (100 * len(curves)))

    def best(rest: list[Curve], left: int) -> float:
        if not rest:
            return 0.0
        return min(
            (rest[0].lost[i] + best(rest[1:], left - 10 * i)
             for i in range(1, rest[0].most + 1) if 10 * i + 10 * len(rest[1:]) <= left),
            default=float("inf"),
        )  # fmt: skip

    assert sum(10 * rank for rank in found.values()) <= room
    assert sum(c.lost[found[c.name]] for c in curves) == pytest.approx(best(curves, room))
