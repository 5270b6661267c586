"""Photographs that PyPI packages ship, as square images."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.task import package_file

EVALUATION = (
    ("scikit-learn", "sklearn/datasets/images/china.jpg"),
    ("scikit-image", "skimage/data/astronaut.png"),
    ("imgaug", "imgaug/quokka.jpg"),
    ("scikit-image", "skimage/data/coffee.png"),
    ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    ("scikit-image", "skimage/data/chelsea.png"),
)
CALIBRATION = (("scikit-image", "skimage/data/motorcycle_left.png"), ("scikit-image", "skimage/data/rocket.jpg"))
"""(package, path) of each: a temple, a person, an animal, a cup, a flower, a cat; a motorcycle, a launch pad."""


def read_photograph(package: str, path: str, size: int) -> Tensor:
    """The middle of a photograph as (3, size, size) in [0, 1]."""
    from PIL import Image, ImageOps

    image = Image.open(package_file(package, path)).convert("RGB")
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)
