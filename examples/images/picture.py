"""Features as a picture: their three principal components as colours, photographs and features side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZE, GAP, HEAD = 224, 4, 18
"""Pixels: the side of an image, the margin between two, the height of the titles."""
COLOURS = 256
PERCENTILES = (1.0, 99.0)


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


def titled(page: np.ndarray, titles: Sequence[str]) -> Any:
    """A sheet as a PIL image, with a title over each column."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (page.shape[1], page.shape[0] + HEAD), "white")
    image.paste(Image.fromarray(page), (0, HEAD))
    for column, title in enumerate(titles):
        ImageDraw.Draw(image).text((column * (SIZE + GAP) + GAP, GAP), title, fill="black")
    return image


def write_picture(image: Any, path: Path) -> None:
    """A PIL image as a PNG file of few colours; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(COLOURS).save(path, optimize=True)


def read_square(path: Path, size: int) -> Tensor:
    """The middle of a photograph as (3, size, size) in [0, 1]."""
    from PIL import Image, ImageOps

    square = ImageOps.fit(Image.open(path).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)


def read_on_white(path: Path, size: int) -> Tensor:
    """A whole picture, on white where it is transparent or does not fill the square, as (3, size, size) in [0, 1]."""
    from PIL import Image, ImageOps

    picture = Image.open(path).convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    square = ImageOps.pad(opaque, (size, size), Image.Resampling.BICUBIC, color="white")
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)
