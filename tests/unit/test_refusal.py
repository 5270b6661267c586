"""Every code that a site can stay exact with has a remedy, and the report shows it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from support.capture import decisions_of

import monarch_compile
from monarch_compile.attention.lengths import WHY
from monarch_compile.passes.attention.masks import KINDS, LOWERED_KINDS
from monarch_compile.refusal import CODES

PACKAGE = Path(monarch_compile.__file__).parent
SOURCES = [*(PACKAGE / "passes").rglob("*.py"), *(PACKAGE / "attention").rglob("*.py")]
CODE = re.compile(r'(?:Refused|Check|Rule|Refusal)\((?:[\w.]+, )?"(\w+)"|code ?= ?"(\w+)"')


def test_every_code_has_a_remedy() -> None:
    found = {a or b for path in SOURCES for a, b in CODE.findall(path.read_text(encoding="utf-8"))}
    found |= {f"mask_{kind}" for kind in KINDS if kind not in LOWERED_KINDS} | {*WHY}
    assert len(found) > 30
    assert found - {"lowered"} == set(CODES)


def test_a_near_miss_tells_its_story() -> None:
    q = torch.randn(2, 3, 7, 4)
    (decision,) = decisions_of(lambda q: torch.softmax(30 * torch.tanh(q @ q.mT / 30), -1) @ q, q)
    assert (decision.stage, decision.code, decision.node) == ("match", "softcap", "tanh")
    assert "test_refusal.py" in decision.source
    assert decision.remedy == CODES["softcap"].remedy
    text = str(monarch_compile.explain(lambda q: torch.relu(torch.softmax(q @ q.mT, -1)) @ q, q))
    assert "exact because: relu" in text
    assert "test_refusal.py" in text
    assert f"would lower with: {CODES['probs_op'].remedy}" in text
