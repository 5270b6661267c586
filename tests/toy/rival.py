"""A family that finds what the toy finds, and gains more."""

from __future__ import annotations

from dataclasses import replace

from tests.toy import frontend
from tests.toy.family import FAMILY as TOY

FAMILY = replace(TOY, name="rival", noun="rival gate")


def _choose(*arguments: object) -> frontend.Choice:
    choice = frontend.choose(*arguments)  # type: ignore[arg-type]
    decision = replace(choice.decision, family="rival")
    return replace(choice, decision=decision, gain=2 * choice.gain)


FRONTEND = replace(frontend.FRONTEND, family="rival", choose=_choose)
