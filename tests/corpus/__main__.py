"""Print the coverage table: `python -m tests.corpus [part of an entry's name]`, from the root of a checkout."""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter

from tests.corpus import golden
from tests.corpus.entry import Absent, run

COLUMNS = f"{'group':14} {'entries':>7} {'sites':>6} {'lowered':>8} {'exact':>6} {'absent':>7} {'largest error':>14}"


def main(pattern: str = "") -> None:
    """A row for each group, then the codes of exact sites and every entry that is not what it was wanted to be."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    codes: Counter[str] = Counter()
    notes: list[str] = []
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
            missed = [d for d in outcome.decisions if d.status != "lowered"]
            if entry.want == "lowered" and (missed or not outcome.decisions):
                why = missed[0].reason if missed else "no site was found"
                notes.append(f"  {group}-{name}: {entry.why_not or why}")
        print(f"{group:14} {entries:7} {sites:6} {lowered:8} {sites - lowered:6} {absent:7} {error:14.1e}")
    print("\nexact sites by code:", ", ".join(f"{code} {n}" for code, n in codes.most_common()) or "none")
    print("\nbidirectional, unbiased and not lowered:", *(notes or ["  none"]), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:2])
