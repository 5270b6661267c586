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
    damped,
    fitter,
    grid_of,
    squared,
    swept,
)
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
@given(NUM_BLOCKS, st.integers(2, 4), st.integers(2, 4), SEED, st.integers(1, 40), st.integers(0, 3))
def test_data_aware_factors_are_the_best_for_each_block_and_sweeps_never_hurt(
    num_blocks: int, p: int, q: int, seed: int, rows: int, sweeps: int
) -> None:
    weight = drawn(seed, num_blocks * q, num_blocks * p)
    moment = damped(moment_of(seed + 1, num_blocks * p, rows))
    spectrum = Spectrum.of(weight, num_blocks, moment)
    found = spectrum.factors(1)
    blocks = damped(moment).reshape(num_blocks, p, num_blocks, p).diagonal(dim1=0, dim2=2).permute(2, 0, 1)

    def by_block(factors: Factors) -> float:
        error = grid_of(weight - factors.weight, num_blocks)
        return float(((error @ blocks) * error).sum())

    assert by_block(found) == pytest.approx(float(spectrum.lost()[1]), rel=1e-7, abs=1e-7 * float(spectrum.lost()[0]))
    plain = Spectrum.of(weight, num_blocks).factors(1)
    slack = 1e-5 * squared(weight, moment) + 1e-12
    assert by_block(found) <= by_block(plain) + slack
    once = swept(found, weight, moment, sweeps)
    again = swept(once, weight, moment, 1)
    errors = [squared(weight - factors.weight, moment) for factors in (found, once, again)]
    assert all(after <= before + slack for before, after in pairwise(errors))


def test_sweeps_use_what_blocks_of_the_input_have_in_common() -> None:
    """Where all blocks of the input are the same, the ranks of all blocks of a row add up: 4 of 1 for 4 features."""
    same = drawn(0, 200, 4).repeat(1, 4)
    weight = drawn(1, 16, 16)
    moment = same.mT @ same / 200
    found = Spectrum.of(weight, 4, moment).factors(1)
    before, after = (squared(weight - f.weight, moment) for f in (found, swept(found, weight, moment)))
    assert after < 1e-4 * before


def test_no_single_block_of_swept_factors_can_be_improved() -> None:
    """At a fixed point, each block is the best one beside all others: random changes of a block are worse."""
    weight, moment = drawn(2, 6, 6), damped(moment_of(3, 6, 30))
    found = swept(Spectrum.of(weight, 2, moment).factors(1), weight, moment, 300)
    least = squared(weight - found.weight, moment)
    for number in range(20):
        first, second = found.first.clone(), found.second.clone()
        at = (number % 2, number // 2 % 2)
        first[at] += 0.1 * drawn(100 + number, 1, 3)
        second[at[1], :, at[0]] += 0.1 * drawn(200 + number, 3, 1)
        assert squared(weight - Factors(first, second).weight, moment) >= least * (1 - 1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(2, 4), st.integers(1, 4), SEED, st.booleans())
def test_blast_is_no_worse_than_plain_low_rank_and_never_gets_worse(
    num_blocks: int, p: int, q: int, rank: int, seed: int, is_weighed: bool
) -> None:
    """Than the plain one under the same second moment."""
    weight = drawn(seed, num_blocks * q, num_blocks * p)
    moment = damped(moment_of(seed + 1, num_blocks * p, 50)) if is_weighed else None
    root = torch.eye(num_blocks * p, dtype=torch.float64) if moment is None else torch.linalg.cholesky(moment)

    def lost(iterations: int) -> float:
        return squared(weight - blast_factors(weight, num_blocks, rank, iterations, moment).weight, moment)

    whole = squared(weight, moment)
    errors = [lost(n) for n in (1, 2, 5)]
    assert all(after <= before + 1e-5 * whole for before, after in pairwise(errors))
    left = torch.linalg.svdvals(weight @ root)[rank:]
    assert errors[0] <= float(left.square().sum()) + 1e-5 * whole


@pytest.mark.parametrize("kind", ["monarch", "blast"])
@pytest.mark.parametrize("is_weighed", [False, True])
def test_a_fitter_gives_less_error_for_more_rank_and_none_for_all(kind: str, is_weighed: bool) -> None:
    weight = drawn(4, 8, 12)
    moment = moment_of(5, 12, 60) if is_weighed else None
    fit = fitter(kind, weight, moment, 2, 5)
    errors = [squared(weight - fit(rank).weight, moment) / squared(weight, moment) for rank in (2, 4, 6, 8)]
    assert all(after < before for before, after in pairwise(errors))
    assert errors[-1] < 1e-10


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


def test_layers_get_the_same_share_but_for_what_they_have_no_use_for() -> None:
    flat = curve("flat", [1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    steep = curve("steep", [1.0, 0.4, 0.0, 0.0, 0.0, 0.0])
    assert ranks_within([flat, steep], 0.2) == {"flat": 2 * 2, "steep": 2 * 2}
    assert ranks_within([flat, steep], 0.3) == {"flat": 4 * 2, "steep": 2 * 2}
    assert sum(ranks_within([flat, steep], 0.99).values()) == 2 * 7  # no more than there is
    with pytest.raises(InputError, match=r"below 0\.1000"):
        ranks_within([flat, steep], 0.05)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=5), min_size=1, max_size=3), st.floats(0.2, 0.9))
def test_no_layer_gets_less_than_its_share_and_all_together_no_more_than_there_is(
    falls: list[list[float]], budget: float
) -> None:
    curves = []
    for number, steps in enumerate(falls):
        steps = sorted(steps, reverse=True)
        curves.append(curve(str(number), [sum(steps[i:]) for i in range(len(steps) + 1)], step=1))
    found = ranks_within(curves, budget)
    assert sum(10 * rank for rank in found.values()) <= int(budget * (100 * len(curves)))
    for own in curves:
        rank = found[own.name]
        assert rank == own.most or rank >= int(budget * 10) or own.lost[rank] <= 1e-12 * own.lost[0]
