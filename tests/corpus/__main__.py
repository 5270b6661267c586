"""Print the coverage table: `python -m tests.corpus [part of an entry's name]`, from the root of a checkout."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter

from tests.corpus import golden
from tests.corpus.coverage import Coverage
from tests.corpus.entry import Absent, run

COLUMNS = f"{'group':14} {'entries':>7} {'sites':>6} {'lowered':>8} {'exact':>6} {'absent':>7} {'largest error':>14}"


def main(pattern: str = "") -> None:
    """A row for each group, the codes of exact sites, and how much of what was to be lowered is."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    codes: Counter[str] = Counter()
    outcomes: dict[str, list[str]] = {}
    found = 0
    print(COLUMNS)
    for group in golden.GROUPS:
        entries, sites, lowered, absent, error = 0, 0, 0, 0, 0.0
        for name, entry in golden.entries_of(group).items():
            if pattern not in f"{group}-{name}":
                continue
            entries += 1
            try:
                outcome = run(entry)
            except Absent:
                absent += 1
                continue
            sites, lowered = sites + len(outcome.decisions), lowered + outcome.num_lowered
            error = max(error, outcome.error)
            codes.update(d.code for d in outcome.decisions if d.status != "lowered")
            if entry.want == "lowered":
                outcomes[f"{group}-{name}"] = outcome.lines()
        found += entries
        print(f"{group:14} {entries:7} {sites:6} {lowered:8} {sites - lowered:6} {absent:7} {error:14.1e}")
    print("\nexact sites by code:", ", ".join(f"{code} {n}" for code, n in codes.most_common()) or "none")
    print(f"\n{Coverage.of(outcomes)}")
    if pattern and not any(
        pattern in f"{group}-{name}" for group in golden.GROUPS for name in golden.entries_of(group)
    ):
        sys.exit(f"no entry's name has {pattern!r} in it")


if __name__ == "__main__":
    main(*sys.argv[1:2])
