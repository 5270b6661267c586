"""Long convolutions, as public models and people write them: programs of u, two filters, a skip term and two gates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fft import fft, ifft, irfft, rfft

Program = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of u (batch, channels, length), k and r (channels, length), d (channels,), and gates x and z of u's shape."""


def inputs(length: int, dtype: torch.dtype = torch.float64, batch: int = 2, channels: int = 3) -> tuple[Tensor, ...]:
    """Standard normal u, k, r, d, x and z, which want gradients."""
    generator = torch.Generator().manual_seed(0)
    signal, filters = (batch, channels, length), (channels, length)
    shapes = (signal, filters, filters, (channels,), signal, signal)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )


def hyena(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    n = 2 * length
    k_f = rfft(k, n=n) / n
    u_f = rfft(u.to(dtype=k.dtype), n=n)
    y = irfft(u_f * k_f, n=n, norm="forward")[..., :length]
    return F.gelu(y + u * d.unsqueeze(-1)).to(u.dtype)


def hyena_masked(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    k_f = rfft(k, n=2 * length) / (2 * length)
    y = irfft(rfft(u, n=2 * length) * k_f, n=2 * length, norm="forward")[..., :length]
    return (F.gelu(y + u * d.unsqueeze(-1)) * (z[:, :, 0] > 0)[..., None]).to(u.dtype)


def hyena_heads(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u = torch.stack([u, x], 1)  # (batch, heads, channels, length)
    length = u.shape[-1]
    k_f = rfft(k, n=2 * length).unsqueeze(0).unsqueeze(1)
    return irfft(rfft(u, n=2 * length) * k_f, n=2 * length)[..., :length] + u * d[:, None]


def monarch_mixer(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    bias = d.reshape(1, -1, 1)
    v = u * x
    k_f = rfft(k, n=2 * length)
    v_f = rfft(v, n=2 * length)
    y = irfft(v_f * k_f, n=2 * length)[..., :length] + v * bias
    return y * z


def second_filter(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    y = irfft(rfft(u, n=2 * length) * rfft(k, n=2 * length), n=2 * length)[..., :length]
    return y + irfft(rfft(x, n=2 * length) * rfft(r, n=2 * length), n=2 * length)[..., :length]


def residual(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    return irfft(rfft(k, n=2 * length) * rfft(u, n=2 * length), n=2 * length)[..., :length] + u


def bidirectional(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    k_f = rfft(k, n=n) / n + rfft(r, n=n).conj() / n
    y = irfft(rfft(u, n=n) * k_f, n=n, norm="forward")[..., : n // 2]
    return y + u * d[:, None]


def complex_forward(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return ifft(fft(u, n=n) * (fft(k, n=n) / n), norm="forward").real[..., : n // 2]


def complex_back(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    y_f = fft(u, n) * fft(k, n)
    return ifft(y_f, n).real[..., : n // 2]


def padded_gates(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u, k, x, z = (F.pad(t, (0, t.shape[-1])) for t in (u, k, x, z))
    return ifft(fft(u * x) * fft(k)).real * z


def s4(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    k, d, length = k[None], d[None], u.shape[-1]
    n = k.shape[-1] + length
    y_f = torch.einsum("bhl,chl->bchl", rfft(u, n=n), rfft(k, n=n))
    return irfft(y_f, n=n)[..., :length] + torch.einsum("bhl,ch->bchl", u, d)


def s4_channels(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    k, d, length = torch.stack([k, r]), torch.stack([d, -d]), u.shape[-1]
    n = k.shape[-1] + length
    y_f = torch.einsum("bhl,chl->bchl", rfft(u, n=n), rfft(k, n=n))
    return irfft(y_f, n=n)[..., :length] + torch.einsum("bhl,ch->bchl", u, d)


def s4_bidirectional(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    both = F.pad(k, (0, length)) + F.pad(r.flip(-1), (length, 0))
    return irfft(rfft(u, n=2 * length) * rfft(both, n=2 * length), n=2 * length)[..., :length]


def flipped(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    k_f = rfft(F.pad(k.flip(-1), (length, 0)), n=2 * length)
    u_f = rfft(F.pad(u.flip(-1), (length, 0)), n=2 * length)
    return irfft(u_f * k_f, n=2 * length)[..., length:].flip(-1)


def h3(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    n = k.shape[-1] + length
    outer = torch.stack([u, x], 1)[:, :, None] * torch.stack([z, u], 1)[:, None]  # (batch, 2, 2, channels, length)
    y = irfft(rfft(outer, n=n) * rfft(k, n=n), n=n)[..., :length]
    return (y + outer * d[:, None]).sum(2)


def whole_and_half(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    h_f = rfft(k, n=n)
    return irfft(fft(u, n=n)[..., : h_f.shape[-1]] * h_f / n, n=n, norm="forward")[..., : n // 2]


def scaled_product(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n) * 0.5, n=n)[..., : n // 2] * 3.0 / 7.0


def time_reversed(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    u_f, k_f, r_f = rfft(u, n=n), rfft(k, n=n), rfft(r, n=n)
    return irfft(u_f * k_f + u_f.conj() * r_f.conj(), n=n)[..., : n // 2]


def correlated(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u * x, n=n).conj() * rfft(k, n=n), n=n)[..., : n // 2] + u * d[:, None]


def centred(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    wide = F.pad(u, (length // 2, length - length // 2))
    y = irfft(rfft(wide, n=2 * length) * rfft(k, n=2 * length), n=2 * length)
    return y[..., length // 2 : length // 2 + length]


def channels_last(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u, k, z = u.transpose(1, 2), k.t(), z.transpose(1, 2)
    length = u.shape[1]
    y = irfft(rfft(u, 2 * length, dim=-2) * rfft(k, 2 * length, dim=-2), 2 * length, dim=-2)[:, :length]
    return (y + u * d) * z


def transposed_back(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    y = irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., : n // 2]
    return ((y + u * d[:, None]) * z).transpose(1, 2)


def turned_before_the_skip(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    y = irfft(rfft(u, n=n) * rfft(k, n=n), n=n).permute(2, 0, 1)[: n // 2]
    return ((y + u.permute(2, 0, 1) * d).transpose(0, 1) * z.transpose(1, 2)).transpose(0, 2)


def uncropped(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)


def next_power(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    n = 1 << (2 * length - 1).bit_length()
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., :length]


def orthonormal(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n, norm="ortho") * rfft(k, n=n), n=n, norm="ortho")[..., : n // 2]


def all_orthonormal(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    y = irfft(rfft(u, n=n, norm="ortho") * rfft(k, n=n, norm="ortho"), n=n, norm="ortho")
    return y[..., : n // 2] * math.sqrt(n)


def circular(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u) * rfft(k), n=u.shape[-1])


def circular_correlation(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft(fft(u) * fft(k).conj()).real


def same_sized(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length, middle = u.shape[-1], k.shape[-1] // 2
    y = irfft(rfft(u, n=2 * length) * rfft(k, n=2 * length), n=2 * length)
    return y[..., middle : length + middle]


def rolled(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    y = irfft(rfft(u, n=2 * length) * rfft(k, n=2 * length), n=2 * length)
    return torch.roll(y, 2, dims=-1)[..., :length] * z


def cut(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """Fewer points than the input has, odd ones for odd lengths."""
    n = max(1, u.shape[-1] // 2)
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)


def aten_level(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    aten, length = torch.ops.aten, u.shape[-1]
    u_f = aten._fft_r2c(aten.constant_pad_nd(u, [0, length]), [2], 0, True)
    k_f = aten._fft_r2c(aten.constant_pad_nd(k, [0, length]), [1], 2, True)
    y_f = torch.view_as_complex(torch.view_as_real(u_f * k_f))
    return aten._fft_c2r(y_f, [2], 0, 2 * length)[..., :length]


def aten_complex(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    aten, length = torch.ops.aten, u.shape[-1]
    to_complex = {torch.float32: torch.complex64, torch.float64: torch.complex128}[u.dtype]
    u_f = aten._fft_c2c(F.pad(u, (0, length)).to(to_complex), [2], 1, True)
    k_f = aten._fft_r2c(torch.cat([k, torch.zeros_like(k)], -1), [1], 0, False)
    return torch.view_as_real(aten._fft_c2c(u_f * k_f, [2], 1, False))[..., 0][..., :length]


ONCE: tuple[Program, ...] = (
    hyena,
    hyena_masked,
    hyena_heads,
    monarch_mixer,
    residual,
    bidirectional,
    complex_forward,
    complex_back,
    padded_gates,
    s4,
    s4_channels,
    s4_bidirectional,
    flipped,
    h3,
    whole_and_half,
    scaled_product,
    correlated,
    centred,
    channels_last,
    transposed_back,
    turned_before_the_skip,
    uncropped,
    next_power,
    orthonormal,
    all_orthonormal,
    circular,
    circular_correlation,
    same_sized,
    rolled,
    cut,
    aten_level,
    aten_complex,
)
"""Programs with one convolution, which becomes one operator."""

TWICE: tuple[Program, ...] = (second_filter, time_reversed)
"""Programs that become two operators."""
