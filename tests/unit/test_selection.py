"""The choice of forms: fronts, fitted growth and the greedy selection, apart from any model."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monarch_compile.attention.form import Form
from monarch_compile.calibration.selection import LEVELS, Candidate, Growth, fitted_power, pareto, select

FORM = Form(8)
errors = st.floats(0.01, 1.0)
candidates = st.lists(st.builds(Candidate, st.just(FORM), st.floats(0.1, 5.0), errors), min_size=1, max_size=6)
EXACT = Candidate(None, 10.0, 0.0)


@given(candidates)
def test_a_front_holds_what_no_other_candidate_beats(found):
    front = pareto(found)
    assert [c.seconds for c in front] == sorted(c.seconds for c in front)
    assert all(a.error > b.error for a, b in itertools.pairwise(front))
    for candidate in found:
        assert any(c.seconds <= candidate.seconds and c.error <= candidate.error for c in front)


@given(st.lists(st.tuples(candidates, st.floats(0.0, 2.0)), min_size=1, max_size=4), st.floats(0.0, 3.0))
def test_a_selection_meets_its_target_and_changes_nothing_without_need(sites, target):
    fronts = {str(i): (*pareto(found), EXACT) for i, (found, _) in enumerate(sites)}
    growth = Growth({str(i): weight for i, (_, weight) in enumerate(sites)}, 2.0)
    chosen = select(fronts, growth, target)
    assert growth.of(chosen) <= target
    assert all(chosen[name] in front for name, front in fronts.items())
    fastest = {name: front[0] for name, front in fronts.items()}
    if growth.of(fastest) <= target:
        assert chosen == fastest


@given(st.lists(st.tuples(candidates, st.floats(0.1, 2.0)), min_size=1, max_size=3), st.floats(0.01, 3.0))
def test_a_selection_is_as_fast_as_any_that_keeps_a_little_less_than_the_target(sites, target):
    fronts = {str(i): (*pareto(found), EXACT) for i, (found, _) in enumerate(sites)}
    growth = Growth({str(i): weight for i, (_, weight) in enumerate(sites)}, 1.0)
    chosen = select(fronts, growth, target)
    for choice in itertools.product(*fronts.values()):
        other = dict(zip(fronts, choice, strict=True))
        if growth.of(other) <= target * (1 - len(sites) / LEVELS):
            assert sum(c.seconds for c in chosen.values()) <= sum(c.seconds for c in other.values()) + 1e-9


def test_a_selection_spends_time_where_it_helps_most():
    front = (Candidate(FORM, 1.0, 0.1), EXACT)
    chosen = select({"harmless": front, "harmful": front}, Growth({"harmless": 1.0, "harmful": 9.0}, 1.0), 0.15)
    assert chosen == {"harmless": front[0], "harmful": EXACT}


@pytest.mark.parametrize("power", [0.7, 1.0, 2.0])
def test_the_power_is_found_again(power):
    fast, accurate = [0.4, 0.4], [0.1, 0.1]
    metric = [sum(error**power for error in side) for side in (fast, accurate)]
    assert fitted_power(fast, accurate, *metric) == pytest.approx(power)


@pytest.mark.parametrize("metrics", [(0.0, 0.0), (0.1, 0.0)])
def test_without_a_sign_of_growth_the_power_is_1(metrics):
    assert fitted_power([0.4], [0.1], *metrics) == 1.0
    assert fitted_power([0.4], [0.4], 0.2, 0.1) == 1.0
