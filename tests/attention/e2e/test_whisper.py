"""Whisper's encoder through torch.compile(backend="monarch"): all sites lowered, one graph, the reference's numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

pytest.importorskip("transformers", reason="Whisper's encoder comes from transformers")

from transformers import AttentionInterface, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from examples.whisper.audio import log_mel, read_clips, read_wav
from examples.whisper.load import PACKAGES, load_whisper, packages_installed
from monarch_compile.attention.reference import reference

REFERENCE = "monarch_reference"
TOLERANCE = 1e-5
BASE = {
    "d_model": 512, "encoder_layers": 6, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048,
    "max_source_positions": 1500, "num_mel_bins": 80,
}  # fmt: skip
SMALL = {
    "d_model": 48, "encoder_layers": 2, "encoder_attention_heads": 3, "encoder_ffn_dim": 64,
    "max_source_positions": 90, "num_mel_bins": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def random_encoder(sizes: dict[str, int]) -> nn.Module:
    """An encoder whose attention is far from uniform, so that exact and Monarch attention differ."""
    torch.manual_seed(0)
    encoder = WhisperEncoder(WhisperConfig(**sizes)).eval()
    for layer in encoder.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            projection.weight.data.normal_(std=1.5 / sizes["d_model"] ** 0.5)
    return encoder


@torch.no_grad()
def run(encoder: nn.Module, mel: Tensor, attention: str) -> Tensor:
    encoder.config._attn_implementation = attention
    return encoder(mel).last_hidden_state


def reference_output(encoder: nn.Module, mel: Tensor, **options) -> Tensor:
    """The eager model's output with its attention replaced by the reference."""
    form = partial(reference, **{"window": 1, **options})

    def attention(module, q, k, v, mask, *, scaling, **_):
        assert mask is None
        return form(q, k, v, scale=scaling).transpose(1, 2), None

    AttentionInterface.register(REFERENCE, attention)
    return run(encoder, mel, REFERENCE)


@torch.no_grad()
def compiled_output(encoder: nn.Module, mel: Tensor, attention: str, **options) -> Tensor:
    """The compiled model's output, after checking that all of it is one graph with every site lowered."""
    encoder.config._attn_implementation = attention
    compiled = torch.compile(
        encoder, backend="monarch", options={"policy": "always", "strict": True, **options}, fullgraph=True
    )
    output = compiled(mel).last_hidden_state
    assert counters["monarch"] == {"lowered": len(encoder.layers), "exact": 0}
    assert counters["stats"]["unique_graphs"] == 1
    return output


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.nightly
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_base_encoder_runs_the_reference_at_all_six_sites(attention):
    encoder, mel = random_encoder(BASE), torch.randn(1, 80, 3000)
    expected = reference_output(encoder, mel, block_size=50)
    output = compiled_output(encoder, mel, attention, block_size=50)
    assert relative_error(output, expected) <= TOLERANCE
    assert relative_error(run(encoder, mel, attention), expected) > 1e-2


@pytest.mark.slow
@pytest.mark.skipif(not packages_installed(), reason=f"needs the packages {' and '.join(PACKAGES)}")
def test_base_encoder_with_real_weights_and_speech():
    whisper = load_whisper()
    encoder = whisper.model.model.encoder
    mel = log_mel(whisper.features, [read_wav(read_clips()[0].path)])
    output = compiled_output(encoder, mel, "sdpa", block_size=50)
    assert relative_error(output, reference_output(encoder, mel, block_size=50)) <= TOLERANCE


@pytest.mark.parametrize(
    ("attention", "options"),
    [
        ("sdpa", {"block_size": 16}),
        ("eager", {"block_size": 16}),
        pytest.param("eager", {"block_size": 9, "num_iters": 2, "init": "mean"}, marks=pytest.mark.nightly),
    ],
    ids=["sdpa", "eager", "two_iterations"],
)
def test_small_encoder_runs_the_reference(attention, options):
    encoder, mel = random_encoder(SMALL), torch.randn(2, 8, 180)
    expected = reference_output(encoder, mel, **options)
    assert relative_error(compiled_output(encoder, mel, attention, **options), expected) <= TOLERANCE
    assert relative_error(run(encoder, mel, attention), expected) > 1e-2


@pytest.mark.parametrize("block_size", [1, 128])
def test_degenerate_blocks_give_the_exact_encoder(block_size):
    encoder, mel = random_encoder(SMALL), torch.randn(2, 8, 180)
    expected = run(encoder, mel, "sdpa")
    assert relative_error(compiled_output(encoder, mel, "sdpa", block_size=block_size), expected) <= TOLERANCE
