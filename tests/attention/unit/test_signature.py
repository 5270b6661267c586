"""The rules of all attention: one table, for regions of graphs and for eager calls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from monarch_compile.attention.signature import RULES, Rule, Signature, first_broken
from monarch_compile.config import MonarchConfig
from monarch_compile.passes.attention.checks import CHECKS

SHAPE = (2, 4, 9, 8)
LEGAL = Signature((SHAPE, SHAPE, SHAPE), frozenset({torch.float32}), frozenset({"cpu"}), 0.5)
WIDE = (2, 4, 9, 257)

BROKEN = {
    "empty": replace(LEGAL, shapes=((2, 4, 0, 8), SHAPE, SHAPE)),
    "single_query": replace(LEGAL, shapes=((2, 4, 1, 8), SHAPE, SHAPE)),
    "values_layout": replace(LEGAL, shapes=(SHAPE, SHAPE, (2, 4, 7, 8))),
    "cross_attention": replace(LEGAL, shapes=((2, 4, 7, 8), SHAPE, SHAPE)),
    "head_dim": replace(LEGAL, shapes=((2, 4, 9, 7), SHAPE, SHAPE)),
    "wide_heads": replace(LEGAL, shapes=(WIDE, WIDE, WIDE), devices=frozenset({"cuda"})),
    "device": replace(LEGAL, devices=frozenset({"cpu", "cuda"})),
    "dtype": replace(LEGAL, dtypes=frozenset({torch.float32, torch.float64})),
    "scale": replace(LEGAL, scale=float("nan")),
    "dropout_active": replace(LEGAL, dropout_p=0.1),
    "mask_causal": replace(LEGAL, is_causal=True),
    "min_seq_len": replace(LEGAL, shapes=((2, 4, 3, 8),) * 3),
}


@pytest.mark.parametrize("code", BROKEN)
def test_each_rule_refuses_what_it_is_for(code: str) -> None:
    found = first_broken(BROKEN[code], MonarchConfig(min_seq_len=4))
    assert found is not None
    assert (found.code, found.node) == (code, None)
    assert first_broken(LEGAL, MonarchConfig(min_seq_len=4)) is None


def test_devices_and_dtypes_are_told_apart() -> None:
    for site, code in (
        (replace(LEGAL, devices=frozenset({"meta"})), "device"),
        (replace(LEGAL, dtypes=frozenset({torch.int64})), "dtype"),
        (replace(LEGAL, dtypes=frozenset({torch.float64}), devices=frozenset({"cuda"})), "dtype"),
    ):
        found = first_broken(site, MonarchConfig())
        assert found is not None
        assert found.code == code


def test_graphs_ask_every_rule_in_its_order() -> None:
    assert tuple(check for check in CHECKS if isinstance(check, Rule)) == RULES
