"""Programs that try to mislead the rewriting: their inputs, and the check that they give eager's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from monarch_compile.attention import reference
from support.capture import run_passes

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
LOWERED = "lowered"


def make_inputs(shape: tuple[int, ...] = (2, 3, 7, 4), dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    visible = torch.rand(shape[0], shape[2], generator=generator) > 0.3
    visible[:, 0] = True
    return q, k, v, visible


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, -1) @ v


def scored(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.5


class Registry:
    """A decorator that registers programs with the codes that their sites must get."""

    def __init__(self) -> None:
        self.programs: dict[Program, list[str]] = {}

    def __call__(self, *codes: str) -> Callable[[Program], Program]:
        def register(fn: Program) -> Program:
            self.programs[fn] = list(codes)
            return fn

        return register


@pytest.fixture(autouse=True)
def result_as_kernels_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Physically (batch, seq, heads, dim), as on a GPU: with block_size=1 the reference would leave eager's strides."""
    original = reference._from_blocks

    def from_blocks(*args: Any) -> Tensor:
        return original(*args).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(reference, "_from_blocks", from_blocks)


def agrees(fn: Program, shape: tuple[int, ...] = (2, 3, 7, 4), **options: Any) -> list[str]:
    """Codes of the sites of `fn`, after its results, and its inputs once it has run, were seen to be eager's."""
    own, given = make_inputs(shape), make_inputs(shape)
    expected = fn(*own)
    output, (result,) = run_passes(fn, *given, **options)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(given, own)
    return [d.code for d in result.decisions]
