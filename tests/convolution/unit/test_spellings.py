"""Every spelling of a long convolution becomes the operator, which gives eager's numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.capture import run_passes
from support.convolutions import ONCE, TWICE, Program, circular, circular_correlation, cut, inputs
from torch import Tensor

from monarch_compile.convolution.op import CONVOLUTION_OP

LENGTHS = (1, 2, 3, 127, 1000)
CASES = [*((program, 1) for program in ONCE), *((program, 2) for program in TWICE)]
IDS = [program.__name__ for program, _ in CASES]


def _gradients(output: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64).reshape(output.shape).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), tensors, allow_unused=True)


def _check(program: Program, num_ops: int, tensors: tuple[Tensor, ...], tolerance: float) -> None:
    output, (result,) = run_passes(program, *tensors)
    assert [(d.family, d.status, d.code) for d in result.decisions if d.status != "lowered"] == []
    targets = [node.target for node in result.after.graph.nodes]
    assert targets.count(CONVOLUTION_OP) == num_ops
    assert not [target for target in targets if "fft" in str(target)]
    expected = program(*tensors)
    assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
    _assert_close(output, expected, tolerance)
    for own, wanted in zip(_gradients(output, tensors), _gradients(expected, tensors), strict=True):
        assert (own is None) == (wanted is None)
        if wanted is not None:
            _assert_close(own, wanted, tolerance)


def _assert_close(own: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = float(wanted.detach().abs().max()) + 1e-30
    assert float((own - wanted).detach().abs().max()) <= tolerance * max(scale, 1.0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("program", "num_ops"), CASES, ids=IDS)
def test_it_is_lowered(program: Program, num_ops: int, length: int) -> None:
    _check(program, num_ops, inputs(length), 1e-11)


@pytest.mark.parametrize(("program", "num_ops"), CASES, ids=IDS)
def test_in_float32(program: Program, num_ops: int) -> None:
    _check(program, num_ops, inputs(100, torch.float32), 2e-5)


@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (1, 4), (3, 1)])
@pytest.mark.parametrize(("program", "num_ops"), CASES, ids=IDS)
def test_with_a_batch_or_a_channel_of_one(program: Program, num_ops: int, batch: int, channels: int) -> None:
    _check(program, num_ops, inputs(12, batch=batch, channels=channels), 1e-11)


@pytest.mark.parametrize("length", [5, 63, 999])
@pytest.mark.parametrize("program", [circular, circular_correlation, cut])
def test_odd_transforms(program: Program, length: int) -> None:
    _check(program, 1, inputs(length), 1e-11)
