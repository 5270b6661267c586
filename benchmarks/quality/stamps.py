"""DINOv2 ViT-S/14 on labelled pictures: are the nearest neighbours of a picture still of its kind?

The pictures are stamps of Tux Paint, on a white ground, resized to the 37 x 37 patches of training; a picture's label
is the folder that it lies in. Leave-one-out: each picture is labelled by its nearest ones among all others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.quality.dinov2 import BLOCK_SIZE, BUDGET
from benchmarks.quality.metrics import relative_error
from benchmarks.quality.task import Model, Task, TaskUnavailable, package_file
from examples.images.dinov2 import LAYERS, PATCH, TRAINED_GRID, WEIGHTS, Features, normalized, read_dinov2
from examples.images.picture import read_on_white
from examples.stamps.pictures import DEBIAN_PACKAGE, STAMPS

KINDS = (
    "animals/birds",
    "animals/fish",
    "animals/insects",
    "animals/mammals/bovines",
    "food/fruit",
    "food/vegetables",
    "household/tools",
    "plants/flowers",
)
OF_EACH = 9
CALIBRATION = ("vehicles/auto", "sports")
"""Kinds whose first stamps calibration sees."""
NEIGHBOURS = 5


@dataclass(frozen=True, eq=False)
class Labelled:
    """An image (1, 3, size, size), normalised, and the number of its kind."""

    image: Tensor
    label: int


def load(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Task:
    """The task.

    Raises:
        TaskUnavailable: the stamps, or the weights, are not installed.
    """
    pictures = [
        Labelled(_image(path).to(device, dtype), label)
        for label, kind in enumerate(KINDS)
        for path in stamps_of(kind)[:OF_EACH]
    ]
    calibration = [_image(stamps_of(kind)[0]).to(device, dtype) for kind in CALIBRATION]
    judge = Judge(Features(read_dinov2(package_file(*WEIGHTS)).to(device, dtype)).eval(), pictures)
    return Task(
        name="dinov2_stamps",
        title=f"DINOv2 ViT-S/14, {len(pictures)} stamps of {len(KINDS)} kinds, N = {TRAINED_GRID} x {TRAINED_GRID} + 1",
        sites=LAYERS,
        model=judge.exact,
        calibration_inputs=tuple(((image,), {}) for image in calibration),
        metric=lambda reference, output: relative_error(reference[:, 0], output[:, 0]),
        metric_unit="relative error of the class token's features",
        budget=BUDGET,
        evaluate=judge.evaluate,
        primary="class_knn",
        better="higher",
        block_size=BLOCK_SIZE,
        min_runs=1,
    )


def stamps_of(kind: str) -> list[Path]:
    """The pictures in a folder of stamps, by name.

    Raises:
        TaskUnavailable: there is no such folder.
    """
    folder = STAMPS / kind
    if not folder.is_dir():
        raise TaskUnavailable(f"no {folder}: apt-get install {DEBIAN_PACKAGE}")
    return sorted(folder.glob("*.png"))


def _image(path: Path) -> Tensor:
    return normalized(read_on_white(path, TRAINED_GRID * PATCH))[None]


class Judge:
    """Judges features by the labels of the nearest neighbours, and by the exact model's."""

    def __init__(self, exact: nn.Module, pictures: Sequence[Labelled]) -> None:
        self.exact, self.pictures = exact, pictures

    @functools.cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """The exact model's `features`."""
        return self.features(self.exact)

    @torch.no_grad()
    def features(self, model: Model) -> tuple[Tensor, Tensor]:
        """The class token's features of each picture, and the mean of its patches': both (pictures, dim)."""
        found = [model(picture.image)[0] for picture in self.pictures]
        return torch.stack([x[0] for x in found]), torch.stack([x[1:].mean(0) for x in found])

    def evaluate(self, model: Model) -> dict[str, float]:
        """The share of pictures that their neighbours label rightly, by either of `features`, and the class token's
        relative error: a mean over pictures."""
        labels = torch.tensor([picture.label for picture in self.pictures])
        of_class, of_patches = self.features(model)
        errors = [relative_error(x, y) for x, y in zip(self.reference[0], of_class, strict=True)]
        return {
            "class_knn": labelled_rightly(of_class, labels),
            "patches_knn": labelled_rightly(of_patches, labels),
            "class_error": sum(errors) / len(errors),
        }


def labelled_rightly(features: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Share of the rows of features (n, dim) whose label (n,) is that of most of the `neighbours` most similar others.

    Of labels with as many votes, the one whose neighbours are the most similar in sum counts.
    """
    unit = nn.functional.normalize(features.double().cpu(), dim=-1)
    similar = (unit @ unit.T).fill_diagonal_(float("-inf"))
    values, nearest = similar.topk(min(neighbours, len(labels) - 1), -1)
    votes = nn.functional.one_hot(labels[nearest], int(labels.max()) + 1).double()  # (n, neighbours, kinds)
    tie_break = (values[..., None] + 1) / 2 / (1 + neighbours)  # less than one vote in all
    found = (votes * (1 + tie_break)).sum(1).argmax(-1)
    return float((found == labels).double().mean())
