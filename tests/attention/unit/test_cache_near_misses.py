"""Triangles after a cache and masks beside them, at two pairs of lengths: with every block chosen, they are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.config import MonarchConfig
from monarch_compile.passes.pipeline import Rewrite, rewrite

PAIRS = ((9, 23), (5, 30))
"""Numbers of queries and keys."""

OPTIONS = {"policy": "always", "causal": True, "block_size": 4, "window": 0, "chosen": 64, "cross_attention": True}
Mask = Callable[[int, int], Tensor]


def row(queries: int) -> Tensor:
    return torch.arange(queries)[:, None]


def at(keys: int) -> Tensor:
    return torch.arange(keys)


def ones(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool)


def first_seen(mask: Tensor) -> Tensor:
    """The mask, and the first key, so that no query sees nothing."""
    return mask | (at(mask.shape[-1]) == 0)


STATIC, DYNAMIC = "one graph for each pair", "one graph"
TRIANGLES: dict[str, tuple[Mask, tuple[str, ...]]] = {
    "places": (lambda n, m: row(n) + m - n >= at(m), (STATIC, DYNAMIC)),
    "keys counted back": (lambda n, m: row(n) >= at(m) - (m - n), (STATIC, DYNAMIC)),
    "tril": (lambda n, m: ones(n, m).tril(m - n), (STATIC, DYNAMIC)),
    "no triu": (lambda n, m: ~ones(n, m).triu(m - n + 1), (STATIC, DYNAMIC)),
    "places from the cache on": (lambda n, m: torch.arange(m - n, m)[:, None] >= at(m), (STATIC,)),
    "a buffer": (lambda n, m: ones(64, 64).tril()[m - n : m, :m], (STATIC,)),
    "with padding": (lambda n, m: (row(n) + m - n >= at(m)) & (at(m) != 2), (STATIC, DYNAMIC)),
}
OTHERS: dict[str, Mask] = {
    "one key more": lambda n, m: row(n) + m - n + 1 >= at(m),
    "one key less": lambda n, m: row(n) + m - n > at(m),
    "from the first key": lambda n, m: row(n) >= at(m),
    "tril from the first key": lambda n, m: ones(n, m).tril(),
    "tril of a key more": lambda n, m: ones(n, m).tril(m - n + 1),
    "tril of a key less": lambda n, m: ones(n, m).tril(m - n - 1),
    "a buffer from the first key": lambda n, m: ones(64, 64).tril()[:n, :m],
    "a buffer, a row lower": lambda n, m: ones(64, 64).tril()[m - n + 1 : m + 1, :m],
    "offset below zero": lambda n, m: first_seen(row(n) - 3 >= at(m)),
    "earlier keys": lambda n, m: row(n) + m - n <= at(m),
    "a window": lambda n, m: (row(n) + m - n >= at(m)) & (row(n) + m - n - at(m) < 4),
    "two edges": lambda n, m: (row(n) + m - n >= at(m)) & (row(n) >= at(m)),
    "keys seen by all": lambda n, m: (row(n) + m - n >= at(m)) | (at(m) >= 29),
    "an edge that rises with the length": lambda n, m: first_seen(row(n) + m - n >= at(m) + m // 24),
    "an edge for each head": lambda n, m: row(n) + m - n >= at(m) - torch.arange(2)[:, None, None],
    "an edge for each batch entry": lambda n, m: row(n) + m - n >= at(m) - torch.arange(2)[:, None, None, None],
    "padding of one query": lambda n, m: (row(n) + m - n >= at(m)) & ((row(n) != 2) | (at(m) < 2)),
    "counted from the end": lambda n, m: first_seen(n - 1 - row(n) + m - n >= at(m)),
    "queries and keys together": lambda n, m: row(n) + at(m) >= m - 9,
}

OFTEN = ("one key more", "one key less", "from the first key", "a buffer from the first key")
"""Those that come by a mistake, tried with sizes that are numbers, too."""


def attend(mask: Mask) -> Callable[..., Tensor]:
    def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q.shape[-2], k.shape[-2]))

    return by_mask


def outcome(program: Callable[..., Tensor], mode: str) -> list[str]:
    """The codes of its sites in all its graphs; its numbers are those of eager attention at both pairs of lengths."""
    found: list[Rewrite] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append(rewrite(gm, example_inputs, MonarchConfig(**OPTIONS)))
        return found[-1].after.forward

    torch._dynamo.reset()
    compiled = torch.compile(program, backend=backend, fullgraph=True, dynamic=False if mode is STATIC else None)
    for queries, keys in PAIRS:
        generator = torch.Generator().manual_seed(keys)
        sizes = (queries, keys, keys)
        q, k, v = (torch.randn(2, 2, n, 4, generator=generator, dtype=torch.float64) for n in sizes)
        for x in (q, k, v) if mode is DYNAMIC else ():
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(compiled(q, k, v), program(q, k, v), rtol=1e-9, atol=1e-9)
    assert len(found) == (2 if mode is STATIC else 1)
    return [decision.code for result in found for decision in result.decisions]


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, (_, modes) in TRIANGLES.items() for mode in modes])
def test_triangles_are_lowered(name: str, mode: str) -> None:
    assert set(outcome(attend(TRIANGLES[name][0]), mode)) == {"lowered"}


@pytest.mark.parametrize(("name", "mode"), [*((name, DYNAMIC) for name in OTHERS), *((n, STATIC) for n in OFTEN)])
def test_other_masks_stay(name: str, mode: str) -> None:
    codes = outcome(attend(OTHERS[name]), mode)
    assert all(code.startswith("mask_") for code in codes)


@pytest.mark.parametrize("mode", [STATIC, DYNAMIC])
def test_the_flag_counts_from_the_first_key(mode: str) -> None:
    def by_flag(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    assert set(outcome(by_flag, mode)) == {"mask_causal"}


def test_a_triangle_of_one_pair_of_lengths_is_none_of_the_other() -> None:
    queries, keys = PAIRS[0]
    mask = lambda n, m: ones(n, m).tril(keys - queries)  # noqa: E731
    assert outcome(attend(mask), STATIC) == ["lowered", "mask_sliding_window"]
    assert "lowered" not in outcome(attend(mask), DYNAMIC)


def test_more_queries_than_keys_follow_no_cache() -> None:
    def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, m = k.shape[-2], q.shape[-2]
        return F.scaled_dot_product_attention(k, q, q * 2, attn_mask=first_seen(row(n) + m - n >= at(m)))

    for mode in (STATIC, DYNAMIC):
        assert set(outcome(turned, mode)) == {"mask_prefix_causal"}
