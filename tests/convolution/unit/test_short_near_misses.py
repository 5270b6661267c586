"""Programs that try to mislead the rewriting of short convolutions: each gives the numbers and gradients of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from torch import Tensor
from torch.fft import irfft, rfft

from monarch_compile.passes.convolution import short_sums

CHANNELS, LENGTH = 6, 10

Program = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_sums, "DEVICES", frozenset({"cpu"}))


def tensors() -> tuple[Tensor, ...]:
    """x (2, LENGTH, CHANNELS), weight, bias, and the long filter of a channel."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, LENGTH, CHANNELS), (CHANNELS, 1, 3), (CHANNELS,), (1, 2 * LENGTH))
    x, weight, bias, k = (torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes)
    return x, weight, bias, k


def long(u: Tensor, k: Tensor) -> Tensor:
    """A long convolution by one filter for all channels: the graph of every program has one."""
    n = 2 * u.shape[-1]
    filters = k.expand(u.shape[-2], -1)[:, : u.shape[-1]]
    return irfft(rfft(u, n=n) * rfft(filters, n=n), n=n)[..., : u.shape[-1]]


def short(u: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return F.conv1d(u, weight, bias, groups=weight.shape[0], **{"padding": 1, **options})


def _chain(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(short(short(x.mT, w, b), w.flip(2), b), k)


def _chain_of_three(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    y = short(x.mT, w, b)
    z = short(y, w)
    return long(short(z, w, b), k), y * 2, z * 3


def _chain_with_a_residual(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = short(x.mT, w, b)
    return long(short(y, w, b) + y, k)


def _chain_of_parts(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    gate, u, v = short(x.mT, w, b, padding=2)[..., :LENGTH].split(2, 1)
    first, second = short(short(u, w[:2], b[:2]), w[2:4])[..., :LENGTH].chunk(2, 1)
    return long(v[:, :1] * first, k) * second + gate


def _part_of_a_part(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    gate, u, v = short(x.mT, w, b).chunk(3, 1)
    return long(v * short(u, w[:2], b[:2]), k) * gate


def _weights_by_a_convolution(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(short(x.mT, short(w.permute(1, 0, 2), w, b).permute(1, 0, 2)), k)


def _written_between(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = short(x.mT, w, b)
    y = y.mul_(2)
    return long(short(y, w), k)


def _weights_written_before_a_part(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    own = w * 1
    y = short(x.mT, own, b)
    own.view(-1)[3:5] = 7.0
    u, v = y.chunk(2, 1)
    return long(u * v, k)


def _bias_written_before_a_part(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    own = b * 1
    u, v = short(x.mT, w, own, padding=2)[..., :LENGTH].chunk(2, 1)
    own.zero_()
    return long(u * v, k)


def _crop_written(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = short(x.mT, w, b, padding=2)[..., :LENGTH]
    y.relu_()
    u, v = y[:, :3], y[:, 3:]
    return long(u * v, k)


def _steps_along_the_length(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    u, v = short(x.mT, w, b)[..., ::2].chunk(2, 1)
    return long(u * v, k)


def _steps_along_the_channels(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = short(x.mT, w, b)
    return long(y[:, ::2] * y[:, 1::2], k)


def _counted_from_the_end(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = short(x.mT, w, b, padding=2)[..., -9:-1]
    return long(y.narrow(-2, -3, 3) * y[:, -100:3], k)


def _without_a_batch(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    u, v = short(x[0].mT, w, b).chunk(2, -2)
    return long((u * v)[None], k)


def _one_channel(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(F.conv1d(x.mT[:, :1], w[:1], b[:1], padding=1), k)


def _asymmetric_words(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(short(x.mT, w[..., :2], b, padding="same", dilation=3), k)


def _padded_beyond_the_filter(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(short(x.mT, w[..., :1], b, padding=9)[..., 5:20], k[:, :15])


def _padded_by_a_number(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(short(F.pad(x.mT, (2, 0), value=1.5), w, b, padding=0), k)


def _under_a_checkpoint(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    result: Tensor = torch.utils.checkpoint.checkpoint(_part_of_a_part, x, w, b, k, use_reentrant=False)
    return result


def _expanded(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(short(x.mT[:1].expand(2, -1, -1), w[:1].expand(CHANNELS, -1, -1), b), k)


def _by_the_operator(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(torch.convolution(x.mT, w, b, [1], [2], [2], False, [0], CHANNELS), k)


def _double_under_autocast(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return long(short(x.mT, w, b), k)


def _groups_of_one_channel(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(F.conv1d(x.mT[:, :1], w, b, padding=1), k)


def _by_the_operator_transposed(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    return long(torch.convolution(x.mT, w, b, [1], [2], [2], True, [0], CHANNELS), k)


def _in_three_dims(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = F.conv3d(x.mT[:, :, None, None], w[:, :, None, None], b, padding=(0, 0, 1), groups=CHANNELS)
    return long(y[:, :, 0, 0], k)


def _complex(x: Tensor, w: Tensor, b: Tensor, k: Tensor) -> Tensor:
    y = short(torch.complex(x, -x).mT, torch.complex(w, w))
    return long(y.real + y.imag, k)


BECOME_SUMS: dict[Program, int] = {
    _chain: 2,
    _chain_of_three: 3,
    _chain_with_a_residual: 2,
    _chain_of_parts: 3,
    _part_of_a_part: 2,
    _weights_by_a_convolution: 2,
    _written_between: 2,
    _weights_written_before_a_part: 1,
    _bias_written_before_a_part: 1,
    _crop_written: 1,
    _steps_along_the_length: 1,
    _steps_along_the_channels: 1,
    _counted_from_the_end: 1,
    _without_a_batch: 1,
    _one_channel: 1,
    _asymmetric_words: 1,
    _padded_beyond_the_filter: 1,
    _padded_by_a_number: 1,
    _under_a_checkpoint: 2,
    _expanded: 1,
    _by_the_operator: 1,
    _double_under_autocast: 1,
}
"""Programs, and how many of their convolutions become sums."""

STAY: dict[Program, int] = dict.fromkeys(
    (_groups_of_one_channel, _by_the_operator_transposed, _in_three_dims, _complex), 0
)

REFUSE_GRADIENTS = (_weights_written_before_a_part,)
"""Programs that write what a convolution has saved for its gradients, so that PyTorch refuses to compute them."""


@pytest.mark.parametrize("program", [*BECOME_SUMS, *STAY], ids=lambda f: f.__name__.strip("_"))
def test_numbers_and_gradients_are_those_of_eager(program: Program) -> None:
    own, given = ([t.requires_grad_() for t in tensors()] for _ in range(2))
    found, (result,) = run_passes(program, *given)
    assert (len(result.changes), result.num_lowered) == ({**BECOME_SUMS, **STAY}[program], 1)
    wanted = program(*own)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    if program in REFUSE_GRADIENTS:
        return
    gradients = [
        torch.autograd.grad(sum(t.square().sum() for t in (y if isinstance(y, tuple) else (y,))), x, allow_unused=True)
        for y, x in ((found, given), (wanted, own))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": 3, "dilation": 3}, {"padding": 2}])
def test_inputs_that_are_not_finite(value: float, options: dict[str, int]) -> None:
    def program(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return short(x.mT, weight, bias, **options) * 1, long(k.mT.expand(2, -1, -1).mT, k)

    x, weight, bias, k = tensors()
    x[0, 3, 1] = value
    x[1, 0, 2], x[1, 9, 4] = float("inf"), float("-inf")
    weight[4] = 0
    (found, _), (result,) = run_passes(program, x, weight, bias, k)
    assert len(result.changes) == 1
    torch.testing.assert_close(found, program(x, weight, bias, k)[0], rtol=1e-10, atol=1e-10, equal_nan=True)


def test_of_no_sequence() -> None:
    def program(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return short(x[:0].mT, weight, bias), long(x.mT, k)

    found, (result,) = run_passes(program, *tensors())
    assert len(result.changes) == 1
    assert found[0].shape == (0, CHANNELS, LENGTH)
