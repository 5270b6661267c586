"""Where every row is known to see blocks beyond its window, no code handles one that does not."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monarch_compile.attention.blocking import Pieces, Tiles
from monarch_compile.attention.groups import softmax_lse
from monarch_compile.attention.reference import reference

CPU = torch.device("cpu")


@given(st.integers(1, 12), st.integers(0, 5))
def test_pieces_have_far_blocks_where_they_say_so(num_blocks: int, window: int) -> None:
    blocks = Pieces(4 * num_blocks, num_blocks, 4, window=window)
    found = bool(blocks.is_far(CPU).any(0).all())
    assert blocks.all_have_far() == found


@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.sampled_from(["box", "plus"]))
def test_tiles_have_far_blocks_where_they_say_so(data: st.DataObject, counts: list[int], shape: str) -> None:
    reaches = tuple(data.draw(st.integers(0, 3)) for _ in counts)
    tiles = Tiles(tuple(2 * n for n in counts), (2,) * len(counts), reaches, shape)
    assert tiles.num_blocks == math.prod(counts)
    if tiles.all_have_far():
        assert tiles.is_far(CPU).any(0).all()


def test_symbolic_counts_say_nothing() -> None:
    assert not Pieces("N", "M", 4, window=1).all_have_far()


@pytest.mark.parametrize("num_blocks", [2, 3, 4])
def test_rows_without_a_far_field_are_exact(num_blocks: int) -> None:
    """With a window of 1: no row has a far field at 2 blocks, some have none at 3, all have one at 4."""
    q, k, v = (torch.randn(1, 2, 4 * num_blocks, 8, dtype=torch.float64) for _ in range(3))
    output = reference(q, k, v, block_size=4, scale=0.3, window=1)
    assert output.isfinite().all()
    middle = slice(4, 8) if num_blocks == 3 else slice(0, 4 * num_blocks if num_blocks == 2 else 0)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(output[:, :, middle], exact[:, :, middle])


def test_a_softmax_of_rows_that_see_a_key_needs_no_guard() -> None:
    scores, visible = torch.randn(5, 7), torch.rand(5, 7) > 0.5
    visible[:, 3] = True
    guarded, plain = (softmax_lse(scores, visible, all_rows_see=sure) for sure in (False, True))
    assert all(torch.equal(x, y) for x, y in zip(guarded, plain, strict=True))
