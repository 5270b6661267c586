"""Long convolutions in plain PyTorch: filters as long as the sequence, applied by FFT."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SHORT_TAPS = 3
"""Taps of the depthwise convolution before the gates."""


def causal_convolution(u: Tensor, filter: Tensor, skip: Tensor) -> Tensor:
    """u (batch, channels, length) with filter (channels, length) and skip (channels,): the sum over s <= t of
    filter[t - s] u[s], plus skip u[t]. The FFT is of the filter's dtype, the result of u's.
    """
    length = u.shape[-1]
    points = 2 * length
    filter_f = torch.fft.rfft(filter, n=points) / points
    u_f = torch.fft.rfft(u.to(filter.dtype), n=points)
    y = torch.fft.irfft(u_f * filter_f, n=points, norm="forward")[..., :length]
    return (y + u * skip.unsqueeze(-1)).to(u.dtype)


def bidirectional_convolution(u: Tensor, forward: Tensor, backward: Tensor, skip: Tensor) -> Tensor:
    """As `causal_convolution` with `forward`, plus the sum over s >= t of backward[s - t] u[s].

    Lag 0 has a value in either filter, and counts twice.
    """
    length = u.shape[-1]
    points = 2 * length
    filter_f = torch.fft.rfft(forward, n=points) / points
    filter_f = filter_f + torch.fft.rfft(backward, n=points).conj() / points
    u_f = torch.fft.rfft(u.to(forward.dtype), n=points)
    y = torch.fft.irfft(u_f * filter_f, n=points, norm="forward")[..., :length]
    return (y + u * skip.unsqueeze(-1)).to(u.dtype)


class ImplicitFilter(nn.Module):
    """Filters as a function of the lag: a small MLP of positional features, times an exponential window.

    A filter costs the same parameters at any length, up to `max_length`. Windows decay within a few tokens in the first
    channels and over the whole length in the last, each scaled to unit energy: a random filter keeps the size of what
    it is applied to. The filters are float32 whatever autocast says, and `cast_activations` leaves them so: bfloat16
    cannot tell neighbouring positions of a long sequence apart.
    """

    rates: Tensor
    frequencies: Tensor

    def __init__(self, channels: int, hidden: int, max_length: int, num_frequencies: int = 16) -> None:
        super().__init__()
        self.max_length = max_length
        self.mlp = nn.Sequential(
            nn.Linear(1 + 2 * num_frequencies, hidden), Sine(hidden),
            nn.Linear(hidden, hidden), Sine(hidden),
            nn.Linear(hidden, channels, bias=False),
        )  # fmt: skip
        spans = torch.logspace(math.log10(min(4, max_length)), math.log10(max_length), channels)
        self.register_buffer("rates", 1 / spans)
        self.register_buffer("frequencies", 2 * math.pi * torch.arange(1, num_frequencies + 1))

    def forward(self, length: int) -> Tensor:
        """Filters (channels, length), float32.

        Raises:
            ValueError: `length` is above `max_length`.
        """
        if length > self.max_length:
            raise ValueError(f"a sequence of {length} tokens; the filters are made for {self.max_length} at most")
        lags = torch.arange(length, dtype=torch.float32, device=self.rates.device)[:, None]
        with torch.autocast(self.rates.device.type, enabled=False):
            filters = self.mlp(self.features(lags))
        window = torch.exp(-self.rates * lags) * torch.sqrt(1 - torch.exp(-2 * self.rates))
        return (filters * window).transpose(0, 1)

    def features(self, lags: Tensor) -> Tensor:
        """Of lags (length, 1): their share of the longest, and its cosines and sines."""
        position = lags / self.max_length
        angles = position * self.frequencies
        return torch.cat((position, angles.cos(), angles.sin()), -1)


class Sine(nn.Module):
    """sin(frequency x), with a learned frequency for each feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """(..., features), as is the output."""
        return torch.sin(self.frequency * x)


class ConvolutionMixer(nn.Module):
    """Mixes the sequence: v x1, a long convolution, times x2, where x1, x2 and v are projections of the input that went
    through a short depthwise convolution.

    causal: one filter, else one for each direction. residual: a second long convolution of the input itself is added.
    """

    def __init__(self, width: int, filter_hidden: int, max_length: int, *, causal: bool, residual: bool) -> None:
        super().__init__()
        self.causal = causal
        self.project = nn.Linear(width, 3 * width)
        padding = SHORT_TAPS - 1 if causal else SHORT_TAPS // 2
        self.short = nn.Conv1d(3 * width, 3 * width, SHORT_TAPS, padding=padding, groups=3 * width)
        self.long = LongConvolution(width, filter_hidden, max_length, causal=causal)
        self.residual = LongConvolution(width, filter_hidden, max_length, causal=causal) if residual else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width), as is the output."""
        length = x.shape[1]
        projected = self.short(self.project(x).transpose(1, 2))[..., :length]
        x1, x2, v = projected.chunk(3, dim=1)
        y = self.long(v * x1) * x2
        if self.residual is not None:
            y = y + self.residual(x.transpose(1, 2))
        return self.out(y.transpose(1, 2))


class LongConvolution(nn.Module):
    """A long convolution with implicit filters and a skip term, in one direction or both."""

    def __init__(self, width: int, filter_hidden: int, max_length: int, *, causal: bool) -> None:
        super().__init__()
        directions = 1 if causal else 2
        self.filters = nn.ModuleList(ImplicitFilter(width, filter_hidden, max_length) for _ in range(directions))
        self.skip = nn.Parameter(torch.randn(width))

    def forward(self, u: Tensor) -> Tensor:
        """(batch, width, length), as is the output."""
        filters = [made(u.shape[-1]) for made in self.filters]
        convolution = causal_convolution if len(filters) == 1 else bidirectional_convolution
        return convolution(u, *filters, self.skip)


def cast_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters and buffers, and with them the activations, but those that filters are computed from."""
    for module in model.children():
        if not isinstance(module, ImplicitFilter):
            cast_activations(module, dtype)
    for tensor in (*model.parameters(recurse=False), *model.buffers(recurse=False)):
        tensor.data = tensor.data.to(dtype)
