"""Models of transformers: the layers that make queries and keys are found in each, and no other changes."""

from __future__ import annotations

import pytest
import torch
from support.distilled import changed, quick, state_of

from monarch_compile import distill

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 4}
IDS = torch.arange(128).view(2, 64) % 49 + 1
LENGTHS = torch.tensor([[64], [40]])
PADDED = {"input_ids": IDS, "attention_mask": (torch.arange(64)[None] < LENGTHS).long()}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 1}
MODELS = {
    "Bert": (TEXT, PADDED, {"query", "key"}),
    "Albert": ({**TEXT, "embedding_size": 16}, PADDED, {"query", "key"}),
    "Esm": ({**TEXT, "position_embedding_type": "rotary"}, PADDED, {"query", "key"}),
    "ModernBert": ({**TEXT, **SPECIAL}, {"input_ids": IDS}, {"Wqkv"}),
    "ViT": (IMAGE, PIXELS, {"q_proj", "k_proj"}),
    "DINOv3ViT": (IMAGE, PIXELS, {"q_proj", "k_proj"}),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_found(name: str) -> None:
    sizes, call, layers = MODELS[name]
    torch.manual_seed(0)
    kind, config = (getattr(transformers, f"{name}{part}", None) for part in ("Model", "Config"))
    if kind is None:
        pytest.skip("this version of transformers has no such model")
    model = kind(config(**sizes)).eval()
    report = distill(model, [call], **quick(steps=3))
    assert {site.code for site in report.sites} == {"distilled"}
    assert {parameter.split(".")[-2] for parameter in changed(state_of(model), report.model)} == layers
