"""Second moments that have to be precise: inputs with a large mean, of low rank, of 16 bits, or of nothing at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monarch_compile import BlastLinearConfig, MonarchLinearConfig, compress_
from monarch_compile.linear.compression.factors import damped
from monarch_compile.linear.compression.layers import find_layers
from monarch_compile.linear.compression.moments import moments_of

WIDTH = 256
MONARCH = MonarchLinearConfig(num_blocks=4, rank=16)
BLAST = BlastLinearConfig(num_blocks=4, rank=16, iterations=1)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [MONARCH, BLAST])
@pytest.mark.parametrize(
    "x", [100 + 1e-3 * drawn(100, WIDTH), 100 + 100 * drawn(1, WIDTH)], ids=["large mean", "one row"]
)
def test_inputs_of_nearly_one_direction_are_fitted_to(config: Any, x: Tensor) -> None:
    """What rounding makes of their moments in float32 has negative eigenvalues."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    (layer,) = compress_(model, config, calls=[x], progress=False).layers
    assert layer.output_error is not None
    assert layer.output_error < 1e-4


@pytest.mark.parametrize("config", [MONARCH, BLAST])
def test_autocast_does_not_round_the_moments(config: Any) -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(WIDTH, WIDTH))]
    models.append(copy.deepcopy(models[0]))
    errors = []
    for model, enabled in zip(models, (False, True), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            (layer,) = compress_(model, config, calls=[drawn(100, WIDTH) + 3], progress=False).layers
        errors.append(layer.output_error)
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_moments_are_those_of_float64() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8))
    x = 100 + 1e-2 * drawn(50, WIDTH)
    (found,) = moments_of(model, find_layers(model, None)[0], [((x,), {})]).values()
    torch.testing.assert_close(found, x.double().mT @ x.double() / 50, rtol=1e-13, atol=0)


@pytest.mark.parametrize("config", [MONARCH, BLAST])
def test_of_zeros_the_weight_decides(config: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    plain = copy.deepcopy(model)
    (found,) = compress_(model, config, calls=[torch.zeros(4, WIDTH)], progress=False).layers
    (wanted,) = compress_(plain, config, progress=False).layers
    assert found.weight_error == pytest.approx(wanted.weight_error, rel=1e-4)
    assert found.output_error == 0


def test_a_moment_of_zeros_is_damped_to_the_identity() -> None:
    assert torch.equal(damped(torch.zeros(3, 3, dtype=torch.float64)), torch.eye(3, dtype=torch.float64))


def test_what_is_compressed_in_inference_mode_can_be_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    with torch.inference_mode():
        compress_(model, MONARCH, calls=[torch.randn(4, WIDTH)], progress=False)
    model(drawn(2, WIDTH)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
