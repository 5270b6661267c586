"""DINOv2 with a linear head, in the size of its trained weights and in a tiny one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from examples.images.dinov2 import DEVIATION, HEADS, LAYERS, MEAN, PATCH, WIDTH

TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
SMALL = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
POSITIONS = "embeddings.position_embeddings"


class Classifier(nn.Module):
    """Scores of classes from the class token and the mean of the patches."""

    def __init__(self, backbone: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (batch, 3, 14 h, 14 w) -> scores (batch, classes)."""
        states = self.backbone(images).last_hidden_state
        scores: Tensor = self.head(torch.cat([states[:, 0], states[:, 1:].mean(1)], -1))
        return scores


def dinov2(sizes: dict[str, int], side: int) -> nn.Module:
    """DINOv2 of some sizes for `side` x `side` patches, in random weights."""
    model: Any = Dinov2Model(Dinov2Config(**sizes, patch_size=PATCH, image_size=side * PATCH, use_mask_token=False))
    return model


def load_weights(backbone: nn.Module, weights: dict[str, Tensor], side: int) -> None:
    """Put trained weights of any grid into `backbone`: position embeddings are resized to its own, once."""
    positions = weights[POSITIONS].float()
    trained = round((positions.shape[1] - 1) ** 0.5)
    patches = positions[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(side, side), mode="bicubic", antialias=True)
    resized = torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    backbone.load_state_dict({name: x.float() for name, x in weights.items()} | {POSITIONS: resized})


def pixels(images: Tensor, side: int, device: torch.device) -> Tensor:
    """Pictures (batch, 3, size, size), uint8, as a model of `side` x `side` patches takes them, on `device`."""
    mean, deviation = (torch.tensor(x, device=device)[:, None, None] for x in (MEAN, DEVIATION))
    resized = F.interpolate(images.to(device).float() / 255, size=(side * PATCH,) * 2, mode="bilinear")
    return (resized - mean) / deviation
