"""Whatever is written around two transforms and an inverse one, the numbers and gradients stay."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.capture import run_passes
from support.random_convolutions import Random, inputs, random_convolutions


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(random_convolutions(), st.integers(1, 3), st.integers(1, 3))
def test_numbers_and_gradients_stay(program: Random, batch: int, channels: int) -> None:
    tensors = inputs(batch, channels)
    expected = program(*tensors)
    if not expected.numel():
        return
    output, (result,) = run_passes(program, *tensors)
    assert [d.code for d in result.decisions] == ["lowered"]
    assert not [node for node in result.after.graph.nodes if "fft" in str(node.target)]
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    own = torch.autograd.grad((output * weight).sum(), tensors, allow_unused=True)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors, allow_unused=True)
    for one, other in zip(own, wanted, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
