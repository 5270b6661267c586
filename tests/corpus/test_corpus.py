"""The outcome of every entry of the corpus is the golden one, and what was lowered gives eager's numbers."""

from __future__ import annotations

import pytest

from tests.corpus import golden
from tests.corpus.coverage import EXCEPTIONS, Coverage
from tests.corpus.entry import Absent, run

CASES = [(group, name) for group in golden.GROUPS for name in golden.entries_of(group)]
TOLERANCE = 1e-5


@pytest.mark.parametrize(("group", "name"), CASES, ids=[f"{group}-{name}" for group, name in CASES])
def test_outcome(group: str, name: str, request: pytest.FixtureRequest) -> None:
    entry = golden.entries_of(group)[name]
    try:
        outcome = run(entry)
    except Absent as reason:
        pytest.skip(str(reason))
    lines = outcome.lines()
    if request.config.getoption("--update-golden"):
        golden.save(group, name, lines)
    assert outcome.error <= TOLERANCE
    assert all(d.reason and d.node and d.code for d in outcome.decisions)
    if entry.want == "exact":
        assert outcome.num_lowered == 0
    elif entry.want == "lowered" and f"{group}-{name}" not in EXCEPTIONS:
        assert not outcome.failures
        assert 0 < outcome.num_lowered == len(outcome.decisions), lines
    assert lines == golden.load(group).get(name), "the outcome has changed; --update-golden accepts it"


def test_no_golden_outcome_is_stale() -> None:
    for group in golden.GROUPS:
        assert not set(golden.load(group)) - set(golden.entries_of(group)), group


def recorded() -> dict[str, list[str]]:
    """The golden outcomes of programs whose attention is all bidirectional and unbiased."""
    return {
        f"{group}-{name}": lines
        for group in golden.GROUPS
        for name, lines in golden.load(group).items()
        if golden.entries_of(group)[name].want == "lowered"
    }


def test_all_bidirectional_unbiased_attention_is_lowered_but_for_named_exceptions() -> None:
    coverage = Coverage.of(recorded())
    assert not coverage.unnamed
    assert set(coverage.missed) == set(EXCEPTIONS), "an exception that is none any more"
    rest = coverage.wanted - len(EXCEPTIONS)
    assert rest > 300
    assert f"{rest} of {rest} programs lowered in full (100%)" in str(coverage)


@pytest.mark.parametrize(
    ("lines", "codes"),
    [
        ([], ()),
        (["1 x exact [softcap] stage=match mask=none"], ("softcap",)),
        (["2 x lowered [lowered] x", "3 x exact [rank] stage=legality mask=none"], ("rank",)),
        (["failed: LoweringError: no"], ("failed: LoweringError: no",)),
        (["2 graphs", "2 x lowered [lowered] x"], None),
    ],
)
def test_what_is_not_lowered_in_full_is_counted(lines: list[str], codes: tuple[str, ...] | None) -> None:
    coverage = Coverage.of({"some program": lines, "another": ["1 x lowered [lowered] x"]})
    assert dict(coverage.missed) == ({} if codes is None else {"some program": codes})
    assert dict(coverage.unnamed) == dict(coverage.missed)
    assert str(coverage).startswith(f"bidirectional and unbiased: {2 if codes is None else 1} of 2 programs")
