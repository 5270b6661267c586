"""Photographs, as square images: scenes that PyPI packages ship, and wallpapers of Debian's packages.

Wallpapers have large and smooth backgrounds, scenes are full of things: forms of attention differ on them. They are
judged apart.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.quality.task import TaskUnavailable, package_file
from examples.images.picture import read_square

BACKGROUNDS = Path(os.environ.get("BACKGROUNDS", "/usr/share/backgrounds"))
"""Where Debian's packages put wallpapers, or where they were unpacked."""
DEBIAN_PACKAGES = ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds")


@dataclass(frozen=True)
class Photograph:
    """A file of an installed PyPI package, or of a Debian package where `package` is None."""

    package: str | None
    path: str


SCENES = (
    Photograph("scikit-learn", "sklearn/datasets/images/china.jpg"),
    Photograph("scikit-image", "skimage/data/astronaut.png"),
    Photograph("imgaug", "imgaug/quokka.jpg"),
    Photograph("scikit-image", "skimage/data/coffee.png"),
    Photograph("scikit-learn", "sklearn/datasets/images/flower.jpg"),
    Photograph("scikit-image", "skimage/data/chelsea.png"),
)
WALLPAPERS = (
    Photograph(None, "Bridge_by_Sander_Klootwijk.jpg"),
    Photograph(None, "mate/nature/LadyBird.jpg"),
    Photograph(None, "Kleiber_by_Lukas_Baubkus.jpg"),
    Photograph(None, "mate/nature/Garden.jpg"),
    Photograph(None, "friends_by_Aitzol_Berasategi.jpg"),
    Photograph(None, "Wine_by_Jakkub_Mede.jpg"),
)
CALIBRATION = (
    Photograph("scikit-image", "skimage/data/motorcycle_left.png"),
    Photograph("scikit-image", "skimage/data/rocket.jpg"),
)


def backgrounds() -> list[Photograph]:
    """All photographs of the Debian packages.

    Raises:
        TaskUnavailable: they are not installed.
    """
    found = [*BACKGROUNDS.glob("*_by_*.jpg"), *BACKGROUNDS.glob("mate/nature/*.jpg")]
    if not found:
        raise TaskUnavailable(f"no wallpapers in {BACKGROUNDS}: apt-get install {' '.join(DEBIAN_PACKAGES)}")
    return [Photograph(None, str(path.relative_to(BACKGROUNDS))) for path in sorted(found)]


def read_photograph(photograph: Photograph, size: int) -> Tensor:
    """The middle of a photograph as (3, size, size) in [0, 1].

    Raises:
        TaskUnavailable: its package is not installed.
    """
    return read_square(_file(photograph), size)


def _file(photograph: Photograph) -> Path:
    if photograph.package is not None:
        return package_file(photograph.package, photograph.path)
    path = BACKGROUNDS / photograph.path
    if not path.exists():
        raise TaskUnavailable(f"no {path}: apt-get install {' '.join(DEBIAN_PACKAGES)}")
    return path
