"""The demo's part on images: DINOv2's features of a photograph, exact and Monarch, as colours side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from examples.images.dinov2 import PATCH, WEIGHTS, Features, normalized, read_dinov2
from examples.images.picture import colours, components, read_square, sheet, titled, write_picture
from examples.packages import PackagesMissing, installed_file
from examples.progress import median_seconds, step, table
from examples.setting import EXACT, Setting
from monarch_compile.report.explainer import explain

PHOTOGRAPH = ("imgaug", "imgaug/quokka.jpg")
SIDE = 64
"""Patches along a side: 4096 tokens, and the class token before them."""
REPEATS = 3
MONARCH = Setting("monarch", {"policy": "auto"}, "blocks are tiles of the image, whose grid is found in the graph")
ROWS = Setting(
    "monarch, rows",
    {"policy": "auto", "grid": None, "prefix": 1},
    "blocks are pieces of the image's rows, as of a text",
)
SETTINGS = (EXACT, MONARCH, ROWS)


@dataclass(frozen=True)
class Seen:
    """What one setting gave. features: of the patches, (patches, dim), float32 on the CPU."""

    setting: Setting
    call: Callable[[], Tensor]
    features: Tensor


def images_part(device: torch.device, picture: Path) -> None:
    """Compile DINOv2 under every setting, compare features and times, and save the picture.

    Raises:
        PackagesMissing: the model's package, the photograph's or pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise PackagesMissing("the photograph cannot be read without pillow: run 'pip install pillow'")
    photograph = read_square(installed_file(*PHOTOGRAPH), SIDE * PATCH)
    with step("loading DINOv2 ViT-S/14"):
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        model = Features(read_dinov2(installed_file(*WEIGHTS))).eval().to(device, dtype)
    image = normalized(photograph)[None].to(device, dtype)
    seen = [_seen(setting, model, image) for setting in SETTINGS]
    with step(f"timing DINOv2, {REPEATS} runs each"):
        seconds = median_seconds({x.setting.name: x.call for x in seen}, REPEATS)
    _print_tradeoff(seen, [seconds[x.setting.name] for x in seen])
    with step("explaining the compilation"):
        sites = explain(model, image, options=MONARCH.options).sites
    print(f"{len(sites)} attention sites, the first: {sites[0].blocking}")
    _save(photograph, seen, picture)


def _seen(setting: Setting, model: Features, image: Tensor) -> Seen:
    compiled = setting.compile(model)

    def call() -> Tensor:
        features: Tensor = compiled(image)
        return features

    with step(f"compiling DINOv2: {setting.name}"):
        features = call()
    return Seen(setting, call, features[0, 1:].float().cpu())


def change(seen: Seen, exact: Seen) -> float:
    """How far features are from the exact ones, relative to these."""
    return ((seen.features - exact.features).norm() / exact.features.norm()).item()


def _print_tradeoff(seen: Sequence[Seen], seconds: Sequence[float]) -> None:
    rows = [["DINOv2", "options", "change of features", "their cosine", "ms an image", "speed-up"]]
    for one, time in zip(seen, seconds, strict=True):
        cosine = torch.cosine_similarity(one.features, seen[0].features, dim=-1).mean().item()
        cells = [f"{change(one, seen[0]):.3f}", f"{cosine:.3f}", f"{time * 1e3:.0f}", f"{seconds[0] / time:.2f}x"]
        rows.append([one.setting.name, one.setting.spelled, *cells])
    print(f"\n{table(rows)}\n")
    for one in seen:
        print(f"{one.setting.name}: {one.setting.why}")
    print()


def _save(photograph: Tensor, seen: Sequence[Seen], path: Path) -> None:
    basis = components(seen[0].features)
    titles = [f"{x.setting.name} (change {change(x, seen[0]):.2f})" for x in seen]
    page = sheet([[photograph, *(colours(x.features, basis) for x in seen)]])
    write_picture(titled(page, ["photograph", *titles]), path)
    print(f"saved {path}: the three principal components of the exact features as colours\n")
