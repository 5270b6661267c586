"""What is measured: models at lengths, and the forms of their attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.models.architectures import Architecture, Described, num_tokens
from benchmarks.models.images import ImageDiffuser, ImageEncoder
from benchmarks.models.joint import JointDiffuser
from benchmarks.models.video import VideoDiffuser
from benchmarks.speed.problems import AutoForm
from benchmarks.speed.problems import Problem as Attention
from monarch_compile.attention.grids import Grid
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import chosen_form
from monarch_compile.config import MonarchConfig
from monarch_compile.cost.devices import Device

VIT = Architecture("vit-l", depth=24, width=1024, num_heads=16, modulated=False)
DIT = Architecture("dit-xl", depth=28, width=1152, num_heads=16, modulated=True)
TINY_VIT = Architecture("vit-tiny", depth=2, width=64, num_heads=2, modulated=False)
TINY_DIT = Architecture("dit-tiny", depth=2, width=48, num_heads=2, modulated=True)

DINO_S = ImageEncoder("dinov2-s", depth=12, width=384, num_heads=6, grid=(64, 64))
DINO_L = ImageEncoder("dinov2-l", depth=24, width=1024, num_heads=16, grid=(64, 64))
IMAGE_DIT = ImageDiffuser("dit-xl/2", depth=28, width=1152, num_heads=16, grid=(64, 64))
FLUX = JointDiffuser(
    "flux-6", depth=6, double=2, width=3072, num_heads=24, grid=(64, 64), rotary_dims=(16, 56, 56), prefix=512
)
WAN = VideoDiffuser("wan-4", depth=4, width=1536, num_heads=12, hidden=8960, grid=(21, 30, 52), text=512)
"""Of Flux and Wan, as many layers as the name says: the models themselves have more."""
TINY_IMAGES: tuple[Described, ...] = (
    ImageEncoder("dinov2-tiny", depth=2, width=32, num_heads=2, grid=(8, 8)),
    ImageDiffuser("dit-tiny/2", depth=2, width=32, num_heads=2, grid=(8, 8)),
    JointDiffuser("flux-tiny", 2, 1, width=32, num_heads=2, grid=(8, 8), rotary_dims=(4, 6, 6), prefix=7),
    VideoDiffuser("wan-tiny", depth=2, width=32, num_heads=2, hidden=48, grid=(4, 4, 6), text=7),
)


@dataclass(frozen=True)
class Problem:
    """One forward pass of a model on (batch, tokens, width)."""

    architecture: Described
    batch: int
    tokens: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.architecture.name} {self.batch}x{self.tokens}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def attention(self) -> Attention:
        """The attention of one block, alone."""
        heads, dim = self.architecture.num_heads, self.architecture.head_dim
        return Attention(self.batch, self.tokens, heads, dim, self.dtype)


@dataclass(frozen=True)
class WindowForm:
    """A window that is given, on pieces of a sequence; the block size is what "auto" gives."""

    form: AutoForm

    def __str__(self) -> str:
        return f"monarch window={self.form.window}"

    def options(self, policy: str) -> Mapping[str, Any]:
        """Options of the backend."""
        return {"policy": policy, "num_iters": self.form.num_iters, "window": self.form.window}

    def ir(self, problem: Problem, device: Device) -> MonarchAttention:
        """The attention of one block."""
        return self.form.ir(problem.attention, device)


@dataclass(frozen=True)
class FoundForm:
    """The default form, for which the compiler must find the grid, under a policy of its own."""

    policy: str

    def __str__(self) -> str:
        return f"monarch {self.policy}"

    def options(self, policy: str) -> Mapping[str, Any]:
        """Options of the backend; the preset's policy does not count."""
        return {"policy": self.policy}

    def ir(self, problem: Problem, device: Device) -> MonarchAttention:
        """The attention of one block, on the grid that there is to be found."""
        architecture, heads, dim = problem.architecture, problem.architecture.num_heads, problem.architecture.head_dim
        grid = None if architecture.grid is None else Grid(architecture.prefix, architecture.grid)
        form = chosen_form(MonarchConfig(), device.kind, problem.tokens, grid)
        return MonarchAttention(
            *(problem.batch, heads, heads, problem.tokens, problem.tokens, dim, dim),
            dtype=problem.torch_dtype,
            form=form,
            grid=architecture.grid,
            scale=dim**-0.5,
        )


ModelForm = WindowForm | FoundForm
FORMS: tuple[ModelForm, ...] = (WindowForm(AutoForm(window=1)), WindowForm(AutoForm(window=None)))
FOUND: tuple[ModelForm, ...] = (FoundForm("auto"), FoundForm("always"))


@dataclass(frozen=True)
class Preset:
    """Every problem is measured with exact attention and in every form; `policy`: of forms that have none.

    trains: whether a call is always a step of training.
    """

    device: str
    problems: tuple[Problem, ...]
    policy: str = "auto"
    forms: tuple[ModelForm, ...] = FORMS
    trains: bool = False


_SHAPES = ((VIT, 1, 4096), (VIT, 4, 4096), (VIT, 1, 16384), (DIT, 1, 4096), (DIT, 1, 16384))
_TINY_SHAPES: Sequence[tuple[Architecture, int, int]] = ((TINY_VIT, 2, 96), (TINY_DIT, 1, 96))
_TRAINED = ((VIT, 1, 4096), (VIT, 4, 4096), (VIT, 1, 16384), (VIT, 2, 16384))
_IMAGES: Sequence[tuple[Described, int]] = (
    *((DINO_S, batch) for batch in (1, 4)),
    *((DINO_L, batch) for batch in (1, 4)),
    (IMAGE_DIT, 1),
    (FLUX, 1),
    (WAN, 1),
)


def on_grid(architecture: Described, batch: int, dtype: str = "bfloat16") -> Problem:
    """All tokens of an architecture's grid, and its prefix."""
    return Problem(architecture, batch, num_tokens(architecture), dtype)


PRESETS: dict[str, Preset] = {
    "h200": Preset("cuda", tuple(Problem(*shape) for shape in _SHAPES)),
    "training": Preset("cuda", tuple(Problem(*shape) for shape in _TRAINED), trains=True),
    "tiny-training": Preset("cpu", (Problem(TINY_VIT, 2, 96, "float32"),), policy="always", trains=True),
    "tiny": Preset("cpu", tuple(Problem(*shape, "float32") for shape in _TINY_SHAPES), policy="always"),
    "tiny-cuda": Preset("cuda", tuple(Problem(*shape) for shape in _TINY_SHAPES), policy="always"),
    "images": Preset("cuda", tuple(on_grid(*row) for row in _IMAGES), forms=FOUND),
    "tiny-images": Preset("cpu", tuple(on_grid(x, 1, "float32") for x in TINY_IMAGES), forms=FOUND),
    "tiny-images-cuda": Preset("cuda", tuple(on_grid(x, 1) for x in TINY_IMAGES), forms=FOUND),
}
