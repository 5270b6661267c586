"""The outcome of every entry of the corpus is the golden one, and what was lowered gives eager's numbers."""

from __future__ import annotations

import pytest

from tests.corpus import golden
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
    elif entry.want == "lowered" and not entry.why_not:
        assert not outcome.failures
        assert 0 < outcome.num_lowered == len(outcome.decisions), lines
    assert lines == golden.load(group).get(name), "the outcome has changed; --update-golden accepts it"


def test_no_golden_outcome_is_stale() -> None:
    for group in golden.GROUPS:
        assert not set(golden.load(group)) - set(golden.entries_of(group)), group
