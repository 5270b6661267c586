"""Programs that look like softmax attention and are none, or hardly are: eager's numbers, and a true reason.

With block_size=1 Monarch attention is exact, so a lowered program has to agree with eager too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of
from support.soundness import (
    LOWERED,
    Program,
    agrees,
    make_inputs,
    result_as_kernels_leave_it,  # noqa: F401
    scored,
)
from torch import Tensor

INF = float("inf")
NONE: list[str] = []
NORMALISATION, MUTATION, CONTEXT = ["normalisation"], ["mutation"], ["context"]
REUSED, LOWERS = ["scores_reused"], [LOWERED]

Cases = dict[str, tuple[Program, list[str]]]


def weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.exp(scored(q, k))


def normal(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True)


def seen(m: Tensor) -> Tensor:
    return m[:, None, None]


def of_scores(fn: Callable[[Tensor], Tensor]) -> Program:
    """A program that mixes the values by a function of the scores."""
    return lambda q, k, v, m: fn(scored(q, k)) @ v


def of_weights(fn: Callable[[Tensor], Tensor]) -> Program:
    """A program that mixes the values by a function of exp(scores)."""
    return lambda q, k, v, m: fn(weights(q, k)) @ v


# ---- what is summed, and what the weights are divided by -------------------------------------------------------------

SUMS: Cases = {
    "none": (of_weights(lambda w: w), NORMALISATION),
    "tuple_of_one_dim": (of_weights(lambda w: w / w.sum((3,), True)), LOWERS),
    "batch": (of_weights(lambda w: w / w.sum(0, keepdim=True)), ["softmax_dim"]),
    "heads": (of_weights(lambda w: w / w.sum(1, keepdim=True)), ["softmax_dim"]),
    "two_dims": (of_weights(lambda w: w / w.sum((0, 3), keepdim=True)), NORMALISATION),
    "unsqueezed_elsewhere": (of_weights(lambda w: w / w.sum(-1).unsqueeze(-2)), NORMALISATION),
    "of_rows_unsqueezed_as_keys": (of_weights(lambda w: w / w.sum(-2).unsqueeze(-1)), NORMALISATION),
    "of_weights_turned_later": (of_weights(lambda w: w.mT / w.sum(-1, keepdim=True)), NORMALISATION),
    "running": (of_weights(lambda w: w / w.cumsum(-1)), NORMALISATION),
    "less_its_own": (of_weights(lambda w: w / (w.sum(-1, keepdim=True) - w)), NORMALISATION),
    "plus_one": (of_weights(lambda w: w / (1 + w.sum(-1, keepdim=True))), NORMALISATION),
    "clamped": (of_weights(lambda w: w / w.sum(-1, keepdim=True).clamp(min=8.0)), NORMALISATION),
    "euclidean": (of_weights(lambda w: F.normalize(w, p=2, dim=-1)), NORMALISATION),
    "detached": (of_weights(lambda w: w / w.sum(-1, keepdim=True).detach()), NORMALISATION),
    "under_detached_weights": (of_weights(lambda w: w.detach() / w.sum(-1, keepdim=True)), NORMALISATION),
    "of_other_weights": (lambda q, k, v, m: weights(q, k) / weights(k, q).sum(-1, keepdim=True) @ v, 2 * NORMALISATION),
    "of_another_base": (of_scores(lambda s: s.exp2() / s.exp().sum(-1, keepdim=True)), 2 * NORMALISATION),
    "of_shifted_weights": (
        of_scores(lambda s: s.exp() / (s - s.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)),
        2 * NORMALISATION,
    ),
    "squared": (of_weights(lambda w: w * w.sum(-1, keepdim=True) ** -2), NORMALISATION),
    "rounded_down": (of_weights(lambda w: torch.div(w, w.sum(-1, keepdim=True), rounding_mode="floor")), NORMALISATION),
    "twice_for_one": (
        of_weights(lambda w: w / w.sum(-1, keepdim=True) / w.sum(-1, keepdim=True)),
        [*NORMALISATION, "probs_op"],
    ),
    "again_of_probabilities": (of_weights(lambda w: normal(normal(w))), LOWERS),
    "over_rows_then_keys": (of_weights(lambda w: normal(w / w.sum(-2, keepdim=True))), ["probs_reused"]),
    "of_squared_probabilities": (of_scores(lambda s: normal(s.softmax(-1) ** 2)), ["probs_op"]),
    "late_under_a_root": (
        lambda q, k, v, m: (weights(q, k) @ v) * weights(q, k).sum(-1, keepdim=True).rsqrt(),
        NORMALISATION,
    ),
}

# ---- exponentials ----------------------------------------------------------------------------------------------------

EXPONENTIALS: Cases = {
    "two": (of_scores(lambda s: normal(2.0**s)), LOWERS),
    "a_half": (of_scores(lambda s: normal(0.5**s)), LOWERS),
    "e": (of_scores(lambda s: normal(torch.pow(math.e, s - s.amax(-1, keepdim=True)))), LOWERS),
    "one": (of_scores(lambda s: normal(1.0**s)), NONE),
    "power_of_scores": (of_scores(lambda s: normal(s**2.0)), NONE),
    "exp2_in_place": (of_scores(lambda s: normal(s.exp2_())), LOWERS),
    "plus_one": (of_weights(lambda w: normal(w + 1)), NORMALISATION),
    "clamped": (of_weights(lambda w: normal(w.clamp(max=1.5))), NORMALISATION),
    "of_clamped_scores": (of_scores(lambda s: normal(s.clamp(max=0.5).exp())), ["scores_op"]),
    "of_ints": (of_scores(lambda s: normal(s.int().exp())), NORMALISATION),
    "of_exponentials": (of_weights(lambda w: normal(w.exp())), [*NORMALISATION, "scores_op"]),
    "tempered": (of_weights(lambda w: normal(w**2.0)), NORMALISATION),
    "sigmoid": (of_scores(lambda s: normal(s.sigmoid())), NONE),
    "into_given": (of_scores(lambda s: normal(torch.exp(s, out=torch.empty_like(s)))), MUTATION),
}

# ---- logarithms ------------------------------------------------------------------------------------------------------

LOGARITHMS: Cases = {
    "unsqueezed": (of_scores(lambda s: (s - s.logsumexp(-1).unsqueeze(-1)).exp()), LOWERS),
    "unsqueezed_elsewhere": (of_scores(lambda s: (s - s.logsumexp(-1).unsqueeze(-2)).exp()), NORMALISATION),
    "of_rows_unsqueezed_as_keys": (of_scores(lambda s: (s - s.logsumexp(-2).unsqueeze(-1)).exp()), NORMALISATION),
    "two_dims": (of_scores(lambda s: (s - s.logsumexp((-1, -2), keepdim=True)).exp()), NORMALISATION),
    "of_scaled_scores": (of_scores(lambda s: (s - (s * 2).logsumexp(-1, keepdim=True)).exp()), NORMALISATION),
    "of_detached_scores": (of_scores(lambda s: (s - s.detach().logsumexp(-1, keepdim=True)).exp()), NORMALISATION),
    "of_masked_scores": (
        lambda q, k, v, m: (
            (scored(q, k) - scored(q, k).masked_fill(~seen(m), -INF).logsumexp(-1, keepdim=True)).exp() @ v
        ),
        NORMALISATION,
    ),
    "turned_round": (of_scores(lambda s: (s.logsumexp(-1, keepdim=True) - s).exp()), NORMALISATION),
    "of_another_base": (of_scores(lambda s: s.log_softmax(-1).exp2()), NORMALISATION),
    "special": (of_scores(lambda s: torch.special.log_softmax(s, -1).exp()), LOWERS),
    "masked_afterwards": (
        lambda q, k, v, m: (scored(q, k).log_softmax(-1) + (m.float() - 1)[:, None, None] * 1e9).exp() @ v,
        NORMALISATION,
    ),
}

# ---- shifts ----------------------------------------------------------------------------------------------------------

SHIFTS: Cases = {
    "mean": (of_scores(lambda s: normal((s - s.mean(-1, keepdim=True)).exp())), LOWERS),
    "mean_of_keys": (of_scores(lambda s: normal((s - s.mean(-2, keepdim=True)).exp())), ["mask_split_bias"]),
    "maxima_of_keys": (of_scores(lambda s: normal((s - s.amax(-2, keepdim=True)).exp())), ["mask_split_bias"]),
    "maximum_then_temperature": (of_scores(lambda s: normal(((s - s.amax(-1, keepdim=True)) / 0.3).exp())), LOWERS),
    "maximum_unsqueezed_then_mask": (
        lambda q, k, v, m: normal((scored(q, k) - scored(q, k).amax(-1)[..., None]).exp() * seen(m)) @ v,
        ["row_shift"],
    ),
    "own_maximum_unsqueezed_then_mask": (
        lambda q, k, v, m: (lambda s: normal((s - s.amax(-1)[..., None]).exp() * seen(m)) @ v)(scored(q, k)),
        LOWERS,
    ),
    "minimum_then_mask": (
        lambda q, k, v, m: (lambda s: normal((s - s.amin(-1, keepdim=True)).exp() * seen(m)) @ v)(scored(q, k)),
        ["row_shift"],
    ),
    "maximum_elsewhere_then_mask": (
        lambda q, k, v, m: (lambda s: normal((s - s.amax(-1)[..., None, :]).exp() * seen(m)) @ v)(scored(q, k)),
        ["mask_split_bias"],
    ),
    "of_queries": (lambda q, k, v, m: normal((scored(q, k) - q.square().sum(-1, keepdim=True)).exp()) @ v, LOWERS),
    "of_keys": (
        lambda q, k, v, m: normal((scored(q, k) - k.square().sum(-1)[..., None, :]).exp()) @ v,
        ["mask_split_bias"],
    ),
    "of_values": (
        lambda q, k, v, m: normal((scored(q, k) - v.square().sum(-1, keepdim=True)).exp()) @ v,
        ["row_shift"],
    ),
    "standardised": (of_scores(lambda s: normal((s / s.std(-1, keepdim=True)).exp())), ["scale_not_constant"]),
}

# ---- masks -----------------------------------------------------------------------------------------------------------

MASKS: Cases = {
    "zero_first": (lambda q, k, v, m: normal(torch.where(~seen(m), 0.0, weights(q, k))) @ v, LOWERS),
    "one_first": (lambda q, k, v, m: normal(torch.where(~seen(m), 1.0, weights(q, k))) @ v, NORMALISATION),
    "zero_first_by_query": (
        lambda q, k, v, m: normal(torch.where(m[:, None, :, None], 0.0, weights(q, k))).nan_to_num() @ v,
        ["mask_general"],
    ),
    "signs": (lambda q, k, v, m: normal(weights(q, k) * (seen(m).float() * 2 - 3)) @ v, NORMALISATION),
    "two_that_overlap": (lambda q, k, v, m: normal(weights(q, k) * (seen(m).int() + 1)) @ v, NORMALISATION),
    "above_alone": (
        lambda q, k, v, m: (lambda w: w * seen(m) / w.sum(-1, keepdim=True) @ v)(weights(q, k)),
        NORMALISATION,
    ),
    "late_above_alone": (
        lambda q, k, v, m: (lambda w: (w * seen(m) @ v) / w.sum(-1, keepdim=True))(weights(q, k)),
        NORMALISATION,
    ),
    "late_below_alone": (
        lambda q, k, v, m: (lambda w: (w @ v) / (w * seen(m)).sum(-1, keepdim=True))(weights(q, k)),
        NORMALISATION,
    ),
    "largest_renormalised": (
        of_scores(lambda s: (lambda p: normal(p * (p >= p.topk(3).values[..., -1:])))(s.softmax(-1))),
        ["mask_general"],
    ),
    "keys_by_weights": (
        lambda q, k, v, m: (lambda w: normal(w * (w.amax(-2, keepdim=True) > 1)) @ v[:, 0])(weights(q[:, 0], k[:, 0])),
        LOWERS,
    ),
    "other_weights_where_hidden": (
        lambda q, k, v, m: normal(torch.where(seen(m), weights(q, k), weights(q, q))) @ v,
        2 * NORMALISATION,
    ),
    "largest_scattered": (
        of_scores(lambda s: torch.full_like(s, -INF).scatter(-1, s.topk(3).indices, s.topk(3).values).softmax(-1)),
        ["scores_op"],
    ),
}

# ---- writes, modes and other readers ---------------------------------------------------------------------------------


def _zeroed_later(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    mixed = normal(w) @ v
    w.zero_()
    return mixed


def _part_zeroed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    w[..., -1] = 0
    return normal(w) @ v


def _written_through_a_view(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    flat, total = w.view(-1), w.sum(-1, keepdim=True)
    flat.mul_(2.0)
    return w / total @ v


def _exponentiated_in_place(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scored(q, k)
    flat = s.view(-1)
    s.exp_()
    return normal(s) @ v + flat.sum()


def _total_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    total = w.sum(-1, keepdim=True)
    total += 1
    return w / total @ v


def _total_written_later(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    total = w.sum(-1, keepdim=True)
    p = w / total
    total += 1
    return p @ v


def _total_without_grad(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    with torch.no_grad():
        total = w.sum(-1, keepdim=True)
    return w / total @ v


def _weights_mix_too(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    return (w @ v) / w.sum(-1, keepdim=True) + w @ k


def _mixed_by_weights_of_themselves(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    w = weights(q, k)
    return (w @ w.mT) / w.sum(-1, keepdim=True)


def _values_of_scores(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    s = scored(q, k)
    return s.softmax(-1) @ s.mT


READERS: Cases = {
    "zeroed_later": (_zeroed_later, MUTATION),
    "part_zeroed": (_part_zeroed, MUTATION),
    "written_through_a_view": (_written_through_a_view, MUTATION),
    "exponentiated_in_place": (_exponentiated_in_place, MUTATION),
    "total_written": (_total_written, NORMALISATION),
    "total_written_later": (_total_written_later, LOWERS),
    "total_without_grad": (_total_without_grad, CONTEXT),
    "weights_mix_too": (_weights_mix_too, [*NORMALISATION, *REUSED]),
    "mixed_by_weights_of_themselves": (_mixed_by_weights_of_themselves, LOWERS),
    "values_of_scores": (_values_of_scores, LOWERS),
}

TABLES = {
    "sums": SUMS,
    "exponentials": EXPONENTIALS,
    "logarithms": LOGARITHMS,
    "shifts": SHIFTS,
    "masks": MASKS,
    "readers": READERS,
}


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in TABLES for name in TABLES[table]])
def test_near_miss(table: str, name: str) -> None:
    program, codes = TABLES[table][name]
    assert agrees(program) == codes


# ---- all dims of one size: what would not broadcast otherwise --------------------------------------------------------

SQUARE: Cases = {
    "sum_of_a_matrix_not_kept": (
        lambda q, k, v, m: weights(q[0, 0], k[0, 0]) / weights(q[0, 0], k[0, 0]).sum(-1) @ v[0, 0],
        NORMALISATION,
    ),
    "sum_not_kept": (of_weights(lambda w: w / w.sum(-1)), NORMALISATION),
    "logarithm_not_kept": (of_scores(lambda s: (s - s.logsumexp(-1)).exp()), NORMALISATION),
    "maximum_not_kept": (of_scores(lambda s: normal((s - s.amax(-1)).exp())), ["mask_opaque"]),
    "softmax_over_heads": (of_scores(lambda s: s.softmax(1)), ["softmax_dim"]),
    "heads_and_queries_swapped": (of_weights(lambda w: normal(w).permute(0, 2, 1, 3)), ["probs_op"]),
    "scores_of_swapped_batches": (of_scores(lambda s: s.transpose(0, 1).softmax(-1)), ["scores_view"]),
    "probabilities_turned": (of_weights(lambda w: normal(w).mT), ["values_layout"]),
    "mask_by_batch_as_query": (lambda q, k, v, m: normal(weights(q, k) * m).nan_to_num() @ v, ["mask_general"]),
    "mask_by_batch_as_head": (lambda q, k, v, m: normal(weights(q, k) * m[:, None]) @ v, ["mask_general"]),
    "late_values_first": (lambda q, k, v, m: (v @ weights(q, k)) / weights(q, k).sum(-1, keepdim=True), NORMALISATION),
    "late_weights_turned": (
        lambda q, k, v, m: (lambda w: (w.mT @ v) / w.sum(-1, keepdim=True))(weights(q, k)),
        NORMALISATION,
    ),
    "late_by_key": (lambda q, k, v, m: (lambda w: (w @ v) / w.sum(-2).unsqueeze(-1))(weights(q, k)), NORMALISATION),
    "late_over_queries": (
        lambda q, k, v, m: (lambda w: torch.einsum("bhqk,bhqd->bhkd", w, v) / w.sum(-1, keepdim=True))(weights(q, k)),
        NORMALISATION,
    ),
    "late_by_head": (
        lambda q, k, v, m: (lambda w: torch.einsum("bhqk,bhkd->bqhd", w, v) / w.sum(-1, keepdim=True))(weights(q, k)),
        NORMALISATION,
    ),
}


@pytest.mark.parametrize("name", SQUARE)
def test_dims_of_one_size(name: str) -> None:
    program, codes = SQUARE[name]
    assert agrees(program, (5, 5, 5, 5)) == codes


# ---- reasons ---------------------------------------------------------------------------------------------------------

REASONS: dict[str, tuple[Program, str]] = {
    "part_zeroed": (_part_zeroed, "aten.fill_.Tensor writes in place to memory that a softmax written by hand reads"),
    "total_without_grad": (_total_without_grad, "grad mode or autocast changes within a softmax written by hand"),
    "weights_mix_too": (_weights_mix_too, "parts of a softmax written by hand are also used by"),
    "subtracted_from": (
        lambda q, k, v, m: (q.square().sum(-1, keepdim=True) - scored(q, k)).softmax(-1) @ v,
        "the first operand of sub.Tensor is not a product",
    ),
    "vector_before_probabilities": (
        lambda q, k, v, m: v[0, 0, :, 0] @ scored(k, q).softmax(-2),
        "the product with the values has a layout that is not understood",
    ),
    "softmax_over_queries": (
        of_scores(lambda s: s.softmax(-2)),
        "softmax runs over dim 2, the product with the values",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason(name: str) -> None:
    program, reason = REASONS[name]
    assert reason in decisions_of(program, *make_inputs())[-1].reason
