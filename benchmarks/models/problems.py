"""What is measured: models at lengths, and the forms of their attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.models.architectures import Architecture
from benchmarks.speed.problems import AutoForm
from benchmarks.speed.problems import Problem as Attention

VIT = Architecture("vit-l", depth=24, width=1024, num_heads=16, modulated=False)
DIT = Architecture("dit-xl", depth=28, width=1152, num_heads=16, modulated=True)
TINY_VIT = Architecture("vit-tiny", depth=2, width=64, num_heads=2, modulated=False)
TINY_DIT = Architecture("dit-tiny", depth=2, width=48, num_heads=2, modulated=True)


@dataclass(frozen=True)
class Problem:
    """One forward pass of a model on (batch, tokens, width)."""

    architecture: Architecture
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


FORMS = (AutoForm(window=1), AutoForm(window=None))


def words(form: AutoForm) -> str:
    """A form as rows are named."""
    return f"monarch window={form.window}"


@dataclass(frozen=True)
class Preset:
    """Every problem is measured with exact attention and in every form, under one policy."""

    device: str
    problems: tuple[Problem, ...]
    policy: str = "auto"
    forms: tuple[AutoForm, ...] = FORMS


_SHAPES = ((VIT, 1, 4096), (VIT, 4, 4096), (VIT, 1, 16384), (DIT, 1, 4096), (DIT, 1, 16384))
_TINY_SHAPES: Sequence[tuple[Architecture, int, int]] = ((TINY_VIT, 2, 96), (TINY_DIT, 1, 96))
PRESETS: dict[str, Preset] = {
    "h200": Preset("cuda", tuple(Problem(*shape) for shape in _SHAPES)),
    "tiny": Preset("cpu", tuple(Problem(*shape, "float32") for shape in _TINY_SHAPES), policy="always"),
    "tiny-cuda": Preset("cuda", tuple(Problem(*shape) for shape in _TINY_SHAPES), policy="always"),
}
