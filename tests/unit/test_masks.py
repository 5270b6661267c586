"""What a mask is proved to be, op by op."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from torch import Tensor

N = 6
LOW = torch.finfo(torch.float32).min


def _kind(make_mask: object) -> tuple[str, str, Tensor, Tensor]:
    """(status, code, lowered output, exact output) of an attention under `make_mask(visible, tokens)`."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, N, 4)
    visible = torch.tensor([[True, True, False, True, False, False], [True] * N])
    tokens = visible.long() * 7

    def fn(q: Tensor, visible: Tensor, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=make_mask(visible, tokens))

    output, (result,) = run_passes(fn, q, visible, tokens)
    (decision,) = result.decisions
    return decision.status, decision.code, output, fn(q, visible, tokens)


KEY_PADDING = {
    "bool": lambda m, t: m[:, None, None, :],
    "expanded": lambda m, t: m[:, None, None, :].expand(2, 3, N, N),
    "from_tokens": lambda m, t: (t != 0)[:, None, None, :],
    "to_bool": lambda m, t: t.to(torch.bool).view(2, 1, 1, N),
    "greater": lambda m, t: t.gt(0).unsqueeze(1).unsqueeze(1),
    "lengths": lambda m, t: (torch.arange(N)[None] < m.sum(1)[:, None])[:, None, None, :],
    "and_or": lambda m, t: (m & (m | (t > 3)))[:, None, None, :],
    "not_not": lambda m, t: ~(~m)[:, None, None, :],
    "ones_and": lambda m, t: torch.ones(1, 1, N, N, dtype=torch.bool) & m[:, None, None, :],
    "gathered": lambda m, t: (
        m[torch.arange(2)[:, None, None, None], torch.arange(N)[None, None, None, :]]
        & (torch.arange(N)[None, None, :, None] >= 0)
    ),
    "float_low": lambda m, t: torch.zeros(2, 1, N, N).masked_fill(~m[:, None, None, :], LOW),
    "float_inf": lambda m, t: torch.where(m, 0.0, float("-inf"))[:, None, None, :].expand(2, 1, N, N),
    "float_product": lambda m, t: (1.0 - m.float())[:, None, None, :] * LOW,
    "inverted_fill": lambda m, t: (1.0 - m.float())[:, None, None, :].masked_fill(
        (1.0 - m.float())[:, None, None, :].to(torch.bool), LOW
    ),
    "inverted_int_fill": lambda m, t: (1.0 - t.float())[:, None, None, :].masked_fill(
        (1.0 - t.float())[:, None, None, :].to(torch.bool), LOW
    ),
}


@pytest.mark.parametrize("name", KEY_PADDING)
def test_key_padding_is_proved_and_lowered(name: str) -> None:
    status, code, output, exact = _kind(KEY_PADDING[name])
    assert (status, code) == ("lowered", "lowered")
    if name != "inverted_int_fill":
        torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)


NOTHING_HIDDEN = {
    "all_true": lambda m, t: torch.ones(1, 1, N, N, dtype=torch.bool),
    "all_zero": lambda m, t: torch.zeros(2, 1, N, N),
    "non_negative": lambda m, t: (torch.arange(N) >= 0)[None, None, None, :],
}


@pytest.mark.parametrize("name", NOTHING_HIDDEN)
def test_an_empty_mask_is_dropped(name: str) -> None:
    status, code, output, exact = _kind(NOTHING_HIDDEN[name])
    assert (status, code) == ("lowered", "lowered")
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5)


REFUSED = {
    "tril": (lambda m, t: torch.ones(N, N, dtype=torch.bool).tril(), "mask_causal"),
    "triu_float": (lambda m, t: torch.full((N, N), float("-inf")).triu(1), "mask_causal"),
    "compare": (lambda m, t: torch.arange(N)[None] <= torch.arange(N)[:, None], "mask_causal"),
    "window": (lambda m, t: (torch.arange(N)[:, None] - torch.arange(N)[None]) < 2, "mask_sliding_window"),
    "two_sided": (lambda m, t: (torch.arange(N)[:, None] - torch.arange(N)[None]).abs() < 2, "mask_general"),
    "packed": (lambda m, t: (t[:, :, None] == t[:, None, :])[:, None], "mask_general"),
    "per_head": (lambda m, t: torch.stack([m, m, ~m], 1)[:, :, None, :], "mask_general"),
    "weak": (lambda m, t: torch.zeros(2, 1, 1, N).masked_fill(~m[:, None, None, :], -5.0), "mask_bias"),
    "alibi": (lambda m, t: torch.arange(N).float().view(1, 1, 1, N) * 0.5, "mask_bias"),
    "product_of_ints": (lambda m, t: (1.0 - t.float())[:, None, None, :] * LOW, "mask_opaque"),
    "half_index": (
        lambda m, t: torch.arange(N).to(torch.bfloat16)[None] <= torch.arange(N).to(torch.bfloat16)[:, None],
        "mask_general",
    ),
    "negative_index": (lambda m, t: torch.arange(N)[torch.arange(N) - 1] <= torch.arange(N)[:, None], "mask_general"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_key_padding_stays_exact(name: str) -> None:
    make_mask, expected = REFUSED[name]
    status, code, output, exact = _kind(make_mask)
    assert (status, code) == ("exact", expected)
    torch.testing.assert_close(output, exact, rtol=1e-5, atol=1e-5, equal_nan=True)
