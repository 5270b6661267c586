"""The examples' long-convolution models against direct sums over all pairs of positions."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples.mixer import convolution, models
from examples.mixer.convolution import (
    ConvolutionMixer,
    ImplicitFilter,
    bidirectional_convolution,
    cast_activations,
    causal_convolution,
)
from examples.mixer.models import (
    SIZES,
    Bert,
    BlockDiagonalLinear,
    GatedMLP,
    HyenaLM,
    MonarchMixerEncoder,
    Size,
    num_parameters,
)

TINY = replace(SIZES["tiny"], max_length=64)
LENGTHS = [1, 2, 7, 32]


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def summed(u: Tensor, skip: Tensor, forward: Tensor, backward: Tensor | None = None) -> Tensor:
    """The convolution, one pair of positions after the other."""
    y = u * skip[:, None]
    for t in range(u.shape[-1]):
        for s in range(u.shape[-1]):
            if s <= t:
                y[..., t] += forward[:, t - s] * u[..., s]
            if s >= t and backward is not None:
                y[..., t] += backward[:, s - t] * u[..., s]
    return y


@pytest.mark.parametrize("length", LENGTHS)
def test_convolutions_are_sums_over_pairs(length: int) -> None:
    u, skip, forward, backward = randn(2, 3, length), randn(3), randn(3, length), randn(3, length).flip(0)
    torch.testing.assert_close(causal_convolution(u, forward, skip), summed(u, skip, forward))
    found = bidirectional_convolution(u, forward, backward, skip)
    torch.testing.assert_close(found, summed(u, skip, forward, backward))


def test_the_result_has_the_dtype_of_the_signal_and_is_computed_in_that_of_the_filter() -> None:
    u, filter, skip = randn(2, 3, 32, dtype=torch.bfloat16), randn(3, 32, dtype=torch.float32), randn(3)
    found = causal_convolution(u, filter, skip)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, summed(u.double(), skip, filter.double()).bfloat16(), atol=0, rtol=2**-7)


def by_hand(mixer: ConvolutionMixer, x: Tensor) -> Tensor:
    """`mixer` from its parameters, with sums for its convolutions."""

    def long(part: convolution.LongConvolution, u: Tensor) -> Tensor:
        return summed(u, part.skip, *(made(u.shape[-1]).double() for made in part.filters))

    length = x.shape[1]
    projected = x @ mixer.project.weight.T + mixer.project.bias
    before = 2 if mixer.causal else 1
    padded = torch.cat((projected.new_zeros(x.shape[0], before, projected.shape[2]), projected), 1)
    padded = torch.cat((padded, projected.new_zeros(x.shape[0], 2 - before, projected.shape[2])), 1)
    taps = mixer.short.weight[:, 0]
    short = sum(padded[:, i : i + length] * taps[:, i] for i in range(3)) + mixer.short.bias
    x1, x2, v = short.transpose(1, 2).split(x.shape[2], 1)
    y = long(mixer.long, v * x1) * x2
    if mixer.residual is not None:
        y = y + long(mixer.residual, x.transpose(1, 2))
    return y.transpose(1, 2) @ mixer.out.weight.T + mixer.out.bias


@pytest.mark.parametrize(("causal", "residual"), [(False, False), (False, True), (True, False)])
@torch.no_grad()
def test_the_mixer_equals_a_direct_computation(causal: bool, residual: bool) -> None:
    torch.manual_seed(0)
    mixer = ConvolutionMixer(6, 8, 32, causal=causal, residual=residual)
    cast_activations(mixer, torch.float64)
    x = randn(2, 19, 6)
    torch.testing.assert_close(mixer(x), by_hand(mixer, x), atol=1e-5, rtol=1e-5)


def changes(model: nn.Module, at: int, length: int = 24) -> list[int]:
    """The positions whose output another token at position `at` changes."""
    tokens = torch.randint(TINY.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, at] = (tokens[0, at] + 1) % TINY.vocab_size
    apart = (model(tokens) - model(other)).abs().amax(-1)[0]
    return [t for t, difference in enumerate(apart.tolist()) if difference > 1e-5]


@torch.no_grad()
def test_hyena_is_causal_and_the_encoder_is_not() -> None:
    torch.manual_seed(0)
    encoder, hyena = MonarchMixerEncoder(TINY).double(), HyenaLM(TINY).double()
    assert changes(hyena, 10) == list(range(10, 24))
    assert changes(encoder, 10) == list(range(24))


@torch.no_grad()
def test_block_diagonal_linears_are_the_dense_ones_of_their_matrix() -> None:
    layer = BlockDiagonalLinear(8, 12, 4)
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(layer(x), x @ torch.block_diag(*layer.weight) + layer.bias)


@torch.no_grad()
def test_the_mlp_gates_a_half_with_the_other() -> None:
    mlp = GatedMLP(TINY)
    x = torch.randn(2, 3, TINY.width)
    gate, value = mlp.up(x).split(TINY.expansion * TINY.width, -1)
    torch.testing.assert_close(mlp(x), mlp.down(torch.nn.functional.gelu(gate) * value))


@torch.no_grad()
def test_windows_decay_slower_in_later_channels() -> None:
    made = ImplicitFilter(8, 16, 64)
    made.mlp = nn.Sequential(nn.Linear(33, 8, bias=False))
    made.mlp[0].weight.zero_()
    made.mlp[0].bias = nn.Parameter(torch.ones(8))  # the filter is its window
    window = made(64)
    assert window.shape == (8, 64)
    assert window.dtype == torch.float32
    assert (window[:, 1:] < window[:, :-1]).all()
    left = window[:, -1] / window[:, 0]
    assert (left[1:] > left[:-1]).all()
    torch.testing.assert_close(window[0].square().sum(), torch.tensor(1.0))


def test_a_sequence_longer_than_its_filters_is_refused() -> None:
    with pytest.raises(ValueError, match="a sequence of 65 tokens; the filters are made for 64 at most"):
        HyenaLM(TINY)(torch.zeros(1, 65, dtype=torch.long))


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="the width, 96, is no multiple of head_dim, 64"):
        Size(width=96, depth=1)


@torch.no_grad()
def test_casting_leaves_filters_in_float32() -> None:
    encoder = MonarchMixerEncoder(TINY)
    filters = encoder.layers[0].sequence.long.filters[0]
    before = filters(64)
    cast_activations(encoder, torch.bfloat16)
    assert torch.equal(filters(64), before)
    assert encoder(torch.zeros(1, 64, dtype=torch.long)).dtype == torch.bfloat16
    others = [p for name, p in encoder.named_parameters() if ".filters." not in name]
    assert {p.dtype for p in others} == {torch.bfloat16}


@torch.no_grad()
def test_autocast_leaves_filters_in_float32() -> None:
    filters = ImplicitFilter(4, 8, 64)
    before = filters(64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(filters(64), before)


@pytest.mark.parametrize(("size", "millions"), [("80m", 80), ("341m", 341)])
def test_sizes_are_those_of_the_paper(size: str, millions: int) -> None:
    with torch.device("meta"):
        encoder, bert = MonarchMixerEncoder(SIZES[size]), Bert(SIZES[size])
    assert num_parameters(encoder) / 1e6 == pytest.approx(millions, rel=0.02)
    assert len(bert.layers) == len(encoder.layers)
    assert bert.embed.weight.shape == encoder.embed.weight.shape


@torch.no_grad()
def test_bert_attends_in_both_directions_and_knows_positions() -> None:
    torch.manual_seed(0)
    bert = Bert(TINY).double()
    assert changes(bert, 10) == list(range(24))
    same = bert(torch.zeros(1, 8, dtype=torch.long))
    assert not torch.allclose(same[:, 0], same[:, 1])


@pytest.mark.parametrize("module", [convolution, models])
def test_the_models_know_no_compiler(module) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(name.startswith("monarch_compile") for name in imported)
    assert "torch" in imported
