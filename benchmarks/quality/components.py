"""Features of a photograph as a picture: their three principal components as colours, exact and Monarch side by side.

``python -m benchmarks.quality.components --output features.png``
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.dinov2 import PATCH, TRAINED_GRID, Features, normalized, read_dinov2
from benchmarks.quality.metrics import relative_error
from benchmarks.quality.photographs import SCENES, read_photograph
from benchmarks.quality.variants import VARIANTS, tiled
from examples.progress import step

SIZE, GAP = 224, 4
COLOURS = 256
SHOWN = ("rows", "default", "tiles_4x4_plus")
HEAD = 18
PERCENTILES = (1.0, 99.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture: a row for each photograph, the photograph, exact features and those of some variants."""
    from PIL import Image

    args = _arguments(argv)
    model = Features(read_dinov2()).eval()
    photographs = [read_photograph(SCENES[index], args.grid * PATCH) for index in args.photographs]
    rows: list[list[Tensor]] = [[photograph] for photograph in photographs]
    with step("exact"):
        references = features(model, photographs)
    bases = [components(reference) for reference in references]
    every = {"exact": references, **_of_variants(model, photographs, args.variants)}
    for found in every.values():
        for row, basis, one in zip(rows, bases, found, strict=True):
            row.append(colours(one, basis))
    errors = {name: [relative_error(*pair) for pair in zip(references, every[name], strict=True)] for name in every}
    titles = ["photograph", *(f"{name} (error {np.mean(errors[name]):.2f})" for name in every)]
    titled(Image.fromarray(sheet(rows)), titles).quantize(COLOURS).save(args.output, optimize=True)


def _of_variants(model: Features, photographs: Sequence[Tensor], names: Sequence[str]) -> dict[str, list[Tensor]]:
    found = {}
    for variant in (variant for variant in VARIANTS if variant.name in names and variant.build is tiled):
        torch._dynamo.reset()
        options: Mapping[str, Any] = {"policy": "always", **variant.options}
        with step(variant.name):
            found[variant.name] = features(
                torch.compile(model, backend="monarch", options=dict(options), dynamic=False), photographs
            )
    return found


@torch.no_grad()
def features(model: Any, photographs: Sequence[Tensor]) -> list[Tensor]:
    """The patches' features (patches, dim) of photographs (3, size, size) in [0, 1]."""
    return [model(normalized(photograph)[None])[0, 1:] for photograph in photographs]


def components(reference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three principal components of features (n, dim): mean (dim,), directions (dim, 3), and the range of each (3,).

    Others are shown in the same colours, so that what differs is seen.
    """
    x = reference.double()
    mean = x.mean(0)
    _, _, directions = torch.linalg.svd(x - mean, full_matrices=False)
    directions = directions[:3].T
    directions = directions * torch.where(directions.sum(0) < 0, -1.0, 1.0)  # their sign is free: a picture's is not
    low, high = np.percentile(((x - mean) @ directions).numpy(), PERCENTILES, axis=0)
    return mean, directions, torch.from_numpy(low), torch.from_numpy(high)


def colours(features: Tensor, basis: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Features (side * side, dim) as an image (3, side, side) in [0, 1]."""
    mean, directions, low, high = basis
    side = round(len(features) ** 0.5)
    values = ((features.double() - mean) @ directions - low) / (high - low)
    return values.clamp(0, 1).T.reshape(3, side, side)


def sheet(rows: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """Images (3, h, w) in [0, 1], in rows, as one (height, width, 3) uint8; each `SIZE` a side, in white margins."""
    page = np.full((len(rows) * (SIZE + GAP) - GAP, len(rows[0]) * (SIZE + GAP) - GAP, 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            mode = {"mode": "nearest"} if image.shape[-1] < SIZE else {"mode": "bilinear", "antialias": True}
            resized: Any = torch.nn.functional.interpolate(image[None].float(), size=(SIZE, SIZE), **mode)  # type: ignore[arg-type]
            cell = (255 * resized[0].clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
            page[y * (SIZE + GAP) :, x * (SIZE + GAP) :][:SIZE, :SIZE] = cell
    return page


def titled(image: Any, titles: Sequence[str]) -> Any:
    """The sheet (a PIL image) with a title over each column."""
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (image.width, image.height + HEAD), "white")
    page.paste(image, (0, HEAD))
    for column, title in enumerate(titles):
        ImageDraw.Draw(page).text((column * (SIZE + GAP) + GAP, GAP), title, fill="black")
    return page


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.components", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--grid", type=int, default=TRAINED_GRID)
    parser.add_argument("--photographs", type=int, nargs="+", default=[1, 2], help="places in photographs.SCENES")
    choices = [variant.name for variant in VARIANTS if variant.build is tiled]
    parser.add_argument("--variants", nargs="+", choices=choices, default=list(SHOWN))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
