"""DINOv2 ViT-S/14 on photographs: are the features of patches and of the class token still those of the exact model,
and is a patch still found in a warped copy of the photograph?

Resized photographs give grids of 37 x 37 patches, the one of training, to 128 x 128. There are no labels: no package
was found that ships labelled photographs of this size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.quality.metrics import cosine_distance, relative_error
from benchmarks.quality.photographs import CALIBRATION, SCENES, WALLPAPERS, read_photograph
from benchmarks.quality.task import Model, Task, package_file
from benchmarks.quality.warps import inner_homography, project, warped
from examples.images.dinov2 import LAYERS, PATCH, TRAINED_GRID, WEIGHTS, Features, normalized, read_dinov2

CLOSE = 1 / 16
BLOCK_SIZE = 64
BUDGET = 0.1


@dataclass(frozen=True)
class Effort:
    """What is affordable on a CPU: photographs to judge by, and the least number of timed runs."""

    photographs: int
    runs: int


EFFORTS = {37: Effort(6, 5), 64: Effort(4, 2), 128: Effort(1, 1)}
"""By the grid's side."""


@dataclass(frozen=True, eq=False)
class View:
    """A photograph and a warped copy of it, both (1, 3, size, size), normalised.

    truth: (patches, 2), where the middle of each patch of the copy is in the photograph, (x, y) in patches.
    """

    photograph: Tensor
    copy: Tensor
    truth: Tensor


def load(
    grid: int = TRAINED_GRID, wallpapers: bool = False, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Task:
    """The task with `grid` x `grid` patches."""
    effort, photographs = EFFORTS[grid], WALLPAPERS if wallpapers else SCENES
    views = [
        make_view(read_photograph(photograph, grid * PATCH), seed, device, dtype)
        for seed, photograph in enumerate(photographs[: effort.photographs if device == "cpu" else None])
    ]
    calibration = [
        normalized(read_photograph(photograph, grid * PATCH))[None].to(device, dtype) for photograph in CALIBRATION
    ]
    judge = Judge(Features(read_dinov2(package_file(*WEIGHTS)).to(device, dtype)).eval(), views)
    return Task(
        name=f"dinov2_{grid**2 + 1}" + "_wallpapers" * wallpapers,
        title=f"DINOv2 ViT-S/14, {'wallpapers' if wallpapers else 'photographs'}, N = {grid} x {grid} + 1",
        sites=LAYERS,
        model=judge.exact,
        calibration_inputs=tuple(((image,), {}) for image in calibration),
        metric=lambda reference, output: relative_error(reference[:, 1:], output[:, 1:]),
        metric_unit="relative error of the patches' features",
        budget=BUDGET,
        evaluate=judge.evaluate,
        primary="patch_error",
        better="lower",
        block_size=BLOCK_SIZE,
        min_runs=effort.runs,
    )


class Judge:
    """Judges features by the exact model's, and by the known warp."""

    def __init__(self, exact: nn.Module, views: Sequence[View]) -> None:
        self.exact, self.views = exact, views

    @functools.cached_property
    def reference(self) -> list[Tensor]:
        """The exact model's features of each view's photograph and copy."""
        return self._features(self.exact)

    def evaluate(self, model: Model) -> dict[str, float]:
        """Relative error and cosine of the patches' features, the class token's relative error, and the share of the
        copies' patches that are found in the photographs: means over images."""
        found = self._features(model)
        pairs = list(zip(self.reference, found, strict=True))
        views = zip(found[0::2], found[1::2], self.views, strict=True)
        return {
            "patch_error": _mean([relative_error(x[1:], y[1:]) for x, y in pairs]),
            "cosine": 1 - _mean([cosine_distance(x[1:], y[1:]) for x, y in pairs]),
            "class_error": _mean([relative_error(x[0], y[0]) for x, y in pairs]),
            "matched": _mean([matched(copy[1:], photograph[1:], view.truth) for photograph, copy, view in views]),
        }

    @torch.no_grad()
    def _features(self, model: Model) -> list[Tensor]:
        return [model(image)[0] for view in self.views for image in (view.photograph, view.copy)]


def matched(copy: Tensor, photograph: Tensor, truth: Tensor) -> float:
    """Share of the copy's patches whose most similar patch of the photograph is within `CLOSE` sides of `truth`.

    copy, photograph: features (patches, dim) of square grids. truth: as in `View`.
    """
    side = round(len(photograph) ** 0.5)
    first, second = (nn.functional.normalize(x.float(), dim=-1) for x in (copy, photograph))
    nearest = torch.cat([(rows @ second.T).argmax(-1) for rows in first.split(4096)]).cpu()
    places = torch.stack([nearest % side, nearest // side], -1)
    return ((places - truth).norm(dim=-1) <= CLOSE * side).double().mean().item()


def make_view(image: Tensor, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> View:
    """A photograph (3, size, size) in [0, 1] and its warped copy."""
    size = image.shape[-1]
    warp = inner_homography(size, size, seed)
    photograph, copy = (normalized(x)[None].to(device, dtype) for x in (image, warped(image, warp)))
    return View(photograph, copy, patches_of_copy(size // PATCH, warp))


def patches_of_copy(side: int, warp: Tensor) -> Tensor:
    """`View.truth` of a homography of pixels from the photograph to the copy; float64."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    middles = torch.stack([columns.flatten(), rows.flatten()], -1) * PATCH + (PATCH - 1) / 2
    return (project(middles, warp.inverse()) - (PATCH - 1) / 2) / PATCH


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
