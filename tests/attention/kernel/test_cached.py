"""Causal queries that follow a cache of keys, in the kernels as the interpreter runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from monarch_compile.attention.reference import reference
from monarch_compile.codegen import launcher
from monarch_compile.codegen.attention import rows, specialization
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.launch import launch, sizes_of
from monarch_compile.codegen.attention.launch import site as site_of
from monarch_compile.codegen.attention.schedule import choose_schedule
from monarch_compile.codegen.render import sources
from tests.attention.kernel.chosen import check_with_choice, form_of, with_choice
from tests.attention.kernel.problems import DTYPES, Case, check, tensors

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # rows that are padding, which nothing reads
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),  # masses of blocks that are no candidates
]

CASES = (
    Case(40, 8, 16, 16, causal=True, window=1, queries=16),  # the first query begins a block
    Case(40, 8, 16, 16, causal=True, window=1, queries=13),  # and is inside of one
    Case(40, 4, 16, 16, causal=True, window=0, chosen=3, queries=1),
    Case(23, 5, 25, 20, causal=True, window=2, prefix=3, num_heads=2, mask="some", queries=8),
    Case(23, 5, 16, 16, causal=True, window=0, pad="pre", prefix=9, mask="blocks", queries=20),  # a part of the prefix
    Case(45, 20, 16, 16, causal=True, window=1, pad="pre", batch=1, chosen=1, queries=30),  # blocks of two tiles
    Case(27, 4, 25, 20, causal=True, window=1, prefix=3, chosen=2, num_heads=4, group=2, mask="some", queries=9),
    Case(45, 4, 16, 16, causal=True, window=1, prefix=2, chosen=2, pad="pre", queries=17),
    Case(70, 2, 16, 16, causal=True, window=2, chosen=3, batch=1, mask="bias", queries=21),  # several tiles of blocks
    Case(70, 2, 16, 16, causal=True, window=1, chosen=3, batch=1, queries=68),  # and of blocks of queries
    Case(150, 40, 16, 16, causal=True, chosen=1, batch=1, pad="pre", queries=31),
    Case(11, 30, 16, 16, causal=True, mask="some", queries=4),  # one block
    Case(23, 5, 16, 16, causal=True, prefix=30, queries=7),  # all keys in the prefix
    Case(23, 5, 16, 16, causal=True, window=1, prefix=4, mask="bias", queries=22),
)
LAYOUTS = tuple(replace(CASES[6], batch=1, layout=kind) for kind in ("packed", "transposed", "unaligned"))


@pytest.mark.parametrize("case", [*CASES, *LAYOUTS], ids=str)
def test_cases(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", [CASES[2], replace(CASES[6], batch=1), replace(CASES[7], head_dim=256)], ids=str)
def test_given_the_same_blocks_the_reference_gives_the_same(case: Case, dtype: torch.dtype) -> None:
    check_with_choice(case, dtype, "cpu")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seq_len, group = draw(st.integers(2, 30)), draw(st.sampled_from((1, 2)))
    return Case(
        seq_len,
        draw(st.sampled_from((1, 2, 3, 5, 8, 16, 20))),
        draw(st.sampled_from((16, 20))),
        16,
        causal=True,
        queries=draw(st.integers(1, seq_len - 1)),
        batch=1,
        num_heads=group,
        group=group,
        window=draw(st.sampled_from((0, 1, 2, 30))),
        prefix=draw(st.sampled_from((0, 0, 3, 11))),
        chosen=draw(st.integers(0, 3)),
        pad=draw(st.sampled_from(("pre", "post"))),
        mask=draw(st.sampled_from(("none", "some", "bias"))),
    )


def _between_nans(x: Tensor) -> Tensor:
    """The same rows in memory that holds NaN before and after them, for each head."""
    wide = x.new_full((*x.shape[:2], x.shape[2] + 37, x.shape[3] + 3), float("nan"))
    wide[:, :, 16:-21, :-3] = x
    return wide[:, :, 16:-21, :-3]


@settings(max_examples=15, deadline=None)
@given(cases(), st.data())
def test_any_offset_is_right_and_no_output_depends_on_a_later_token(case: Case, data: st.DataObject) -> None:
    """Against the float64 reference, with NaN around every tensor; then bit for bit, the choice of blocks included."""
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    q, k, v = map(_between_nans, (q, k, v))
    found = launch(q, k, v, mask, **case.options)
    assert_close(found, reference(q.double(), k.double(), v.double(), mask, **case.options))
    last = data.draw(st.integers(case.seq_len - q.shape[2], case.seq_len - 1))
    count = last + 1 - (case.seq_len - q.shape[2])
    for x, kept in ((q, count), (k, last + 1), (v, last + 1)):
        x[:, :, kept:] = 5 * torch.randn_like(x[:, :, kept:])
    assert torch.equal(launch(q, k, v, mask, **case.options)[:, :, :count], found[:, :, :count])


def test_pieces_of_a_prompt_give_exact_attention_where_all_blocks_are_chosen() -> None:
    case = Case(33, 4, 16, 16, chosen=11, window=0, prefix=3, causal=True, batch=1, num_heads=2, group=2)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for begin, end in ((0, 2), (2, 7), (7, 19), (19, 20), (20, 33)):
        found = launch(q[:, :, begin:end], k[:, :, :end], v[:, :, :end], None, **case.options)
        torch.testing.assert_close(found, exact[:, :, begin:end], rtol=1e-5, atol=1e-5)


def test_offsets_of_64_bits_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for tensors of more than 2**31 elements, whose kernels are others."""
    case = Case(14, 4, 16, 16, causal=True, window=0, chosen=1, batch=1, mask="some", queries=7)
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    narrow = launch(q, k, v, mask, **case.options)
    monkeypatch.setattr(specialization, "MAX_POSITION", 0)
    assert torch.equal(launch(q, k, v, mask, **case.options), narrow)


@pytest.mark.parametrize("cached", [0, 2])
@pytest.mark.parametrize("length", [20, 7], ids=["several blocks", "one block"])
def test_a_large_bias_of_a_later_key_leaves_the_rows_of_a_prefix_precise(cached: int, length: int) -> None:
    """They do not see that key. Beside it, 16 bits would hold no difference of the others' biases."""
    case = Case(length, 4, 16, 16, window=0, prefix=5, causal=True, batch=1, queries=length - cached)
    q, k, v, _ = tensors(case, torch.float16, "cpu")
    bias = torch.randn(1, length).index_fill(1, torch.tensor([length - 1]), 2000.0)
    found = launch(q, k, v, bias, **case.options)
    assert_close(found, reference(q.double(), k.double(), v.double(), bias, **case.options))


def test_a_negative_scale_of_the_rows_of_a_prefix_is_part_of_their_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some of torch's kernels take the largest score before they scale."""
    scales = []

    def attend(*args: Any, **options: Any) -> Tensor:
        scales.append(options["scale"])
        return F.scaled_dot_product_attention(*args, **options)

    monkeypatch.setattr(rows, "scaled_dot_product_attention", attend)
    for queries in (20, 18):
        case = Case(20, 4, 16, 16, window=0, prefix=5, causal=True, batch=1, queries=queries)
        q, k, v, _ = tensors(case, torch.float32, "cpu")
        options = {**case.options, "scale": -0.5}
        found = launch(q, k, v, None, **options)
        assert_close(found, reference(q.double(), k.double(), v.double(), None, **options))
    assert scales == [1.0, 1.0]


def test_the_first_block_is_chosen_for_by_its_own_first_query() -> None:
    """No query before it is given; later ones of its block may not choose for it."""
    case = Case(42, 4, 16, 16, chosen=1, window=0, causal=True, batch=1, queries=13)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    k[:, :, 8:12] = 5 * F.normalize(q[:, :, :1], dim=-1)
    q[:, :, 0] *= 4
    q[:, :, 1:3] = -q[:, :, :1]
    _, taken = with_choice(case, q, k, v, None)
    assert taken[0, 0, :7].tolist() == [[-1]] * 7  # of these no row is asked for
    assert taken[0, 0, 7].tolist() == [2]


def test_buffers_between_kernels_have_one_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor compares strides of what a kernel is given. Where it cannot prove two of symbolic sizes to be equal, it
    copies, and torch 2.11 then fails on a copy of itself."""
    allocate = launcher._allocate
    shapes: list[tuple[int, ...]] = []

    def noted(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        shapes.append(tuple(shape))
        return allocate(like, shape, dtype)

    monkeypatch.setattr(launcher, "_allocate", noted)
    case = Case(40, 4, 16, 16, causal=True, window=1, chosen=3, queries=16)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    output = launch(q, k, v, None, **case.options)
    assert [shape for shape in shapes if len(shape) > 1] == [output.transpose(1, 2).shape]
    assert len(shapes) > 6


def test_blocks_before_the_first_query_have_one_summary_each() -> None:
    """What stage 1 keeps grows by a block of the cache, not by its tokens; no text depends on where queries begin."""
    case = Case(4096, 64, 64, 64, chosen=4, window=1, prefix=64, causal=True, queries=500)
    texts = set()
    for cached in (2500, 3000, 3596):
        q, k = torch.empty(1, 2, 500, 64, device="meta"), torch.empty(1, 2, cached + 500, 64, device="meta")
        ir, _ = site_of(q, k, k, None, form_of(case), 0.125, None, causal=True)
        schedule = choose_schedule(ir, (9, 0))
        sizes = sizes_of(ir, None, q, k, None)
        first = (cached - 64) // 64
        blocks = -(-(cached + 436) // 64) - first
        assert sizes["num_summaries"] == first + 64 * blocks
        assert sizes["num_row_blocks"] == blocks
        tensors_given = {"q": q, "k": k, "v": k, "rows": q[:, :, :64]}
        special = EMITTER.specialize(ir, schedule, tensors_given, sizes)
        partial = replace(special, partial_block=True)  # whether keys fill their last block may be known
        texts.add(tuple(source.text for source in sources(EMITTER.program_of(ir, schedule, partial))))
    assert len(texts) == 1
