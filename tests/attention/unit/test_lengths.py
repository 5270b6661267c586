"""Block sizes and crossovers as functions of the length and the batch, in step with the cost model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import (
    BATCHES,
    BLOCK_SIZES,
    LENGTHS,
    NEVER,
    auto_block_size,
    crossover,
    exact_wins,
)
from monarch_compile.attention.work import predict
from monarch_compile.cost.devices import DEVICES
from monarch_compile.cost.prediction import MARGIN
from monarch_compile.errors import InputError

SITES = [(device, window) for device in sorted(DEVICES) for window in (None, 1)]


def site(device, window, seq_len=1, batch=1, block_size=16, num_heads=12, head_dim=64):
    dtype = torch.float32 if device == "cpu" else torch.float16
    lengths = {"seq_len_q": seq_len, "seq_len_k": seq_len, "head_dim": head_dim, "value_dim": head_dim}
    heads = {"batch": batch, "num_heads": num_heads, "num_kv_heads": num_heads}
    return MonarchAttention(**heads, **lengths, dtype=dtype, form=Form(block_size, window=window), scale=0.125)


def at(ir, device, seq_len, batch=1):
    """`ir` at a length, with the block size of "auto"."""
    block_size = auto_block_size(seq_len, DEVICES[device].kind, ir.form.window, ir.form.prefix)
    return ir.changed(batch=batch, seq_len_q=seq_len, seq_len_k=seq_len, block_size=block_size)


@pytest.mark.parametrize("steps", BLOCK_SIZES.values(), ids=map(str, BLOCK_SIZES))
def test_steps_start_at_one_and_climb(steps):
    starts, sizes = zip(*steps, strict=True)
    assert starts[0] == 1
    assert list(starts) == sorted(set(starts))
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize(("kind", "windowed"), BLOCK_SIZES)
def test_a_step_holds_from_its_first_length_on(kind, windowed):
    steps = BLOCK_SIZES[kind, windowed]
    for (start, size), (_, before) in zip(steps[1:], steps, strict=False):
        assert auto_block_size(start, kind, 1 if windowed else None) == size
        assert auto_block_size(start - 1, kind, 1 if windowed else None) == before


@pytest.mark.parametrize(("kind", "windowed"), BLOCK_SIZES)
def test_a_prefix_is_in_no_block(kind, windowed):
    window = 1 if windowed else None
    for start, size in BLOCK_SIZES[kind, windowed]:
        assert auto_block_size(start + 5, kind, window, 5) == size
        assert auto_block_size(start, kind, window, start) == BLOCK_SIZES[kind, windowed][0][1]


def test_the_table_of_the_docs_is_the_one_in_force():
    lines = (Path(__file__).parents[3] / "docs/dynamic_shapes.md").read_text(encoding="utf-8").splitlines()
    for (kind, windowed), steps in BLOCK_SIZES.items():
        starts = {size: str(start) for start, size in steps}
        title = f"{kind.upper()}, {'a window' if windowed else '`window=None`'}"
        cells = [title, *(starts.get(size, "–") for size in (16, 32, 64, 128, 256))]
        assert f"| {' | '.join(cells)} |" in lines


def test_a_length_below_one_is_refused():
    with pytest.raises(InputError, match="seq_len must be at least 1; found 0"):
        auto_block_size(0, "cpu")


@settings(deadline=None)
@given(st.sampled_from(SITES), st.integers(64, 65536))
def test_the_block_size_is_nearly_the_fastest_of_the_powers_of_two(where, seq_len):
    device, window = where
    ir = site(device, window, seq_len)
    found = predict(at(ir, device, seq_len), DEVICES[device]).monarch_s
    best = min(predict(ir.changed(block_size=2**n), DEVICES[device]).monarch_s for n in range(4, 10))
    assert found <= 1.3 * best


@pytest.mark.parametrize(("device", "window"), SITES)
def test_from_its_crossover_on_a_site_gains(device, window):
    ir = site(device, window)
    start = crossover(ir, DEVICES[device], True)
    assert start in LENGTHS
    gains = {n: predict(at(ir, device, n), DEVICES[device]).speedup for n in range(start, 8192)}
    assert gains[start] >= MARGIN
    assert min(gains.values()) > 1
    assert predict(at(ir, device, LENGTHS[LENGTHS.index(start) - 1]), DEVICES[device]).speedup < MARGIN


@pytest.mark.parametrize(("device", "window"), SITES)
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 100, 5000])
def test_a_site_pays_from_one_length_on_at_any_batch(device, window, batch):
    ir, described = site(device, window, num_heads=1), DEVICES[device]
    pays = [exact_wins(ir, described, auto=True, batch=batch, seq_len=n) is None for n in LENGTHS]
    assert pays == sorted(pays)
    for length in (n for n, pay in zip(LENGTHS, pays, strict=True) if pay):
        assert predict(at(ir, device, length, batch), described).pays


def test_a_batch_is_weighed_as_the_later_to_pay_of_its_neighbours():
    ir = site("cuda", 1, num_heads=1)
    alone = [crossover(ir.changed(batch=batch), DEVICES["cuda"], True) for batch in BATCHES]
    assert len(set(alone)) > 2
    for batch, start in ((3, max(alone[:2])), (16, max(alone[2:4])), (10**6, alone[-1])):
        ask = {"auto": True, "batch": batch}
        assert exact_wins(ir, DEVICES["cuda"], seq_len=start, **ask) is None
        assert f"below {start} keys" in exact_wins(ir, DEVICES["cuda"], seq_len=start - 1, **ask)


@pytest.mark.parametrize("device", sorted(DEVICES))
@pytest.mark.parametrize("queries", [2, 63, 64, 100, 700, 5000])
def test_queries_of_another_number_are_weighed_by_both(device, queries):
    """From one length of keys on it pays, as the model says; and no later with more queries."""
    ir, ask = site(device, None).changed(init="mean"), {"auto": True, "batch": 1}
    pays = [exact_wins(ir, DEVICES[device], seq_len=n, queries=queries, **ask) is None for n in LENGTHS]
    assert pays == sorted(pays)
    for length in (n for n, pay in zip(LENGTHS, pays, strict=True) if pay and n != queries):
        assert predict(replace(at(ir, device, length), seq_len_q=queries), DEVICES[device]).pays
    more = [exact_wins(ir, DEVICES[device], seq_len=n, queries=4 * queries, **ask) is None for n in LENGTHS]
    assert sum(more) >= sum(pays)


def test_few_queries_stay_exact_and_say_how_many():
    ir = site("cpu", None).changed(init="mean")
    reason = exact_wins(ir, DEVICES["cpu"], auto=True, batch=1, seq_len=10**6, queries=40)
    assert reason == "with 1 or a few more queries exact attention wins at every length"
    assert exact_wins(ir, DEVICES["cpu"], auto=True, batch=1, seq_len=4096, queries=400) is None


def test_where_lowering_never_pays_exact_attention_wins_at_every_length():
    blocks = site("cpu", 1, block_size=LENGTHS[-1])
    assert crossover(blocks, DEVICES["cpu"], False) == NEVER
    reason = exact_wins(blocks, DEVICES["cpu"], auto=False, batch=1, seq_len=10**6)
    assert reason == "exact attention wins at every length"


def test_the_block_size_of_a_site_counts_unless_it_is_auto():
    sizes = [site("cpu", 1, block_size=size) for size in (16, 256)]
    given_size = {crossover(ir, DEVICES["cpu"], False) for ir in sizes}
    auto = {exact_wins(ir, DEVICES["cpu"], auto=True, batch=1, seq_len=64) for ir in sizes}
    assert len(given_size) == 2
    assert len(auto) == 1
