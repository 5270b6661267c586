"""Labelled pictures: Tux Paint's stamps, whose folders are their classes, and generated ones."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.packages import PackagesMissing

DEBIAN_PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("/usr/share/tuxpaint/stamps")
"""Where Debian's package puts them."""
SIZE = 320
"""Pixels along a side of a stamp as it is kept; a model's input is resized from it."""
LEAST, MOST = 12, 64
"""Pictures of a class: classes of fewer are left out, of larger ones so many are taken."""
UNSEEN_SHARE = 4
"""One picture of so many is kept to judge by."""
QUALITY = 88
"""Of JPEG files."""
COLOURS = torch.tensor([[220, 40, 40], [40, 200, 60], [50, 70, 220], [230, 210, 40]], dtype=torch.uint8)
"""Of generated pictures, by class."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures (number, 3, size, size), uint8, their classes (number,), int64, and which are to judge by, (number,),
    bool; `names` of the classes."""

    images: Tensor
    labels: Tensor
    unseen: Tensor
    names: tuple[str, ...]


@dataclass(frozen=True)
class Stamp:
    """The JPEG file of a stamp on white, and the name of its class."""

    data: bytes
    name: str


def read_stamps(folder: Path = STAMPS) -> list[Stamp]:
    """The stamps of `folder`, class by class, in a fixed order.

    Raises:
        PackagesMissing: there are none.
    """
    found = {top.name: sorted(top.rglob("*.png")) for top in sorted(folder.glob("*")) if top.is_dir()}
    classes = {name: _spread(paths) for name, paths in found.items() if len(paths) >= LEAST}
    if not classes:
        raise PackagesMissing(f"no stamps in {folder}: apt-get install {DEBIAN_PACKAGE}, or name a pack")
    return [Stamp(_jpeg(path), name) for name, paths in classes.items() for path in paths]


def decoded(stamps: Sequence[Stamp]) -> Pictures:
    """The pixels of stamps; of each class, every `UNSEEN_SHARE`-th is unseen."""
    from PIL import Image

    names = tuple(dict.fromkeys(stamp.name for stamp in stamps))
    images = [torch.from_numpy(np.array(Image.open(io.BytesIO(stamp.data)))).permute(2, 0, 1) for stamp in stamps]
    labels = torch.tensor([names.index(stamp.name) for stamp in stamps])
    places = torch.cat([torch.arange(int((labels == label).sum())) for label in range(len(names))])
    return Pictures(torch.stack(images), labels, places % UNSEEN_SHARE == UNSEEN_SHARE - 1, names)


def generated(number: int, size: int, seed: int = 0) -> Pictures:
    """Noise with a square in the colour of its class, somewhere: what a tiny model learns in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (number, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.arange(number) % len(COLOURS)
    side = size // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = torch.randint(size - side + 1, (2,), generator=generator).tolist()
        image[:, top : top + side, left : left + side] = COLOURS[label][:, None, None]
    unseen = torch.arange(number) // len(COLOURS) % UNSEEN_SHARE == UNSEEN_SHARE - 1
    return Pictures(images, labels, unseen, ("red", "green", "blue", "yellow"))


def _spread(paths: Sequence[Path]) -> list[Path]:
    """At most `MOST` of them, evenly spread: neighbours are much alike."""
    number = min(MOST, len(paths))
    return [paths[place * len(paths) // number] for place in range(number)]


def _jpeg(path: Path) -> bytes:
    from PIL import Image, ImageOps

    stamp = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", stamp.size, "white")
    square = ImageOps.pad(Image.alpha_composite(white, stamp).convert("RGB"), (SIZE, SIZE), color="white")
    file = io.BytesIO()
    square.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
