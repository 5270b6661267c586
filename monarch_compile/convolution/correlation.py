"""The meaning of the gradient of a long convolution's filter, by PyTorch's FFT: a correlation summed over the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def filter_gradient(
    grad: Tensor,
    u: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    *,
    filter_dtype: torch.dtype,
    transform_len: int,
    filter_len: int,
    lag: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """grad (B, C, out_len) of the result of `reference.reference`, u and pre_gate (B, C, L), post_gate (B, C, out_len)
    -> gradients of the filter (C, filter_len) and of the skip term (C,).

    L is at most transform_len. That of the filter has `filter_dtype`, that of the skip term float32, or float64 where
    u or the filter has it.
    """
    dtype = torch.float64 if torch.float64 in (u.dtype, filter_dtype) else torch.float32
    v = u.to(dtype) if pre_gate is None else u.to(dtype) * pre_gate.to(dtype)
    g = grad.to(dtype) if post_gate is None else grad.to(dtype) * post_gate.to(dtype)
    # Not the lazy conj: torch ignores its mark under a subclass such as DTensor.
    spectrum = torch.fft.rfft(g, transform_len) * torch.conj_physical(torch.fft.rfft(v, transform_len))
    correlation = torch.fft.irfft(spectrum.sum(0), transform_len).roll(lag, -1) * scale
    shared = min(g.shape[-1], v.shape[-1])
    at_zero = (g[..., :shared] * v[..., :shared]).sum((0, 2))
    return fitted(correlation, filter_len).to(filter_dtype), at_zero


def from_lags(later: Tensor, earlier: Tensor | None, *, transform_len: int, filter_len: int, lag: int) -> Tensor:
    """The gradient of a filter (C, filter_len) from a correlation by lag.

    later (C, out_len): at lags t >= 0. earlier (C, L): at lags -t, 0 at t = 0; None: the filter has none of these, and
    `lag` is 0.
    """
    if earlier is None:
        return fitted(later, filter_len)
    whole = fitted(later, transform_len) + reversed_in_time(fitted(earlier, transform_len))
    return fitted(whole.roll(lag, -1), filter_len)


def reversed_in_time(x: Tensor) -> Tensor:
    """The periodic signal x (..., n) at -t."""
    return torch.cat((x[..., :1], x[..., 1:].flip(-1)), -1)


def fitted(x: Tensor, length: Any) -> Tensor:
    """x (..., n), padded with zeros or cut to `length`."""
    return torch.nn.functional.pad(x, (0, length - x.shape[-1])) if x.shape[-1] < length else x[..., :length]
