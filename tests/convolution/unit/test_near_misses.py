"""What is close to a long convolution and is none, or none that can be lowered: kept exact, with its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of, run_passes
from support.convolutions import inputs
from torch import Tensor
from torch.fft import fft, fft2, ifft, ifft2, irfft, irfft2, rfft, rfft2

LENGTH = 12
N = 2 * LENGTH

Program = Callable[..., Any]


def _convolved(u_f: Tensor, k_f: Tensor) -> Tensor:
    return irfft(u_f * k_f, n=N)[..., :LENGTH]


def filter_per_sequence(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(rfft(u, n=N), rfft(x, n=N))


def autocorrelation(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u_f = rfft(u, n=N)
    return _convolved(u_f, u_f.conj())


def learned_spectrum(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u) * torch.complex(k, r)[..., : LENGTH // 2 + 1])


def learned_mask(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u) * k[..., : LENGTH // 2 + 1])


def learned_beside_a_filter(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u) * (rfft(k) + torch.complex(k, r)[..., : LENGTH // 2 + 1]))


def dense_einsum(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    y_f = torch.einsum("bcl,dcl->bdl", rfft(u, n=N), rfft(torch.stack([k, r]), n=N))
    return irfft(y_f, n=N)


def dense_sum(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft((rfft(u, n=N)[:, None] * rfft(torch.stack([k, r]), n=N)).sum(2), n=N)


def dense_matmul(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    y_f = rfft(u, n=N).permute(2, 0, 1) @ rfft(k, n=N).permute(1, 0)[..., None]
    return irfft(y_f, n=N, dim=0)


def input_spectrum_read(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Any:
    u_f = rfft(u, n=N)
    return _convolved(u_f, rfft(k, n=N)), u_f.abs()


def product_read(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Any:
    y_f = rfft(u, n=N) * rfft(k, n=N)
    return irfft(y_f, n=N), y_f


def three_factors(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(rfft(u, n=N) * rfft(k, n=N), rfft(r, n=N))


def nine_terms(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u_f, k_f = rfft(u, n=N), rfft(k, n=N)
    product = u_f * k_f
    for shift in range(8):
        product = product + u_f * rfft(r.roll(shift, -1), n=N)
    return irfft(product, n=N)


def two_inputs(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N) + rfft(x, n=N) * rfft(r, n=N), n=N)


def complex_result(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft(fft(u, n=N) * fft(k, n=N)).abs()


def imaginary_part(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return torch.view_as_real(ifft(fft(u, n=N) * fft(k, n=N)))[..., 1]


def complex_signal(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft(fft(torch.complex(u, x), n=N) * fft(k, n=N)).real


def even_and_odd(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(rfft(u, n=N), rfft(k, n=N + 1))


def resampled(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N), n=N + 2)


def odd_without_n(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N + 1) * rfft(k, n=N + 1))


def whole_by_irfft(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(fft(u, n=N) * fft(k, n=N))


def half_by_ifft(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft(rfft(u, n=N) * rfft(k, n=N)).real


def half_padded_by_ifft(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft(rfft(u, n=N) * rfft(k, n=N), n=N).real


def other_dim_back(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N), n=N, dim=1)


def two_dims(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft2(rfft2(u) * rfft2(k))


def two_dims_complex(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft2(fft2(u) * fft2(k)).real


def two_dims_by_hand(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft(ifft(fft(fft(u, dim=1)) * fft(fft(k, dim=0)), dim=1)).real


def low_pass(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N)[..., :5] * rfft(k, n=N)[..., :5], n=N)


def from_the_second(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(fft(u, n=N)[..., 1 : LENGTH + 2] * fft(k, n=N)[..., 1 : LENGTH + 2], n=N)


def deconvolved(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) / rfft(k, n=N), n=N)


def input_added(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u_f = rfft(u, n=N)
    return irfft(u_f * rfft(k, n=N) + u_f, n=N)


def number_added(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * (rfft(k, n=N) + 1), n=N)


def frequencies_flipped(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N).flip(-1), n=N)


def by_real_numbers(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    a, b = rfft(u, n=N), rfft(k, n=N)
    return irfft(torch.complex(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real), n=N)


def phase_turned(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N) * 1j, n=N)


def scaled_by_a_tensor(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * (rfft(k, n=N) * d[0]), n=N)


def scaled_by_channel(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * (rfft(k, n=N) * d[:, None]), n=N)


def channels_apart(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u = torch.stack([u, x])  # (2, batch, channels, length)
    return irfft(rfft(u, n=N) * rfft(torch.stack([k, r]), n=N)[:, None], n=N)


def six_dims(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u[None, None, None], n=N) * rfft(k, n=N), n=N)


def nothing_left(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(rfft(u, n=N), rfft(k, n=N))[..., LENGTH:]


def of_integers(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(rfft((u > 0).long(), n=N), rfft(k, n=N))


def widened_spectra(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u, k = u.float(), k.float()
    return irfft(rfft(u, n=N).to(torch.complex128) * rfft(k, n=N), n=N)


def filter_without_gradient(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    with torch.no_grad():
        k_f = rfft(k, n=N)
    return _convolved(rfft(u, n=N), k_f)


def read_past_its_shape(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    y = irfft(rfft(u, n=N) * rfft(k, n=N), n=N)[..., :LENGTH]
    return torch.as_strided(y, (2, 3, N), (3 * N, N, 1)).clone()


NEAR_MISSES: dict[str, tuple[Program, ...]] = {
    "filter_per_sequence": (filter_per_sequence, autocorrelation),
    "learned_spectrum": (learned_spectrum, learned_mask, learned_beside_a_filter, scaled_by_channel),
    "channels_mixed": (dense_einsum, dense_sum, dense_matmul),
    "spectrum_reused": (input_spectrum_read, product_read),
    "several_factors": (three_factors, nine_terms),
    "several_inputs": (two_inputs,),
    "complex_result": (complex_result, imaginary_part),
    "complex_signal": (complex_signal,),
    "transform_points": (
        even_and_odd,
        resampled,
        odd_without_n,
        whole_by_irfft,
        half_by_ifft,
        half_padded_by_ifft,
        other_dim_back,
    ),
    "transform_dims": (two_dims, two_dims_complex),
    "spectrum_op": (
        low_pass,
        from_the_second,
        deconvolved,
        input_added,
        number_added,
        frequencies_flipped,
        by_real_numbers,
    ),
    "scale_not_constant": (phase_turned, scaled_by_a_tensor),
    "convolution_layout": (channels_apart, six_dims),
    "empty": (nothing_left,),
    "dtype": (of_integers, widened_spectra),
    "context": (filter_without_gradient,),
    "as_strided": (read_past_its_shape,),
}
CASES = [(code, program) for code, programs in NEAR_MISSES.items() for program in programs]


@pytest.mark.parametrize(("code", "program"), CASES, ids=[program.__name__ for _, program in CASES])
def test_it_stays_exact_and_says_why(code: str, program: Program) -> None:
    tensors = inputs(LENGTH)
    output, (result,) = run_passes(program, *tensors)
    assert [(d.family, d.status, d.code) for d in result.decisions] == [("convolution", "exact", code)]
    (decision,) = result.decisions
    assert decision.reason
    assert decision.remedy
    torch.testing.assert_close(output, program(*tensors))


def test_a_transform_along_two_dims_by_hand_is_reported() -> None:
    assert [d.code for d in decisions_of(two_dims_by_hand, *inputs(LENGTH))] == ["complex_signal"]


# ---- what is no convolution ------------------------------------------------------------------------------------------


def lone_transform(u: Tensor, k: Tensor) -> Tensor:
    return rfft(u).abs()


def back_and_forth(u: Tensor, k: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * 0.5, n=N)


def resampling(u: Tensor, k: Tensor) -> Tensor:
    return irfft(rfft(u), n=N) * 2


def fnet(u: Tensor, k: Tensor) -> Tensor:
    return fft(fft(u, dim=-1), dim=-2).real


def band_pass(u: Tensor, k: Tensor) -> Tensor:
    return irfft(F.pad(rfft(u)[..., 1:4], (1, 3)), n=LENGTH)


def phases(u: Tensor, k: Tensor) -> Tensor:
    return irfft(torch.polar(k, k.sigmoid()))


@pytest.mark.parametrize("program", [lone_transform, back_and_forth, resampling, fnet, band_pass, phases])
def test_it_is_no_site(program: Program) -> None:
    u, k = (x.detach() for x in inputs(LENGTH)[:2])
    assert decisions_of(program, u, k) == []
