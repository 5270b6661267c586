"""Softmax over the keys of attention, and over the classes, codes or experts of a layer, which is no attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of, run_passes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import monarch_compile

BATCH, HEADS, SEQ_LEN, DIM = 2, 3, 16, 8
CODES = 16


def given() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(BATCH, HEADS, SEQ_LEN, DIM, generator=generator) for _ in range(3))
    return q, k, v


class Weights(nn.Module):
    """`into` codes and `out_of` them, both by heads too, square ones, layers; buffers for codes and as a cache."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        generator = torch.Generator().manual_seed(1)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.into, self.out_of, self.gain = weight(DIM, CODES), weight(CODES, DIM), weight(CODES)
        self.heads_into, self.heads_out_of = weight(HEADS, DIM, CODES), weight(HEADS, CODES, DIM)
        self.mix, self.other_mix, self.down = weight(DIM, DIM), weight(DIM, DIM), weight(DIM, 4)
        self.to_codes, self.layer, self.key_layer = nn.Linear(DIM, CODES), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.convolution = nn.Conv1d(DIM, CODES, 1)
        self.codebook, self.cache = nn.Buffer(self.out_of.detach() + 1), nn.Buffer(torch.ones(BATCH, HEADS, 16, DIM))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        return self.fn(self, q, k, v)


Program = Callable[[Weights, Tensor, Tensor, Tensor], Any]


def _moving_average(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = (q @ s.codebook.mT).softmax(-1)
    out = probs @ s.codebook
    s.codebook[2:4] = q[0, 0, :2]
    return out


def _zeros_filled_with_codes(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    codes = torch.zeros(CODES, DIM)
    codes[:8] = s.out_of[:8]
    return (q @ codes.mT).softmax(-1) @ s.out_of


def _by_groups(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = torch.einsum("bngd,gdm->bngm", q.transpose(1, 2), s.heads_into).softmax(-1)
    return torch.einsum("bngm,gmd->bngd", probs, s.heads_out_of)


def _top_k(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    gates = q @ F.normalize(s.into, dim=0)
    best = gates.topk(2, -1)
    return torch.full_like(gates, -math.inf).scatter(-1, best.indices, best.values).softmax(-1) @ s.out_of


def _linear_attention(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ s.mix).softmax(-1) @ ((k @ s.other_mix).softmax(-2).mT @ v)


def _linear_attention_of_layers(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q[:, 0]
    q, k = (layer(x).view(BATCH, SEQ_LEN, 2, 4).transpose(1, 2) for layer in (s.layer, s.key_layer))
    return q.softmax(-1) @ (k.softmax(-2).mT @ k)


def _codes_in_a_branch(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Any:
    return torch.cond(q.sum() > 0, lambda q: (q @ s.into).softmax(-1) @ s.out_of, lambda q: q + 1, (q,))


NO_ATTENTION: dict[str, Program] = {
    "transposed": lambda s, q, k, v: (q @ s.into).mT.softmax(-2).mT @ s.out_of,
    "transposed_twice": lambda s, q, k, v: (q @ s.into).mT.mT.softmax(-1) @ s.out_of,
    "transposed_on_the_left": lambda s, q, k, v: s.out_of.mT @ (q @ s.into).mT.softmax(-2),
    "weight_on_the_left": lambda s, q, k, v: (s.out_of @ q.mT).mT.softmax(-1) @ s.out_of,
    "moved": lambda s, q, k, v: (q @ s.into).movedim(-1, 1).softmax(1).movedim(1, -1) @ s.out_of,
    "numpy_transpose": lambda s, q, k, v: (q[0, 0] @ s.out_of.T).T.softmax(0).T @ s.out_of,
    "by_groups": _by_groups,
    "heads_split": lambda s, q, k, v: (
        (q[:, 0] @ s.into.repeat(1, HEADS)).view(BATCH, SEQ_LEN, HEADS, -1).transpose(1, 2).softmax(-1) @ s.heads_out_of
    ),
    "einsum_of_three": lambda s, q, k, v: torch.einsum("bhnd,de,em->bhnm", q, s.mix, s.into).softmax(-1) @ s.out_of,
    "tensordot": lambda s, q, k, v: torch.tensordot(torch.tensordot(q, s.into, 1).softmax(-1), s.out_of, 1),
    "inner": lambda s, q, k, v: torch.inner(q[0, 0], s.out_of).softmax(-1) @ s.out_of,
    "sum_of_products": lambda s, q, k, v: (q[..., None, :] * s.out_of).sum(-1).softmax(-1) @ s.out_of,
    "distances": lambda s, q, k, v: (-torch.cdist(q, s.out_of)).softmax(-1) @ s.out_of,
    "scaled": lambda s, q, k, v: (q @ (s.into / math.sqrt(DIM))).softmax(-1) @ s.out_of,
    "cosines": lambda s, q, k, v: (F.normalize(q, dim=-1) @ F.normalize(s.into, dim=0)).softmax(-1) @ s.out_of,
    "concatenated": lambda s, q, k, v: (
        (q @ torch.cat([s.into, torch.zeros(DIM, 1)], 1)).softmax(-1) @ torch.cat([s.out_of, s.out_of[:1]])
    ),
    "repeated": lambda s, q, k, v: (q @ s.into.repeat(BATCH, HEADS, 1, 1)).softmax(-1) @ s.out_of,
    "indexed": lambda s, q, k, v: (q @ F.embedding(torch.arange(CODES), s.out_of).mT).softmax(-1) @ s.out_of,
    "weight_norm": lambda s, q, k, v: (
        F.linear(q, torch._weight_norm(s.out_of, s.gain[:, None], 0)).softmax(-1) @ s.out_of
    ),
    "spectral_norm": lambda s, q, k, v: (q @ (s.into / (s.mix[0] @ (s.into @ s.gain)))).softmax(-1) @ s.out_of,
    "constant": lambda s, q, k, v: (q @ torch.arange(128.0).view(DIM, CODES)).softmax(-1) @ torch.ones(CODES, DIM),
    "buffer": lambda s, q, k, v: (q @ s.codebook.T).softmax(-1) @ s.codebook,
    "buffer_written_later": _moving_average,
    "zeros_filled_with_codes": _zeros_filled_with_codes,
    "low_rank": lambda s, q, k, v: ((q @ s.down) @ s.into[:4]).softmax(-1) @ s.out_of,
    "top_k": _top_k,
    "gumbel": lambda s, q, k, v: F.gumbel_softmax(q @ s.into * 2, tau=0.7) @ s.out_of,
    "clusters": lambda s, q, k, v: (q @ s.into).softmax(-1).mT @ v,
    "heat_map": lambda s, q, k, v: s.to_codes(k).softmax(-2).mT @ torch.linspace(-1, 1, SEQ_LEN)[:, None],
    "linear_attention": _linear_attention,
    "linear_attention_of_layers": _linear_attention_of_layers,
    "codes_in_a_branch": _codes_in_a_branch,
    "codes_in_a_checkpoint": lambda s, q, k, v: checkpoint(
        lambda q: (q @ (s.into * 2)).softmax(-1) @ s.out_of, q, use_reentrant=False
    ),
}


def _written_in_part(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s.cache[:, :, 4:12] = k[:, :, :8]
    return (q @ s.cache.mT).softmax(-1) @ v


def _layer_of_what_is_written(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s.cache[:, :, 4:12] = k[:, :, :8]
    return F.linear(q[0, 0], s.cache[0, 0]).softmax(-1) @ v[0, 0]


def _zeros_filled(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys = torch.zeros(BATCH, HEADS, SEQ_LEN, DIM)
    keys[:, :, :8] = k[:, :, :8]
    return (q @ keys.mT).softmax(-1) @ v


def _inducing_points(s: Weights, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    points = (s.out_of @ k.mT).softmax(-1) @ v
    return (q @ points.mT).softmax(-1) @ points


ATTENTION: dict[str, tuple[Program, str]] = {
    "pooling": (lambda s, q, k, v: s.to_codes(k).softmax(-2).mT @ v, "scores_layout"),
    "pooling_transposed": (lambda s, q, k, v: s.to_codes(torch.tanh(s.layer(k))).mT.softmax(-1) @ v, "scores_layout"),
    "pooling_by_convolution": (
        lambda s, q, k, v: s.convolution(k[:, 0].mT).softmax(-1) @ v[:, 0],
        "scores_layout",
    ),
    "pooling_then_layer": (lambda s, q, k, v: s.layer((k @ s.into).mT.softmax(-1) @ v), "lowered"),
    "pooling_adjoint": (lambda s, q, k, v: (k @ s.into).adjoint().softmax(-1) @ v, "lowered"),
    "inducing_points": (_inducing_points, "lowered lowered"),
    "latents": (lambda s, q, k, v: (s.layer(s.out_of) @ s.key_layer(s.out_of).mT).softmax(-1) @ s.out_of, "lowered"),
    "learned_memory": (
        lambda s, q, k, v: (s.layer(q) @ s.key_layer(s.out_of).mT).softmax(-1) @ s.layer(s.out_of),
        "learned_keys",
    ),
    "learned_memory_by_its_name": (
        lambda s, q, k, v: F.scaled_dot_product_attention(q, s.heads_out_of[None], s.heads_out_of[None]),
        "lowered",
    ),
    "prefix": (
        lambda s, q, k, v: (
            (q @ torch.cat([s.heads_out_of.expand(BATCH, -1, -1, -1), k], 2).mT).softmax(-1)
            @ torch.cat([v, s.heads_out_of.expand(BATCH, -1, -1, -1)], 2)
        ),
        "lowered",
    ),
    "prefix_of_scores": (
        lambda s, q, k, v: torch.cat([q @ s.into, q @ k.mT], -1).softmax(-1) @ torch.cat([v, v], 2),
        "scores_op",
    ),
    "learned_positions": (lambda s, q, k, v: (q @ (k + s.out_of).mT).softmax(-1) @ v, "lowered"),
    "additive": (
        lambda s, q, k, v: (
            F.linear(torch.tanh(q[..., None, :] + k[..., None, :, :]), s.gain[None, :DIM]).squeeze(-1).softmax(-1) @ v
        ),
        "scores_view",
    ),
    "squared_distances": (
        lambda s, q, k, v: (-(q[..., None, :] - k[..., None, :, :]).square().sum(-1)).softmax(-1) @ v,
        "scores_layout",
    ),
    "swapped_axes": (lambda s, q, k, v: (k @ q.swapaxes(-1, -2)).swapaxes(-1, -2).softmax(-1) @ v, "lowered"),
    "written_in_part": (_written_in_part, "mutation"),
    "layer_of_what_is_written": (_layer_of_what_is_written, "scores_layout"),
    "zeros_filled": (_zeros_filled, "mutation"),
}


def codes_of(fn: Any, *args: Any, **options: Any) -> list[str]:
    return [d.code for d in decisions_of(fn, *args, cross_attention=True, **options)]


@torch.no_grad()
@pytest.mark.parametrize("name", NO_ATTENTION)
def test_a_layer_is_no_attention(name: str) -> None:
    assert codes_of(Weights(NO_ATTENTION[name]), *given()) == []


@torch.no_grad()
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_found_in_unusual_dress(name: str) -> None:
    program, code = ATTENTION[name]
    fn = Weights(program)
    output, (result,) = run_passes(fn, *given(), cross_attention=True, block_size=2 * SEQ_LEN)  # which is exact
    assert [d.code for d in result.decisions] == code.split()
    torch.testing.assert_close(output, fn(*given()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_are_known_in_training_and_of_symbolic_lengths(dynamic: bool) -> None:
    tensors = given()
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor[:, :, :12], 2)
    for name in ("transposed", "cosines", "by_groups"):
        assert codes_of(Weights(NO_ATTENTION[name]), *(x[:, :, :12] for x in tensors), dynamic=dynamic) == []
    assert codes_of(Weights(ATTENTION["pooling"][0]), *tensors, dynamic=dynamic) == ["scores_layout"]


@torch.no_grad()
def test_a_cache_that_stays_in_its_place_is_no_weight() -> None:
    q, k, v = given()
    cache = SimpleNamespace(keys=k, values=v)
    for tensor in (cache.keys, cache.values):
        torch._dynamo.mark_static_address(tensor)
    assert codes_of(lambda q, cache: (q @ cache.keys.mT).softmax(-1) @ cache.values, q, cache) == ["lowered"]


@torch.no_grad()
def test_a_parameter_is_a_weight_wherever_it_comes_from() -> None:
    q, _, v = given()
    weight = nn.Parameter(torch.ones(DIM, SEQ_LEN))
    assert codes_of(lambda q, w: (q @ w).softmax(-1) @ v, q, weight) == []
    assert codes_of(lambda q: (q @ weight).softmax(-1) @ v, q) == []
    assert codes_of(lambda q, w: (q @ w).softmax(-1) @ v, q, weight.data) == ["lowered"]


@torch.no_grad()
def test_weights_of_an_exported_program_are_known() -> None:
    for program, lowered in ((NO_ATTENTION["cosines"], False), (ATTENTION["learned_positions"][0], True)):
        exported = torch.export.export(Weights(program), given())
        result = monarch_compile.lower_exported(exported, {"policy": "always", "block_size": 4})
        assert ("monarch" in str(result.graph)) == lowered
