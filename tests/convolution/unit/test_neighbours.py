"""Steps beside a convolution that look like those that are folded into it: the numbers and gradients stay eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of, run_passes
from support.convolutions import inputs
from torch import Tensor
from torch.fft import fft, fft2, fftn, ifft, ifft2, ifftn, irfft, irfftn, rfft, rfftn

LENGTH = 12
N = 2 * LENGTH

Program = Callable[..., Any]


def _whole(u: Tensor, k: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N), n=N)


def _convolved(u: Tensor, k: Tensor) -> Tensor:
    return _whole(u, k)[..., :LENGTH]


def _check(program: Program, tensors: tuple[Tensor, ...], **options: Any) -> list[Any]:
    """Compares the rewritten program with eager; returns the decisions."""
    output, (result,) = run_passes(program, *tensors, **options)
    expected = program(*tensors)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    gradients = [torch.autograd.grad((y * weight).abs().sum(), tensors, allow_unused=True) for y in (output, expected)]
    for own, wanted in zip(*gradients, strict=True):
        assert (own is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)
    return list(result.decisions)


# ---- what follows a skip term or a gate ------------------------------------------------------------------------------


def skip_then_crop(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (_convolved(u, k) + u * d[:, None])[..., 1:]


def skip_then_head(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (_convolved(u, k) + u * d[:, None]).narrow(-1, 0, 5)


def skip_and_gate_then_crop(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ((_convolved(u, k) + u * d[:, None]) * z)[..., -1:]


def skip_then_roll(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return torch.roll(irfft(rfft(u) * rfft(k), n=LENGTH) + u * d[:, None], 2, -1)


def gate_then_crop(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (_whole(u, k) * torch.cat([x, z], -1))[..., 1:]


def gate_then_head(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (_whole(u, k) * torch.cat([x, z], -1))[..., :LENGTH]


def gate_then_roll(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return torch.roll(_whole(u, k) * torch.cat([x, z], -1), 1, -1)


def scaled_by_a_complex_tensor(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (_convolved(u, k) * torch.tensor(1 + 2j)).imag


def padded_with_written_zeros(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    rest = torch.zeros_like(k)
    rest[..., 0] = 1.0
    return irfft(rfft(u, n=N) * rfft(torch.cat([k, rest], -1)), n=N)


ENDS: dict[Program, str] = {
    skip_then_crop: "filter f64[12] points 24 lag 0 skip -> f64[12]",
    skip_then_head: "filter f64[12] points 24 lag 0 skip -> f64[12]",
    skip_and_gate_then_crop: "filter f64[12] points 24 lag 0 skip post_gate -> f64[12]",
    skip_then_roll: "filter f64[12] points 12 lag 0 skip -> f64[12]",
    gate_then_crop: "filter f64[12] points 24 lag 0 post_gate -> f64[24]",
    gate_then_head: "filter f64[12] points 24 lag 0 post_gate -> f64[12]",
    gate_then_roll: "filter f64[12] points 24 lag 0 post_gate -> f64[24]",
    scaled_by_a_complex_tensor: "filter f64[12] points 24 lag 0 -> f64[12]",
    padded_with_written_zeros: "filter f64[24] points 24 lag 0 -> f64[24]",
}


@pytest.mark.parametrize("program", ENDS, ids=[program.__name__ for program in ENDS])
def test_where_folding_ends(program: Program) -> None:
    (decision,) = _check(program, inputs(LENGTH))
    assert str(decision.ir) == f"monarch.long_convolution<f64> [2,3,12] {ENDS[program]}"


# ---- the frequency domain --------------------------------------------------------------------------------------------


def phase_of_the_filter(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N) * (d[:, None] * 1j), n=N)


def filters_unbound(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    filters = rfft(torch.stack([k, r]), n=N).unbind(0)
    return irfft(rfft(u, n=N) * filters[1], n=N)


@pytest.mark.parametrize(
    ("program", "code"), [(phase_of_the_filter, "learned_spectrum"), (filters_unbound, "spectrum_op")]
)
def test_a_spectrum_that_is_not_understood(program: Program, code: str) -> None:
    (decision,) = _check(program, inputs(LENGTH))
    assert decision.code == code


def one_of_many_dims(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u_f, k_f = rfftn(u, s=(N,), dim=(-1,), norm="ortho"), rfftn(k, s=(N,), dim=(1,))
    return irfftn(u_f * k_f, s=(N,), dim=(2,), norm="ortho")[..., :LENGTH]


def the_last_dim_by_its_length(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifftn(fftn(u, s=(N,)) * fftn(k, s=(N,), norm="forward"), s=(N,)).real


def one_of_two_dims(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return ifft2(fft2(u, s=(-1,), dim=(1,)) * fft2(k, dim=(0,)), dim=(1,)).real


@pytest.mark.parametrize("program", [one_of_many_dims, the_last_dim_by_its_length, one_of_two_dims])
def test_a_transform_of_many_dims_that_has_one(program: Program) -> None:
    (decision,) = _check(program, inputs(LENGTH))
    assert decision.code == "lowered"


def test_a_transform_of_all_dims_stays() -> None:
    def program(u: Tensor, k: Tensor) -> Tensor:
        return irfftn(rfftn(u) * rfftn(k[None]), s=u.shape)

    u, k = inputs(LENGTH)[:2]
    assert [d.code for d in _check(program, (u, k))] == ["transform_dims"]


# ---- dims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
def test_several_channel_dims_whatever_the_batch(batch: int) -> None:
    def program(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return _convolved(torch.stack([u, x], 2), torch.stack([k, r], 1))

    (decision,) = _check(program, inputs(LENGTH, batch=batch))
    assert str(decision.ir).startswith(f"monarch.long_convolution<f64> [{batch},6,12]")


def test_filters_of_a_batch_of_one_are_no_channels() -> None:
    def program(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return _convolved(torch.stack([u, x], 2), torch.stack([z, u], 2))

    (decision,) = _check(program, inputs(LENGTH, batch=1))
    assert decision.code == "filter_per_sequence"


def skip_of_the_other_dim(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u, k) + u.transpose(0, 1) * d[:, None]


def skip_of_other_heads(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    filters = torch.stack([k, r, k * r])
    return _convolved(u[:, None], filters) + u[:, :, None] * filters[..., :1]


def skip_by_time(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    u = u.transpose(1, 2)
    return irfft(rfft(u, N, dim=1) * rfft(k.t(), N, dim=0), N, dim=1)[:, :LENGTH] + u * d.repeat(4)[:, None]


def gate_of_turned_dims(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u, k).transpose(0, 1) * z


COINCIDENCES = [skip_of_the_other_dim, skip_of_other_heads, skip_by_time, gate_of_turned_dims]


@pytest.mark.parametrize("program", COINCIDENCES)
def test_sizes_that_agree_by_chance(program: Program) -> None:
    (decision,) = _check(program, inputs(LENGTH, batch=3, channels=3))
    assert decision.code == "lowered"
    assert not decision.ir.skip


# ---- memory ----------------------------------------------------------------------------------------------------------


def result_and_copy(u: Tensor, k: Tensor) -> Any:
    y = _convolved(u, k)
    return y, y.reshape(2, -1)


def two_copies(u: Tensor, k: Tensor) -> Any:
    y = _convolved(u, k)
    return y.contiguous(), y.flatten(1)


def whole_result_and_view(u: Tensor, k: Tensor) -> Any:
    y = ifft(fft(u) * fft(k)).real.clone()
    return y, y[:1]


@pytest.mark.parametrize(
    ("program", "code"),
    [(result_and_copy, "mutation"), (two_copies, "mutation"), (whole_result_and_view, "lowered")],
)
def test_what_shares_no_memory_in_eager_shares_none(program: Program, code: str) -> None:
    u, k = (x.detach() for x in inputs(LENGTH)[:2])
    output, (result,) = run_passes(program, u, k)
    assert [d.code for d in result.decisions] == [code]
    for tensors in (output, program(u, k)):
        shared = tensors[0].untyped_storage().data_ptr() == tensors[1].untyped_storage().data_ptr()
        assert shared == (program is whole_result_and_view)


# ---- symbolic sizes --------------------------------------------------------------------------------------------------


def heads(u: Tensor, k: Tensor, d: Tensor, z: Tensor) -> Tensor:
    v, n = torch.stack([u, z], 1), 2 * u.shape[-1]
    return irfft(rfft(v, n=n) * rfft(torch.stack([k, -k]), n=n), n=n)[..., : u.shape[-1]] + v * d[:, None]


def shortened(u: Tensor, k: Tensor, d: Tensor, z: Tensor) -> Tensor:
    u = u[..., :-2]
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., : u.shape[-1]]


def long_gate(u: Tensor, k: Tensor, d: Tensor, z: Tensor) -> Tensor:
    length = u.shape[-1]
    y = irfft(rfft(u, n=2 * length) * rfft(k, n=2 * length), n=2 * length)
    return (y * F.pad(z, (0, length)))[..., :length]


@pytest.mark.parametrize("program", [heads, shortened, long_gate])
def test_sizes_made_of_symbols(program: Program) -> None:
    u, k, _, d, _, z = inputs(LENGTH)
    (decision,) = _check(program, (u, k, d, z), dynamic=True)
    assert decision.code == "lowered"
    assert isinstance(decision.ir.transform_len, str)


def test_sizes_made_of_symbols_by_the_cost_model() -> None:
    u, k, _, d, _, z = inputs(LENGTH)
    assert [found.code for found in decisions_of(heads, u, k, d, z, dynamic=True, policy="auto")] == ["cpu_fft_wins"]
