"""Masks that are nearly a triangle, in three spellings: with every block chosen, what is lowered is exact attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from torch import Tensor

N = 23
NONE = float("-inf")
OPTIONS = {"policy": "always", "causal": True, "block_size": 4, "window": 0, "chosen": N}
Mask = Callable[[], Tensor]


def at() -> Tensor:
    return torch.arange(N)


def row() -> Tensor:
    return torch.arange(N)[:, None]


def ones(size: int = N) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool)


def column_seen() -> Tensor:
    mask = ones().tril()
    mask[:, 5] = True
    return mask


def row_seen() -> Tensor:
    mask = ones().tril()
    mask[3] = True
    return mask


TRIANGLES: dict[str, Mask] = {
    "tril": lambda: ones().tril(),
    "not triu": lambda: ~ones().triu(1),
    "row >= key": lambda: row() >= at(),
    "key <= row": lambda: at() <= row(),
    "row > key - 1": lambda: row() > at() - 1,
    "key < row + 1": lambda: at() < row() + 1,
    "distance": lambda: (row() - at()) >= 0,
    "negated": lambda: -row() <= -at(),
    "floats": lambda: row().double() >= at().double(),
    "counted from 1": lambda: torch.arange(1, N + 1)[:, None] > at(),
    "cut from a wider one": lambda: ones(40).tril()[:N, :N],
    "where": lambda: torch.where(row() >= at(), True, False),
    "filled": lambda: torch.zeros(N, N, dtype=torch.bool).masked_fill(row() >= at(), True),
    "with padding": lambda: (row() >= at()) & (at() < 20),
    "with odd keys hidden": lambda: (row() >= at()) & (at() % 2 == 0),
}
OTHERS: dict[str, Mask] = {
    "tril(1)": lambda: ones().tril(1),
    "triu": lambda: ones().triu(),
    "not triu(0), or the first key": lambda: ~ones().triu(0) | (at() == 0),
    "key >= row": lambda: row() <= at(),
    "one key later": lambda: row() + 1 >= at(),
    "twice the row": lambda: 2 * row() >= at(),
    "twice the key": lambda: row() >= 2 * at(),
    "pairs": lambda: row() // 2 >= at() // 2,
    "blocks": lambda: row() // 4 >= at() // 4,
    "some rows see all": lambda: (row() >= at()) | (row() >= 20),
    "the last key": lambda: (row() >= at()) | (at() == N - 1),
    "the first keys": lambda: (row() >= at()) | (at() < 3),
    "a window": lambda: (row() >= at()) & (row() - at() < 6),
    "all but itself, or the first": lambda: ((row() >= at()) & (row() != at())) | (at() == 0),
    "reversed places": lambda: at().flip(0)[:, None] >= at().flip(0),
    "rows flipped": lambda: ones().tril().flip(0),
    "flipped twice": lambda: ones().tril().flip((0, 1)),
    "turned": lambda: ones().tril().T,
    "one entry": lambda: torch.stack([ones().tril(), ones()])[:, None],
    "one head": lambda: torch.stack([ones().tril(), ones()])[None],
    "another edge in each head": lambda: row() >= at() - torch.arange(2)[:, None, None],
    "rolled rows": lambda: ones().tril().roll(1, 0),
    "rolled keys": lambda: ones().tril().roll(1, 1),
    "packed, the last cut short": lambda: (row() >= at()) & (row() // 6 == at() // 6),
    "half a key later": lambda: row().double() + 1.5 >= at().double(),
    "distance clamped": lambda: (row() - at()).clamp(min=-1) >= -1,
    "cut one row lower": lambda: ones(40).tril()[1 : N + 1, :N],
    "cut at the end of rows": lambda: ones(40).tril()[-N:, :N],
    "every other row and key, rows later": lambda: ones(2 * N).tril()[1::2, ::2],
    "a key seen by all": column_seen,
    "a row that sees all": row_seen,
}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, N, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v


def as_bools(mask: Mask) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask())


def as_a_bias(mask: Mask) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.zeros((), dtype=q.dtype).masked_fill(~mask(), NONE)
        return (0.5 * (q @ k.mT) + bias).softmax(-1) @ v

    return attend


def as_least_scores(mask: Mask) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.where(mask(), 0.5 * (q @ k.mT), torch.finfo(q.dtype).min).softmax(-1) @ v

    return attend


SPELLINGS = (as_bools, as_a_bias, as_least_scores)


def outcome(attend: Callable[..., Tensor]) -> list[str]:
    """The codes of its sites; its numbers are those of eager attention."""
    given = tensors()
    found, results = run_passes(attend, *given, **OPTIONS)
    torch.testing.assert_close(found, attend(*given), rtol=1e-10, atol=1e-10)
    return [decision.code for result in results for decision in result.decisions]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", TRIANGLES)
def test_triangles_are_lowered(name: str, spelling: Any) -> None:
    assert outcome(spelling(TRIANGLES[name])) == ["lowered"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name: str, spelling: Any) -> None:
    codes = outcome(spelling(OTHERS[name]))
    assert codes
    assert "lowered" not in codes


SITES: dict[str, Callable[..., Tensor]] = {
    "fewer keys": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :-1], v[:, :, :-1], is_causal=True),
    "fewer queries": lambda q, k, v: F.scaled_dot_product_attention(q[:, :, 3:], k, v, is_causal=True),
    "a mild bias": lambda q, k, v: (q @ k.mT + torch.where(row() >= at(), 0.0, -1.0)).softmax(-1) @ v,
    "slopes": lambda q, k, v: (q @ k.mT + torch.where(row() >= at(), 0.1 * (at() - row()), NONE)).softmax(-1) @ v,
    "scores times a triangle": lambda q, k, v: (q @ k.mT * (row() >= at())).softmax(-1) @ v,
    "weights times a triangle": lambda q, k, v: ((q @ k.mT).softmax(-1) * (row() >= at())) @ v,
    "both triangles": lambda q, k, v: (q @ k.mT).masked_fill(row() < at(), NONE).masked_fill(row() > at(), NONE)
    .softmax(-1) @ v,
    "keys first, the other triangle": lambda q, k, v: (k @ q.mT).masked_fill(row() < at(), NONE).softmax(-2).mT @ v,
}  # fmt: skip


CACHED = 9
AFTER_A_CACHE: dict[str, Mask] = {
    "tril": lambda: torch.ones(N - CACHED, N, dtype=torch.bool).tril(CACHED),
    "the last rows": lambda: ones().tril()[CACHED:],
    "places": lambda: row()[CACHED:] >= at(),
    "counted": lambda: torch.arange(N - CACHED)[:, None] + CACHED >= at(),
    "with padding": lambda: (row()[CACHED:] >= at()) & (at() > 1),
}
OTHERS_AFTER_A_CACHE: dict[str, Mask] = {
    "from the first key": lambda: ones().tril()[:-CACHED],
    "one key later": lambda: torch.ones(N - CACHED, N, dtype=torch.bool).tril(CACHED + 1),
    "one key earlier": lambda: torch.ones(N - CACHED, N, dtype=torch.bool).tril(CACHED - 1),
    "a window": lambda: (row()[CACHED:] >= at()) & (row()[CACHED:] - at() < 5),
    "the cache alone": lambda: at() < CACHED + 0 * row()[CACHED:],
    "earlier keys": lambda: row()[CACHED:] <= at(),
}


def after_a_cache(spelling: Callable[[Mask], Callable[..., Tensor]], mask: Mask) -> Callable[..., Tensor]:
    attend = spelling(mask)
    return lambda q, k, v: attend(q[:, :, CACHED:], k, v)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", AFTER_A_CACHE)
def test_triangles_after_a_cache_are_lowered(name: str, spelling: Any) -> None:
    assert outcome(after_a_cache(spelling, AFTER_A_CACHE[name])) == ["lowered"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", OTHERS_AFTER_A_CACHE)
def test_other_masks_after_a_cache_stay(name: str, spelling: Any) -> None:
    codes = outcome(after_a_cache(spelling, OTHERS_AFTER_A_CACHE[name]))
    assert codes
    assert "lowered" not in codes


@pytest.mark.parametrize("name", SITES)
def test_other_uses_of_a_triangle_stay(name: str) -> None:
    assert "lowered" not in outcome(SITES[name])
