"""Long convolutions through `torch.compile(backend="monarch")` on a CPU: numbers, gradients, lengths, export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.convolutions import bidirectional, channels_last, hyena, inputs, time_reversed
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fft import irfft, rfft

from monarch_compile.backend import monarch
from monarch_compile.export import lower_exported

OPTIONS = {"policy": "always"}


def _compiled(program: Any, **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(program, backend=monarch, options=OPTIONS, fullgraph=True, **kwargs)


@pytest.mark.parametrize("program", [hyena, bidirectional, channels_last, time_reversed])
def test_numbers_and_gradients(program: Callable[..., Tensor]) -> None:
    tensors = inputs(37, torch.float32)
    compiled = _compiled(program)
    output, expected = compiled(*tensors), program(*tensors)
    assert counters["monarch"]["lowered"] == 1
    assert counters["monarch"]["exact"] == 0
    assert output.is_contiguous() or not expected.is_contiguous()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    own = torch.autograd.grad((output * weight).sum(), tensors, allow_unused=True)
    wanted = torch.autograd.grad((expected * weight).sum(), tensors, allow_unused=True)
    for one, other in zip(own, wanted, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class Mixer(nn.Module):
    """Two layers of gates and a convolution, with a filter that a network makes of positions."""

    def __init__(self, channels: int = 4, length: int = 64) -> None:
        super().__init__()
        self.taps = nn.ModuleList(nn.Linear(channels, 3 * channels) for _ in range(2))
        self.filter = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, channels))
        self.skip = nn.Parameter(torch.randn(channels))
        self.register_buffer("places", torch.linspace(0, 1, length)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, channels)."""
        length = x.shape[1]
        for taps in self.taps:
            u, gate, out = taps(x).transpose(1, 2).chunk(3, 1)
            v = u * gate
            k = self.filter(self.places[:length]).t()
            y = irfft(rfft(v.float(), n=2 * length) * rfft(k, n=2 * length), n=2 * length)[..., :length]
            x = x + ((y + v * self.skip[:, None]) * out).transpose(1, 2)
        return x


def test_a_model_trains_alike() -> None:
    torch.manual_seed(0)
    model, x = Mixer(), torch.randn(2, 64, 4)
    expected = model(x)
    expected.square().sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = _compiled(model)(x)
    assert counters["monarch"]["lowered"] == 2
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-3)


def test_equal_sites_share_a_body_without_gradients() -> None:
    torch.manual_seed(0)
    model, x = Mixer().eval(), torch.randn(2, 64, 4)
    with torch.no_grad():
        torch.testing.assert_close(_compiled(model)(x), model(x), rtol=1e-4, atol=1e-4)
    assert counters["monarch"]["lowered"] == 2


def test_one_graph_of_many_lengths() -> None:
    model = Mixer().eval()
    compiled = _compiled(model, dynamic=True)
    with torch.no_grad():
        for length in (16, 33, 64):
            x = torch.randn(2, length, 4)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counters["monarch"]["lowered"] == 2


def test_an_exported_program() -> None:
    model = Mixer().eval()
    length = torch.export.Dim("length", min=4, max=64)
    with torch.no_grad():
        exported = torch.export.export(model, (torch.randn(2, 32, 4),), dynamic_shapes={"x": {1: length}})
        lowered = lower_exported(exported, options=OPTIONS)
        assert "long_convolution" in str(lowered.graph)
        assert "fft" not in str(lowered.graph)
        for size in (5, 32, 64):
            x = torch.randn(2, size, 4)
            torch.testing.assert_close(lowered.module()(x), model(x), rtol=1e-4, atol=1e-4)


def test_auto_leaves_a_cpu_to_the_fft() -> None:
    torch._dynamo.reset()
    counters.clear()
    tensors = inputs(37, torch.float32)
    output = torch.compile(hyena, backend=monarch, fullgraph=True)(*tensors)
    assert counters["monarch"]["exact: cpu_fft_wins"] == 1
    torch.testing.assert_close(output, hyena(*tensors), rtol=1e-4, atol=1e-4)
