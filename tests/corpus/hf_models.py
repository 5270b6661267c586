"""transformers' architectures from tiny configurations: "eager" and "sdpa", with and without a padding mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.corpus.entry import Absent, Entry

BATCH, SEQ_LEN = 2, 12
BOTH, EAGER = ("eager", "sdpa"), ("eager",)
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "d_model": 16,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "intermediate_size": 32,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "image_size": 16,
    "patch_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""Given to every configuration, under the names that the families use; what one does not know it ignores."""


@dataclass(frozen=True)
class Architecture:
    """A model class, what its configuration needs beside TINY, and what it is called with.

    want: of every site; "" where sites differ or the model's attention is no plain bidirectional one.
    """

    model: str
    config: str
    want: str = "lowered"
    given: str = "tokens"
    options: dict[str, Any] = field(default_factory=dict)
    implementations: tuple[str, ...] = BOTH


def _with(base: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**base, **more}


SPEECH = {"conv_dim": (16,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
SPEECH = _with(SPEECH, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, apply_spec_augment=False)
VIDEO = {"num_frames": 2, "tubelet_size": [2, 8, 8], "image_size": 16, "patch_size": 8}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16, "decoder_start_token_id": 1}

SWIN = {"embed_dim": 16, "depths": [1], "window_size": 2, "image_size": 16, "num_attention_heads": [2]}
GROUPS = ("q", "k", "v", "post_attention", "intermediate", "output")
A = Architecture
ENCODERS: dict[str, Architecture] = {
    "albert": A("AlbertModel", "AlbertConfig", options={"embedding_size": 16}),
    "bert": A("BertModel", "BertConfig"),
    "convbert": A("ConvBertModel", "ConvBertConfig", "", options={"embedding_size": 16}, implementations=EAGER),
    "deberta_v2": A("DebertaV2Model", "DebertaV2Config", "", implementations=EAGER),
    "distilbert": A("DistilBertModel", "DistilBertConfig", options={"dim": 16, "n_heads": 2, "n_layers": 1}),
    "electra": A("ElectraModel", "ElectraConfig", options={"embedding_size": 16}),
    "esm": A("EsmModel", "EsmConfig", options={"mask_token_id": 3, "position_embedding_type": "rotary"}),
    "eurobert": A("EuroBertModel", "EuroBertConfig"),
    "fnet": A("FNetModel", "FNetConfig", "exact", implementations=EAGER),
    "layoutlm": A("LayoutLMModel", "LayoutLMConfig"),
    "modernbert": A("ModernBertModel", "ModernBertConfig", "", options={"global_attn_every_n_layers": 1}),
    "mpnet": A("MPNetModel", "MPNetConfig", "exact", implementations=EAGER),
    "nomic_bert": A("NomicBertModel", "NomicBertConfig"),
    "roberta": A("RobertaModel", "RobertaConfig"),
    "roformer": A("RoFormerModel", "RoFormerConfig", options={"embedding_size": 16}, implementations=EAGER),
    "squeezebert": A(
        "SqueezeBertModel",
        "SqueezeBertConfig",
        options={"embedding_size": 16, **{f"{n}_groups": 1 for n in GROUPS}},
        implementations=EAGER,
    ),
}
IMAGES: dict[str, Architecture] = {
    "beit": A("BeitModel", "BeitConfig", "exact", "image", {"use_relative_position_bias": True}),
    "clip_vision": A("CLIPVisionModel", "CLIPVisionConfig", given="image"),
    "dinov2": A("Dinov2Model", "Dinov2Config", given="image"),
    "dinov3_vit": A("DINOv3ViTModel", "DINOv3ViTConfig", given="image"),
    "siglip_vision": A("SiglipVisionModel", "SiglipVisionConfig", "", "image"),
    "swin": A("SwinModel", "SwinConfig", "exact", "image", SWIN),
    "timesformer": A("TimesformerModel", "TimesformerConfig", given="video", options=VIDEO, implementations=EAGER),
    "videomae": A("VideoMAEModel", "VideoMAEConfig", given="video", options=_with(VIDEO, tubelet_size=2)),
    "vit": A("ViTModel", "ViTConfig", given="image"),
}
SOUND: dict[str, Architecture] = {
    "ast": A("ASTModel", "ASTConfig", given="spectrogram", options={"max_length": 24, "num_mel_bins": 16}),
    "hubert": A("HubertModel", "HubertConfig", given="waveform", options=SPEECH),
    "wavlm": A("WavLMModel", "WavLMConfig", "", "waveform", SPEECH, implementations=EAGER),
    "whisper": A("WhisperModel", "WhisperConfig", "", "mel", WHISPER),
}
PAIRS: dict[str, Architecture] = {
    "bart": A("BartModel", "BartConfig", "", "pair"),
    "t5": A("T5Model", "T5Config", "exact", "pair", {"d_kv": 8, "num_heads": 2, "d_ff": 32}),
}
DECODERS: dict[str, Architecture] = {
    "bloom": A("BloomModel", "BloomConfig", "exact", options={"n_layer": 1, "n_head": 2}, implementations=EAGER),
    "gemma2": A("Gemma2Model", "Gemma2Config", "exact", options={"head_dim": 8}, implementations=EAGER),
    "gpt2": A("GPT2Model", "GPT2Config", "exact", options={"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "gpt_oss": A(
        "GptOssModel",
        "GptOssConfig",
        "exact",
        options={"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        implementations=EAGER,
    ),
    "llama": A("LlamaModel", "LlamaConfig", "exact"),
    "llama_grouped": A("LlamaModel", "LlamaConfig", "exact", options={"num_key_value_heads": 1}),
    "mistral": A("MistralModel", "MistralConfig", "exact", options={"sliding_window": 4, "head_dim": 8}),
}
FAMILIES = {"encoder": ENCODERS, "image": IMAGES, "sound": SOUND, "pair": PAIRS, "decoder": DECODERS}


def _tokens() -> Tensor:
    return torch.randint(3, 40, (BATCH, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


GIVEN: dict[str, Callable[[], dict[str, Tensor]]] = {
    "tokens": lambda: {"input_ids": _tokens()},
    "pair": lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens()[:, :7]},
    "image": lambda: {"pixel_values": _noise(BATCH, 3, 16, 16)},
    "video": lambda: {"pixel_values": _noise(BATCH, 2, 3, 16, 16)},
    "spectrogram": lambda: {"input_values": _noise(BATCH, 24, 16)},
    "waveform": lambda: {"input_values": _noise(BATCH, 32)},
    "mel": lambda: {"input_features": _noise(BATCH, 8, 24), "decoder_input_ids": _tokens()[:, :7]},
}
MASKED = ("tokens", "pair")
"""Inputs that come with a padding mask."""


def _make(architecture: Architecture, implementation: str, padded: bool) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    try:
        import transformers
    except ImportError as error:
        raise Absent(str(error)) from error
    config_class = getattr(transformers, architecture.config, None)
    model_class = getattr(transformers, architecture.model, None)
    if config_class is None or model_class is None:
        raise Absent(f"transformers {transformers.__version__} has no {architecture.model}")
    config = config_class(**{**TINY, **architecture.options}, attn_implementation=implementation)
    try:
        model = model_class(config).eval()
    except ValueError as error:
        if "does not support" in str(error):
            raise Absent(str(error)) from error
        raise
    given = GIVEN[architecture.given]()
    if padded:
        given["attention_mask"] = (torch.arange(SEQ_LEN) < torch.tensor([[SEQ_LEN], [SEQ_LEN - 4]])).long()
    names = list(given)

    def program(*tensors: Tensor) -> Any:
        return tuple(model(**dict(zip(names, tensors, strict=True))).values())

    return program, tuple(given.values())


def _pairings(architecture: Architecture) -> list[tuple[str, bool]]:
    paddings = (False, True) if architecture.given in MASKED else (False,)
    return [(implementation, padded) for implementation in architecture.implementations for padded in paddings]


def entries() -> list[Entry]:
    """Every architecture in every implementation, with and without padding where it takes a mask."""
    found = []
    for family, architectures in FAMILIES.items():
        for name, architecture in architectures.items():
            for implementation, padded in _pairings(architecture):
                full = f"{family}/{name}/{implementation}" + ("/padded" if padded else "")
                make = lambda a=architecture, i=implementation, p=padded: _make(a, i, p)  # noqa: E731
                found.append(Entry(full, make, architecture.want))
    return found
