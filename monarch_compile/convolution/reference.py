"""The meaning of a long convolution, by PyTorch's FFT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def reference(
    u: Tensor,
    filter: Tensor,
    skip: Tensor | None = None,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    *,
    transform_len: int,
    out_len: int,
    lag: int = 0,
    scale: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """u (B, C, L) with a filter (C, L_k) in a circular convolution of `transform_len` points -> (B, C, out_len).

    y[t] = (scale * sum over s of v[s] h[(t + lag - s) mod transform_len] + skip * v[t]) * post_gate[t], where
    v = u * pre_gate, and h and v are padded with zeros or cut to `transform_len` points. `skip` is (C,), `pre_gate`
    (B, C, L), `post_gate` (B, C, out_len).

    Computes in float64 where u or the filter is of float64, else in float32; `out_dtype` (default: u's) is the dtype
    of the result.
    """
    dtype = torch.float64 if torch.float64 in (u.dtype, filter.dtype) else torch.float32
    v = u.to(dtype) if pre_gate is None else u.to(dtype) * pre_gate.to(dtype)
    u_f = torch.fft.rfft(v, transform_len)
    k_f = torch.fft.rfft(filter.to(dtype), transform_len)
    y = crop(torch.fft.irfft(u_f * k_f, transform_len), lag, out_len)
    y = y if scale == 1.0 else y * scale
    if skip is not None:
        y = y + v * skip.to(dtype)[:, None]
    if post_gate is not None:
        y = y * post_gate.to(dtype)
    return y.to(out_dtype or u.dtype)


def crop(y: Tensor, lag: Any, out_len: Any) -> Tensor:
    """The points lag, lag + 1, ..., `out_len` of them, of a periodic signal y (..., n), 0 <= lag < n."""
    length = y.shape[-1]
    if lag + out_len <= length:
        return y[..., lag : lag + out_len]
    return torch.cat((y[..., lag:], y[..., : lag + out_len - length]), -1)
