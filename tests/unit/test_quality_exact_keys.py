"""Quality against exact keys: the fast runs of a model equal its own, and rows of the table say what was asked."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.quality import exact_keys
from benchmarks.quality.language import BLOCK_SIZE
from tests.unit.test_quality_language import Letters

transformers = pytest.importorskip("transformers")
SEQ_LEN = 1280


@pytest.fixture(scope="module")
def bench() -> exact_keys.Bench:
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=96,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        initializer_range=0.5,
        attn_implementation="sdpa",
    )
    model = transformers.Gemma3ForCausalLM(config).eval().requires_grad_(False)
    return exact_keys.Bench(model, Letters(), SEQ_LEN)


@torch.no_grad()
def test_runs_are_those_of_the_model(bench: exact_keys.Bench) -> None:
    expected = bench.scorer(bench.ids, bench.text)
    with bench.attending():
        first, codes = bench.run(exact_keys.Form("exact", exact_keys.exact))
        again, same = bench.run(exact_keys.by_rows(32))  # there are 20 blocks
        by_blocks, _ = bench.run(exact_keys.by_blocks(32))
        other, _ = bench.run(exact_keys.control("own_block", 0, 0))
        none, _ = bench.run(exact_keys.by_rows(0, layers=(1,)))  # there is one full layer, of place 0
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_blocks, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(none, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(same, codes, rtol=1e-4, atol=1e-4)
    assert (other - expected).abs().max() > 1e-2
    torch.testing.assert_close(bench.scorer(bench.ids, bench.text), expected)  # the model is as it was
    assert codes.shape == (10,)


def test_a_row_says_what_was_lost() -> None:
    text, codes = torch.full((8,), -1.0), torch.full((10,), -0.5)
    form = exact_keys.by_rows(2)
    row = exact_keys.row_of(form, SEQ_LEN, (text - 0.01, codes - 0.04), (text, codes))
    assert row["over"] == pytest.approx(math.exp(0.01) - 1, rel=1e-4)
    assert row["behind"] == pytest.approx(0.04, rel=1e-4)
    assert row["meets"]
    assert not exact_keys.row_of(form, SEQ_LEN, (text - 0.03, codes), (text, codes))["meets"]
    worse = codes.clone()
    worse[3] -= 0.06
    assert not exact_keys.row_of(form, SEQ_LEN, (text, worse), (text, codes))["meets"]
    table = exact_keys.markdown([row])
    assert "| 1280 | rows_2 |" in table


def test_every_form_has_a_name_and_a_share() -> None:
    found = exact_keys.forms([4, 8])
    assert len({form.name for form in found}) == len(found) == 8
    shares = {form.name: form.share(40 * BLOCK_SIZE) for form in found}
    assert shares["exact"] == 1
    assert shares["rows_8"] == shares["blocks_8"] == shares["random"] > shares["rows_4"] > shares["window_sinks"]
    assert [form.name for form in found if form.is_control] == ["window_sinks", "own_block", "random"]
