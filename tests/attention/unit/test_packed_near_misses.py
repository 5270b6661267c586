"""Masks that are nearly packed causal sequences of one length: with every block chosen, lowered attention is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from torch import Tensor

N, LENGTH, HEADS = 24, 6, 2
OPTIONS = {"policy": "always", "causal": True, "block_size": 4, "window": 0, "chosen": N}
Mask = Callable[[], Tensor]


def at() -> Tensor:
    return torch.arange(N)


def row() -> Tensor:
    return torch.arange(N)[:, None]


def same(ids: Tensor) -> Tensor:
    return ids[..., :, None] == ids[..., None, :]


def packed() -> Tensor:
    return same(at() // LENGTH)


def with_bytes(ids: Tensor) -> Tensor:
    return ids.to(torch.uint8)


PACKED: dict[str, Mask] = {
    "counted by a sum": lambda: same((torch.ones(N, dtype=torch.long).cumsum(0) - 1) // LENGTH) & (row() >= at()),
    "counted in steps of two": lambda: same(at() * 2 // (2 * LENGTH)) & (row() >= at()),
    "repeated": lambda: same(torch.arange(N // LENGTH).repeat_interleave(LENGTH)) & (row() >= at()),
    "viewed": lambda: same(torch.arange(4)[:, None].expand(4, LENGTH).reshape(N)) & (row() >= at()),
    "a triangle from an edge of one key later": lambda: packed() & (row() > at() - 1),
    "one sequence": lambda: same(at() // N) & (row() >= at()),
    "without a triangle": packed,
}
OTHERS: dict[str, Mask] = {
    "counted from 1": lambda: same(torch.ones(N, dtype=torch.long).cumsum(0) // LENGTH) & (row() >= at()),
    "shifted": lambda: same((at() + 2) // LENGTH) & (row() >= at()),
    "from the end": lambda: same((N + 2 - at()) // LENGTH) & (row() >= at()),
    "out of order": lambda: same((at() * 5) % N // LENGTH) & (row() >= at()),
    "strewn": lambda: same(torch.arange(N // LENGTH).repeat(LENGTH)) & (row() >= at()),
    "viewed, strewn": lambda: same(torch.arange(LENGTH).expand(4, LENGTH).reshape(N)) & (row() >= at()),
    "earlier sequences": lambda: row() // LENGTH >= at() // LENGTH,
    "later sequences, no later key": lambda: (row() // LENGTH <= at() // LENGTH) & (row() >= at()),
    "the sequence before": lambda: (row() // LENGTH == at() // LENGTH + 1) | packed(),
    "two lengths": lambda: packed() & same(at() // (LENGTH + 2)),
    "a length and its double, unlike for queries and keys": lambda: (
        (row() // LENGTH == at() // (2 * LENGTH)) | (at() == row())
    ),
    "a length that does not divide": lambda: same(at() // (LENGTH + 1)) & (row() >= at()),
    "longer than the row": lambda: same(at() // (2 * N)) & (row() >= at()),
    "a window": lambda: packed() & (row() >= at()) & (row() - at() < 3),
    "a window of both sides": lambda: packed() & ((row() - at()).abs() < 3),
    "an edge of one key more": lambda: packed() & (row() + 1 >= at()),
    "an edge of one key less, and itself": lambda: (packed() & (row() > at())) | (row() == at()),
    "earlier keys": lambda: packed() & (row() <= at()),
    "itself alone": lambda: packed() & (row() <= at()) & (row() >= at()),
    "all but the next key": lambda: packed() & (at() != row() + 1),
    "no later key but the next": lambda: packed() & (at() <= row() + 1) & (at() != row()),
    "a key of all": lambda: (packed() & (row() >= at())) | (at() == 0),
    "a query of all": lambda: (packed() & (row() >= at())) | (row() == N - 1),
    "a hidden key": lambda: packed() & (row() >= at()) & ((at() != 3) | (row() == 3)),
    "other sequences": lambda: ~packed() | (row() == at()),
    "a length for each batch entry": lambda: same(torch.stack([at() // LENGTH, at() // 8]))[:, None] & (row() >= at()),
    "a triangle in one batch entry": lambda: packed() & ((row() >= at()) | (torch.arange(2)[:, None, None, None] == 1)),
    "a triangle in one head": lambda: packed() & ((row() >= at()) | (torch.arange(HEADS)[:, None, None] == 1)),
    "fractions": lambda: same(at() / LENGTH) | (at() == 0),
    "rounded to zero": lambda: same(torch.div(at() - 9, LENGTH, rounding_mode="trunc")) & (row() >= at()),
    "bytes": lambda: same(with_bytes(at() * 32) // 128) & (row() >= at()),
}


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, N, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return q, k, v


def outcome(attend: Callable[..., Tensor]) -> list[Any]:
    """The codes of its sites and the lengths in their IR; its numbers are those of eager attention."""
    found, (result,) = run_passes(attend, *tensors(), **OPTIONS)
    torch.testing.assert_close(found, attend(*tensors()), rtol=1e-9, atol=1e-9)
    return [decision.code if decision.ir is None else decision.ir.seq_len_k for decision in result.decisions]


@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_are_lowered(name: str) -> None:
    (found,) = outcome(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=PACKED[name]()))
    assert found == (N if name == "one sequence" else LENGTH)


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_stay(name: str) -> None:
    (found,) = outcome(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=OTHERS[name]()))
    assert str(found).startswith("mask_")


def masked(scores: Tensor, *masks: Tensor) -> Tensor:
    for mask in masks:
        scores = scores.masked_fill(~mask, -1e9)
    return scores.softmax(-1)


SITES: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "grouped heads": (
        lambda q, k, v: F.scaled_dot_product_attention(
            torch.cat([q, -q], 1), k, v, attn_mask=packed() & (row() >= at()), enable_gqa=True
        ),
        LENGTH,
    ),
    "keys of one head": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k[:, :1].expand_as(q), v[:, :1].expand_as(q), attn_mask=packed() & (row() >= at())
        ),
        LENGTH,
    ),
    "wider values": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, torch.cat([v, -v], -1), attn_mask=packed() & (row() >= at())
        ),
        LENGTH,
    ),
    "more batch dims": (
        lambda q, k, v: masked(q[None] @ k[None].mT, packed() & (row() >= at())) @ torch.stack([v, 2 * v, -v]),
        "rank",
    ),
    "merged heads": (
        lambda q, k, v: masked(q.flatten(0, 1) @ k.flatten(0, 1).mT, packed(), row() >= at()) @ v.flatten(0, 1),
        LENGTH,
    ),
    "a sum of -1e4": (
        lambda q, k, v: (
            (q @ k.mT + (1 - packed().double()) * -1e4 + (1 - (row() >= at()).double()) * -1e4).softmax(-1) @ v
        ),
        LENGTH,
    ),
    "two packings": (lambda q, k, v: masked(q @ k.mT, packed(), same(at() // 8)) @ v, "mask_packed"),
    "padding beside": (lambda q, k, v: masked(q @ k.mT, packed(), row() >= at(), at() != 7) @ v, "mask_packed"),
    "a window beside": (
        lambda q, k, v: masked(q @ k.mT, packed(), row() >= at(), row() - at() < 4) @ v,
        "mask_sliding_window",
    ),
    "fewer queries": (
        lambda q, k, v: masked(q[:, :, 12:] @ k.mT, (packed() & (row() >= at()))[12:]) @ v,
        "cross_attention",
    ),
}


@pytest.mark.parametrize("name", SITES)
def test_other_sites_of_packed_sequences(name: str) -> None:
    attend, expected = SITES[name]
    assert outcome(attend) == [expected]
