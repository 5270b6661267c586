"""Causal attention and chosen blocks in the kernels, as the interpreter runs them, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from monarch_compile.codegen.attention.launch import launch
from tests.attention.kernel.chosen import check_with_choice, with_choice
from tests.attention.kernel.problems import DTYPES, Case, check, tensors

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # rows that are padding, which nothing reads
    pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning"),  # masses of blocks that are no candidates
]

CAUSAL = (
    Case(23, 5, 16, 16, causal=True),
    Case(40, 8, 16, 16, causal=True, window=1),  # whole blocks
    Case(23, 5, 25, 20, causal=True, window=2, prefix=3, num_heads=2, mask="some"),
    Case(23, 5, 16, 16, causal=True, window=0, pad="pre", prefix=1, mask="blocks"),
    Case(45, 20, 16, 16, causal=True, window=1, pad="pre", batch=1),  # blocks of two tiles
    Case(45, 40, 16, 16, causal=True, batch=1),
    Case(70, 2, 16, 16, causal=True, window=3, batch=1),  # several tiles of blocks
    Case(23, 5, 16, 16, causal=True, window=30, mask="bias"),
    Case(11, 30, 16, 16, causal=True, prefix=4),  # one block
    Case(11, 30, 16, 16, causal=True, prefix=12, mask="some"),
    Case(37, 1, 16, 16, causal=True, window=10**12, batch=1),
)
CHOSEN = (
    Case(23, 5, 16, 16, chosen=1),
    Case(40, 8, 16, 16, chosen=2, window=1),
    Case(40, 4, 16, 16, chosen=3, window=0, causal=True),
    Case(45, 4, 25, 20, chosen=2, window=1, prefix=3, num_heads=4, group=2, causal=True, mask="some"),
    Case(45, 4, 16, 16, chosen=2, window=1, pad="pre", prefix=2, causal=True),
    Case(45, 4, 16, 16, chosen=2, window=1, pad="pre", mask="blocks"),
    Case(45, 4, 16, 16, chosen=50, window=1, causal=True, mask="blocks"),  # more than there are
    Case(140, 2, 16, 16, chosen=3, window=2, causal=True, batch=1, mask="bias"),  # several tiles of blocks
    Case(140, 2, 16, 16, chosen=3, batch=1, mask="some"),
    Case(150, 40, 16, 16, chosen=1, causal=True, batch=1, pad="pre"),  # blocks of several tiles of keys
    Case.tiled((9, 10), (3, 4), 16, 16, chosen=2, window=1, window_shape="plus", prefix=2, mask="some"),
    Case.tiled((8, 8), (2, 4), 16, 16, chosen=2, window=0),
    Case(45, 4, 16, 16, chosen=2, window=1, prefix=3, prefix_at_end=True, mask="some"),
    Case(45, 4, 16, 16, chosen=2, window=1, prefix=3, prefix_at_end=True, pad="pre", batch=1),
    Case.tiled((7, 8), (2, 4), 16, 16, chosen=2, window=(1, 0), prefix=5, prefix_at_end=True, batch=1),
    Case.tiled((3, 5, 7), (2, 2, 3), 16, 16, chosen=2, window=1, batch=1),
)
LAYOUTS = tuple(replace(CHOSEN[3], layout=kind) for kind in ("packed", "transposed", "unaligned"))


@pytest.mark.parametrize("case", [*CAUSAL, *CHOSEN], ids=str)
def test_cases(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case) -> None:
    check(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [CHOSEN[1], CHOSEN[3], CHOSEN[10], replace(CHOSEN[2], head_dim=256)], ids=str)
def test_given_the_same_blocks_the_reference_gives_the_same(case: Case, dtype: torch.dtype) -> None:
    check_with_choice(case, dtype, "cpu")


@pytest.mark.parametrize("case", [CAUSAL[2], CAUSAL[4], CHOSEN[3], CHOSEN[4], CHOSEN[9]], ids=str)
def test_no_output_depends_on_a_later_token(case: Case) -> None:
    """Bit for bit; the choice of blocks included."""
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    found = launch(q, k, v, mask, **case.options)
    for last in (case.seq_len // 3, case.seq_len // 2, case.seq_len - 2):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, last + 1 :] = 5 * torch.randn_like(x[:, :, last + 1 :])
        assert torch.equal(launch(*others, mask, **case.options)[:, :, : last + 1], found[:, :, : last + 1])


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_chosen_is_exact(causal: bool) -> None:
    case = Case(45, 4, 16, 16, chosen=11, window=0, causal=causal, num_heads=2, group=2)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(launch(q, k, v, None, **case.options), exact, rtol=1e-5, atol=1e-5)


def test_equal_masses_take_the_first_blocks() -> None:
    case = Case(48, 4, 16, 16, chosen=3, window=1, batch=1)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    _, taken = with_choice(case, q, torch.zeros_like(k), v, None)
    for block, found in enumerate(taken[0, 0].tolist()):
        assert found == [b for b in range(12) if abs(b - block) > 1][:3]


def test_fewer_candidates_than_blocks_asked_for() -> None:
    case = Case(24, 4, 16, 16, chosen=4, window=1, batch=1, causal=True)
    q, k, v, _ = tensors(case, torch.float32, "cpu")
    _, taken = with_choice(case, q, k, v, None)
    found = [sorted(b for b in row if b >= 0) for row in taken[0, 0].tolist()]
    assert found == [[], [], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize("causal", [False, True])
def test_heads_that_share_keys_share_their_blocks(causal: bool) -> None:
    case = Case(48, 4, 16, 16, chosen=2, window=0, causal=causal, num_heads=4, group=2)
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    _, taken = with_choice(case, q, k, v, mask)
    assert torch.equal(taken[:, 0::2], taken[:, 1::2])
    assert not torch.equal(taken[:, 0], taken[:, 2])


@pytest.mark.parametrize("case", [CHOSEN[3], CHOSEN[8]], ids=str)
def test_hidden_keys_do_not_matter(case: Case) -> None:
    q, k, v, mask = tensors(case, torch.float32, "cpu")
    found = launch(q, k, v, mask, **case.options)
    hidden = ~mask[:, None, :, None]
    k, v = k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4)
    assert torch.equal(found, launch(q, k, v, mask, **case.options))
