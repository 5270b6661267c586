"""Counts against the closed forms of the mathematics, and predictions against measurements."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.speed.problems import HEAD_DIMS, ODD_SHAPES, AutoForm, Problem
from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.attention.stages import Sizes, work_of
from monarch_compile.attention.work import (
    backward_cost,
    exact_backward_cost,
    exact_cost,
    exact_cost_of_shapes,
    monarch_cost,
    predict,
)
from monarch_compile.calls import EAGER, Calls
from monarch_compile.cost.devices import DEVICES, device_for
from monarch_compile.errors import InputError

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
B, M, D, E = sympy.symbols("B M D e", positive=True, integer=True)
N = M * B
SQUARE = Sizes(1, 1, 1, M * B, M * B, M, M, B, B, D, D, E, T=1, C=0, X=0, G=0, P=0)
WINDOW = SQUARE._replace(X=2 * B, G=1)


# (batch, seq_len) -> milliseconds on one H200, float16, 12 heads of 64: exact (cuDNN), Monarch (two streaming kernels).
H200_MS = {
    (64, 1024): (0.501, None),
    (1, 1024): (0.0139, None),
    (1, 4096): (0.117, 0.0166),
    (16, 4096): (1.86, 0.225),
    (1, 16384): (1.84, 0.084),
    (4, 16384): (7.25, 0.314),
    (1, 32768): (7.38, 0.193),
    (1, 65536): (29.0, 0.455),
}


def attention(seq_len=4096, block_size=64, batch=1, dtype=torch.float32, init="identity", **more):
    sizes = {"num_heads": 12, "num_kv_heads": 12, "seq_len_q": seq_len, "seq_len_k": seq_len} | more
    head = {"head_dim": 64, "value_dim": 64} | {k: sizes.pop(k) for k in ("head_dim", "value_dim") if k in sizes}
    form = Form(block_size, init=init, **{name: sizes.pop(name) for name in FORM_OPTIONS if name in sizes})
    return MonarchAttention(batch=batch, **sizes, **head, dtype=dtype, form=form, scale=0.125)


def auto(seq_len, device, dtype, batch=1):
    return attention(seq_len, auto_block_size(seq_len, device.kind), batch, dtype)


def is_equal(found, expected):
    return sympy.simplify(found - expected) == 0


def test_flops_of_one_iteration_are_6NBD_plus_4NMD():
    assert is_equal(work_of(SQUARE).monarch.flops, 6 * N * B * D + 4 * N * M * D)


def test_causal_attention_is_half_of_the_work_and_listed_keys_are_priced():
    form = {"window": 2, "prefix": 64, "is_causal": True}
    whole, causal = attention(window=2, prefix=64), attention(**form)
    assert exact_cost(causal).flops * 2 == exact_cost(whole).flops
    listed = monarch_cost(attention(**form, chosen=8)).flops - monarch_cost(causal).flops
    blocks = (4096 - 64) // 64
    choice = 2 * 2 * 12 * 64 * blocks**2 * 64
    assert listed == 12 * blocks * 2 * 2 * 64 * 8 * 64 * 64 + choice


def test_each_further_iteration_adds_4NBD_plus_4NMD():
    three, two = (work_of(SQUARE._replace(T=iterations)).monarch.flops for iterations in (3, 2))
    assert is_equal(three - two, 4 * N * B * D + 4 * N * M * D)


def test_a_window_adds_its_keys_and_one_more_output():
    window, paper = work_of(WINDOW).monarch, work_of(SQUARE).monarch
    assert is_equal(window.flops - paper.flops, 8 * N * B * D)
    assert is_equal(window.bytes - paper.bytes, 2 * N * (D * E + 4))


@pytest.mark.parametrize(
    ("groups", "options", "extra_keys", "exact_rows"),
    [
        ({"window": 0}, {}, 0, 0),  # the identity start scores a row's own block anyway: the group is left out
        ({"window": 1}, {}, 2 * 64, 0),
        ({"window": 1}, {"num_iters": 2}, 3 * 64, 0),
        ({"window": 1}, {"init": "mean"}, 3 * 64, 0),
        ({"window": 99}, {}, 4096 - 64, 0),
        ({"prefix": 5}, {}, 5, 5),
        ({"window": 1, "prefix": 5}, {}, 2 * 64 + 5, 5),
    ],
)
def test_what_exact_groups_cost(groups, options, extra_keys, exact_rows):
    paper, found = (monarch_cost(attention(**options, **e)) for e in ({}, groups))
    assert found.flops - paper.flops == 12 * 4 * 64 * (4096 * extra_keys + exact_rows * 4096)
    keys_and_values = 12 * 2 * 4096 * 64 * 4
    merged = 12 * 2 * 4096 * (64 * 4 + 4) if groups != {"window": 0} else 0
    assert found.bytes - paper.bytes == merged + (keys_and_values if exact_rows else 0)


def test_exact_attention_takes_4NND_flops_and_compulsory_bytes():
    assert is_equal(work_of(SQUARE).exact.flops, 4 * N**2 * D)
    assert is_equal(work_of(SQUARE).exact.bytes, 4 * N * D * E)


def test_two_kernel_form_moves_nine_tensors_and_the_bias():
    assert is_equal(work_of(SQUARE).monarch.bytes, 9 * N * D * E + 2 * 4 * N)


def test_the_backward_pass_takes_20NBD_plus_10NMD_and_moves_23_tensors():
    """The summaries again (6NBD), stage 2 (five products), stage 1 (seven), and the sums of dz * z."""
    found = work_of(SQUARE).monarch_backward
    assert is_equal(found.flops, 20 * N * B * D + 10 * N * M * D + 2 * N * D)
    assert is_equal(found.bytes, 23 * N * D * E + 7 * 4 * N)


def test_a_window_adds_seven_products_to_the_backward_pass():
    window, paper = (work_of(sizes).monarch_backward.flops for sizes in (WINDOW, SQUARE))
    assert is_equal(window - paper, 28 * N * B * D)


def test_the_backward_pass_of_exact_attention_is_five_products():
    ir = attention(300, 20, batch=2)
    assert exact_backward_cost(ir).flops == 5 * exact_cost(ir).flops // 2
    assert backward_cost(ir).flops > 2 * monarch_cost(ir).flops


TRAINED = Calls(trains=True)


@pytest.mark.parametrize(
    ("options", "has_kernels"),
    [
        ({}, True),
        ({"window": 1, "prefix": 16}, True),
        ({"num_iters": 2}, False),
        ({"init": "mean"}, False),
        ({"prefix": 17}, False),
        ({"num_kv_heads": 3}, True),
        ({"dtype": torch.float64}, False),
    ],
)
def test_forms_without_backward_kernels_are_priced_by_the_vjp_of_the_reference(options, has_kernels):
    ir = attention(**{"dtype": torch.bfloat16, **options})
    h100 = DEVICES["h100"]
    faster = replace(h100, monarch_back=replace(h100.monarch_back, values_per_s=1e15, exps_per_s=1e15))
    by_vjp = predict(ir, h100, calls=TRAINED) != predict(ir, faster, calls=TRAINED)
    assert by_vjp is not has_kernels
    no_kernels = replace(h100, gradients=None)
    assert (predict(ir, h100, calls=TRAINED) == predict(ir, no_kernels, calls=TRAINED)) is not has_kernels


def test_what_eager_code_adds_to_the_vjp_is_not_added_to_kernels():
    ir, h100 = attention(dtype=torch.bfloat16), DEVICES["h100"]
    slower = replace(h100, eager=replace(h100.eager, back_work=100.0, monarch_back_s=1.0))
    calls = Calls(EAGER, trains=True)
    assert predict(ir, slower, calls=calls) == predict(ir, h100, calls=calls)


def test_symbolic_sizes_stay_symbols():
    ir = attention("n", 32, batch="b")
    n, b = sympy.symbols("n b", positive=True, integer=True)
    assert is_equal(exact_cost(ir).flops, 4 * 12 * 64 * b * n**2)
    assert monarch_cost(ir).flops.subs({n: 100, b: 3}) == monarch_cost(attention(100, 32, batch=3)).flops


def test_padding_to_whole_blocks_is_counted():
    assert monarch_cost(attention(65, 64)).flops == monarch_cost(attention(128, 64)).flops
    assert monarch_cost(attention(65, 64)).flops > monarch_cost(attention(64, 32)).flops


def test_grouped_query_attention_reads_fewer_keys():
    grouped, full = (attention(num_kv_heads=heads) for heads in (3, 12))
    assert monarch_cost(grouped).bytes < monarch_cost(full).bytes
    assert monarch_cost(grouped).flops == monarch_cost(full).flops


def test_exact_cost_needs_no_ir():
    ir = attention(300, 20, batch=2, value_dim=32)
    shapes = (2, 12, 300, 64), (2, 12, 300, 64), (2, 12, 300, 32)
    assert exact_cost_of_shapes(*shapes, torch.float32) == exact_cost(ir)


@settings(deadline=None)
@given(
    seq_len=st.integers(1, 5000),
    more=st.integers(0, 300),
    block_size=st.integers(1, 600),
    head_dim=st.integers(1, 256),
    num_iters=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_cost_and_time_grow_with_the_sequence_and_the_iterations(seq_len, more, block_size, head_dim, num_iters, dtype):
    def site(n, iters):
        return attention(n, block_size, dtype=dtype, head_dim=head_dim, value_dim=head_dim, num_iters=iters)

    small, long, deep = site(seq_len, num_iters), site(seq_len + more, num_iters), site(seq_len, num_iters + 1)
    assert monarch_cost(small).flops <= monarch_cost(long).flops
    assert monarch_cost(small).flops < monarch_cost(deep).flops
    assert monarch_cost(small).bytes < monarch_cost(deep).bytes
    for device in DEVICES.values():
        assert predict(small, device).exact_s <= predict(long, device).exact_s
        assert predict(small, device).monarch_s < predict(deep, device).monarch_s


@pytest.mark.parametrize(("batch", "seq_len"), H200_MS)
def test_h200_predictions_are_within_a_factor_of_what_was_measured(batch, seq_len):
    h200 = DEVICES["h200"]
    prediction = predict(auto(seq_len, h200, torch.float16, batch), h200)
    exact_ms, monarch_ms = H200_MS[batch, seq_len]
    assert 1 / 1.5 < prediction.exact_s * 1e3 / exact_ms < 1.5
    if monarch_ms is not None:
        assert 1 / 1.5 < prediction.monarch_s * 1e3 / monarch_ms < 1.5


def first_head_sizes():
    """Rows of the first table of head sizes and lengths, masks and layouts too, under the kernels as they were left."""
    for row in json.loads((RESULTS / "h200_dims.json").read_text(encoding="utf-8"))["rows"]:
        wide = row["head_dim"] > 128
        if row["what"] == ("tiles of wide heads: as they are now" if wide else "after it"):
            yield row


def test_the_first_table_of_head_sizes_has_rows():
    assert len(list(first_head_sizes())) == 46


@pytest.mark.parametrize(
    "row", first_head_sizes(), ids=lambda row: f"{row['seq_len']}-{row['head_dim']}-{row['window']}"
)
def test_h200_predictions_hold_for_the_first_table_of_head_sizes(row):
    sizes = {name: row[name] for name in ("seq_len", "block_size", "batch", "num_heads", "head_dim")}
    heads = {"num_kv_heads": row["num_heads"], "value_dim": row["head_dim"], "window": row["window"]}
    site = attention(dtype=getattr(torch, row.get("dtype", "bfloat16")), **sizes, **heads)
    assert 0.65 < predict(site, DEVICES["h200"]).monarch_s * 1e3 / row["ms"] < 1.15


def head_sizes():
    """Rows of the recorded tables of head sizes and of odd lengths, prefixes included."""
    for name in ("speed_h200_heads.json", "speed_h200_odd.json"):
        for row in json.loads((RESULTS / name).read_text(encoding="utf-8"))["rows"]:
            if row["subject"] == "monarch":
                yield row


def test_the_tables_of_head_sizes_have_rows():
    assert len(list(head_sizes())) == 2 * len(HEAD_DIMS) + 4 * len(ODD_SHAPES)


@pytest.mark.parametrize("row", head_sizes(), ids=lambda row: f"{Problem(**row['problem'])} {AutoForm(**row['form'])}")
def test_h200_predictions_hold_for_other_heads_and_odd_lengths(row):
    site = AutoForm(**row["form"]).ir(Problem(**row["problem"]), DEVICES["h200"])
    assert 0.75 < predict(site, DEVICES["h200"]).monarch_s * 1e3 / row["times"]["graph"]["p50"] < 1.15


def test_one_block_more_than_a_tile_holds_costs_a_tile():
    times = {n: {name: predict(attention(n, 64), DEVICES[name]).monarch_s for name in DEVICES} for n in (4096, 4097)}
    assert times[4097]["h200"] > 1.2 * times[4096]["h200"]
    assert times[4097]["cpu"] < 1.1 * times[4096]["cpu"]


def test_features_are_counted_as_their_tile_has_them():
    """In the products: with nothing else to wait for, heads of 72 take as long as those of 128."""
    h200 = replace(DEVICES["h200"], monarch=replace(DEVICES["h200"].monarch, bytes_per_s=math.inf))
    times = [predict(attention(head_dim=d, value_dim=d), h200).monarch_s for d in (64, 72, 128)]
    assert times[0] < times[1] == times[2]


@pytest.mark.parametrize(
    ("device", "dtype", "batch", "seq_len", "pays"),
    [
        ("cpu", torch.float32, 1, 128, False),
        ("cpu", torch.float32, 8, 197, False),
        ("cpu", torch.float32, 1, 1024, True),
        ("cpu", torch.float32, 1, 4096, True),
        ("h200", torch.float16, 1024, 256, False),
        ("h200", torch.bfloat16, 1, 256, False),
        ("h200", torch.float16, 1, 4096, True),
        ("h200", torch.float16, 16, 4096, True),
        ("cuda", torch.float16, 1, 128, False),
        ("cuda", torch.float16, 1, 8192, True),
    ],
)
def test_crossover(device, dtype, batch, seq_len, pays):
    described = DEVICES[device]
    assert predict(auto(seq_len, described, dtype, batch), described).pays is pays


def test_exact_rows_of_a_prefix_read_all_keys_and_values_once_more():
    h200 = DEVICES["h200"]
    for seq_len in (4096, 65536):
        with_rows, without = (
            predict(attention(seq_len, 128, dtype=torch.float16, **groups), h200).monarch_s
            for groups in ({"window": 1, "prefix": 1}, {"window": 1})
        )
        added = h200.exact.launch_s + 12 * seq_len * 2 * 64 * 2 / h200.exact.bytes_per_s
        assert 0.9 * added < with_rows - without < 1.25 * added  # their keys are read by all others, too


@pytest.mark.parametrize("device", sorted(DEVICES))
def test_the_mean_start_is_one_more_kernel(device):
    described = DEVICES[device]
    mean, identity = (predict(attention(init=init), described) for init in ("mean", "identity"))
    assert mean.monarch_s - identity.monarch_s == pytest.approx(described.monarch.launch_s)
    assert mean.exact_s == identity.exact_s


def test_prediction_needs_hints_for_symbolic_sizes():
    ir = attention("s0", 64)
    with pytest.raises(InputError, match="'s0' is symbolic and has no hint"):
        predict(ir, DEVICES["cpu"])
    assert predict(ir, DEVICES["cpu"], {"s0": 4096}) == predict(attention(4096, 64), DEVICES["cpu"])


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("cpu", None, "cpu"),
        ("cuda", None, "cuda"),
        ("cuda", "NVIDIA H200", "h200"),
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda", "NVIDIA H100 PCIe", "cuda"),  # other memory and clocks: measured where it is
        ("cuda", "NVIDIA GH200 480GB", "cuda"),
        ("cuda", "Tesla T4", "cuda"),
    ],
)
def test_device_for(kind, name, expected):
    assert device_for(kind, name) is DEVICES[expected]


def test_unknown_device_type_is_refused():
    with pytest.raises(InputError, match="device_type must be 'cpu' or 'cuda'; found 'mps'"):
        device_for("mps")


def test_queries_after_a_cache_cost_their_own_rows_alone() -> None:
    """Stage 1 meets all keys; far fields, chosen blocks and exact groups are of the queries that are there."""
    form = Form(64, window=1, chosen=8)
    sizes = {"batch": 1, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "value_dim": 64}
    whole = MonarchAttention(
        **sizes, seq_len_q=65536, seq_len_k=65536, dtype=torch.float16, form=form, scale=0.125, is_causal=True
    )
    part = whole.changed(seq_len_q=4096)
    stage_1 = 8 * 2 * 65536 * 64 * 3 * 64
    rest = [monarch_cost(ir).flops - stage_1 for ir in (whole, part)]
    assert rest[0] == 16 * rest[1]
    summaries = 2 * 8 * (960 + 4096) * 64 * 2
    assert monarch_cost(part).bytes < monarch_cost(whole).bytes / 4
    assert monarch_cost(part).bytes > 2 * summaries
    exact = [exact_cost(ir).flops for ir in (whole, part)]
    assert exact[0] == 4 * 8 * 64 * 65536**2 / 2
    assert exact[1] == 4 * 8 * 64 * 4096 * (65536 - 2048)


def test_the_work_of_queries_after_a_cache_may_be_symbolic() -> None:
    form = Form(64, window=1, chosen=8)
    ir = MonarchAttention(1, 8, 8, "n", "m", 64, 64, dtype=torch.float16, form=form, scale=0.125, is_causal=True)
    known = ir.changed(seq_len_q=4096, seq_len_k=65536)
    names = sympy.symbols("n m", positive=True, integer=True)
    values = dict(zip(names, (4096, 65536), strict=True))
    for count in (monarch_cost, exact_cost):
        symbolic, number = count(ir), count(known)
        found = [sympy.sympify(x).subs(values) for x in (symbolic.flops, symbolic.bytes, symbolic.exps)]
        assert found == [number.flops, number.bytes, number.exps]
    assert predict(ir, DEVICES["h100"], {"n": 4096, "m": 65536}) == predict(known, DEVICES["h100"])
