"""The IR: verified, printed on one line, equal and hashable by value."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.errors import IRError

BASE = MonarchAttention(
    batch=2,
    num_heads=8,
    num_kv_heads=8,
    seq_len_q=1500,
    seq_len_k=1500,
    head_dim=64,
    value_dim=64,
    dtype=torch.float16,
    form=Form(50),
    scale=0.125,
)


def test_prints_on_one_line() -> None:
    assert str(BASE) == (
        "monarch.attention<f16> q[2,8,1500,64] k[2,8,1500,64] v[2,8,1500,64] blocks=30x50 iters=1 init=identity "
        "pad=post mask=none causal=false window=None prefix=0 scale=0.125"
    )
    symbolic = BASE.changed(batch="s0", seq_len_q="s1", seq_len_k="s1", mask=MaskKind.KEY_PADDING)
    assert "q[s0,8,s1,64]" in str(symbolic)
    assert "blocks=?x50" in str(symbolic)
    assert "mask=key_padding" in str(symbolic)


def test_unequal_lengths_print_both_and_the_rows_of_a_block() -> None:
    cross = BASE.changed(seq_len_q=700)
    assert cross.is_cross
    assert not BASE.is_cross
    assert "q[2,8,700,64] k[2,8,1500,64]" in str(cross)
    assert "blocks=30x50 rows=24 " in str(cross)
    assert "blocks=30x50 rows=? " in str(BASE.changed(seq_len_q="s0"))
    assert "rows" not in str(BASE)


def test_is_a_value() -> None:
    twin = dataclasses.replace(BASE)
    assert twin == BASE
    assert hash(twin) == hash(BASE)
    assert BASE.changed(block_size=51) != BASE
    with pytest.raises(dataclasses.FrozenInstanceError):
        BASE.block_size = 3


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 500))
def test_blocks_cover_the_sequence(n_q: int, n_k: int, block_size: int) -> None:
    ir = BASE.changed(seq_len_q=n_q, seq_len_k=n_k, block_size=block_size)
    assert (ir.num_blocks - 1) * block_size < n_k <= ir.num_blocks * block_size
    assert ir.num_blocks * ir.block_size_q >= n_q
    if n_q == n_k:
        assert ir.block_size_q == block_size


BROKEN = {
    "batch and head counts": {"batch": 0},
    "sequence lengths": {"seq_len_k": 0},
    "head_dim and value_dim": {"head_dim": 0},
    "multiple of num_kv_heads": {"num_kv_heads": 3},
    "dtype must be one of": {"dtype": torch.int32},
    "scale must": {"scale": float("nan")},
    "num_iters=1 and init='identity'": {"is_causal": True, "num_iters": 2},
    "causal attention needs seq_len_q <= seq_len_k": {"is_causal": True, "seq_len_k": 3},
    "chosen blocks need seq_len_q == seq_len_k": {"chosen": 1, "seq_len_q": 3},
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_rule_is_named_with_the_printed_ir(message: str) -> None:
    with pytest.raises(IRError, match=message) as caught:
        BASE.changed(**BROKEN[message])
    assert "monarch.attention<" in str(caught.value)


BAD_OPTIONS = {
    "block_size": 0,
    "num_iters": True,
    "init": "zeros",
    "pad": "both",
    "window": -1,
    "prefix": 1.5,
    "tile": (4, 0),
    "window_shape": "star",
    "prefix_at_end": 1,
    "chosen": -1,
}


@pytest.mark.parametrize("name", FORM_OPTIONS)
def test_an_option_that_is_not_allowed_is_named(name: str) -> None:
    with pytest.raises(IRError, match=f"'{name}' must be .*; found {re.escape(repr(BAD_OPTIONS[name]))}"):
        BASE.changed(**{name: BAD_OPTIONS[name]})


def test_query_heads_share_key_heads() -> None:
    assert BASE.group == 1
    shared = BASE.changed(num_kv_heads=2)
    assert shared.group == 4
    assert "q[2,8,1500,64] k[2,2,1500,64] v[2,2,1500,64]" in str(shared)
    assert BASE.changed(num_heads="4*H", num_kv_heads="H").group == 4
    for heads in ("H", "0*H", "3*G"):
        with pytest.raises(IRError, match="multiple of num_kv_heads"):
            BASE.changed(num_heads=heads, num_kv_heads="K" if heads == "H" else "H")


def test_later_forms_are_representable() -> None:
    grouped = BASE.changed(num_kv_heads=2, window=1, prefix=4, is_causal=True)
    assert "causal=true window=1 prefix=4" in str(grouped)
    assert BASE.changed(seq_len_q=7).block_size_q == 1
    assert str(BASE.changed(chosen=8)).endswith(f"{BASE} chosen=8")
