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

from benchmarks.quality.metrics import relative_error
from benchmarks.quality.photographs import SCENES, read_photograph
from benchmarks.quality.task import package_file
from benchmarks.quality.variants import VARIANTS, tiled
from examples.images.dinov2 import PATCH, TRAINED_GRID, WEIGHTS, Features, normalized, read_dinov2
from examples.images.picture import colours, components, sheet, titled, write_picture
from examples.progress import step

SHOWN = ("rows", "default", "tiles_4x4_plus")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the picture: a row for each photograph, the photograph, exact features and those of some variants."""
    args = _arguments(argv)
    model = Features(read_dinov2(package_file(*WEIGHTS))).eval()
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
    write_picture(titled(sheet(rows), titles), args.output)


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
