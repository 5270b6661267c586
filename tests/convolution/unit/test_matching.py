"""What is folded into the operator beside the transforms, how it lies in memory, and what guards it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import decisions_of, run_passes
from support.convolutions import hyena, inputs, monarch_mixer, padded_gates, s4, s4_channels
from torch import Tensor
from torch.fft import irfft, rfft

from monarch_compile.convolution.op import CONVOLUTION_OP

LENGTH = 12
N = 2 * LENGTH
HALF = torch.bfloat16

Program = Callable[..., Any]


def _convolved(u: Tensor, k: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N), n=N)[..., :LENGTH]


def _irs(program: Program, *tensors: Tensor) -> list[str]:
    return [str(d.ir).removeprefix("monarch.long_convolution") for d in decisions_of(program, *tensors)]


# ---- neighbours ------------------------------------------------------------------------------------------------------


def _in_halves(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    v = u * x
    y = irfft(rfft(v.float(), n=N) * rfft(k, n=N), n=N)[..., :LENGTH]
    return (y + v * d[:, None]).to(u.dtype) * z


def _cast_of_filter(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u.float(), n=N) * rfft(k.to(HALF).float(), n=N), n=N)[..., :LENGTH].to(HALF)


def _gate_of_float32(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (_convolved(u.float(), k) * z.float()).to(HALF)


def _rounded_then_widened(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u.float(), k).to(HALF) * z.float()


def _gates_of_two_dtypes(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u * x.float(), k)


def _gate_read_elsewhere(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Any:
    v = u * x
    return _convolved(v.float(), k), v


def _skip_before_the_gate(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved((u * x).float(), k) + u * d[:, None]


def _skip_of_another(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u.float(), k) + x * d[:, None]


def _skip_after_the_gate(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u.float(), k) * z + u * d[:, None]


def _skip_by_time(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u.float(), k) + u * k


def _skip_subtracted(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return torch.add(_convolved(u.float(), k), u * d[:, None], alpha=-1)


def _skip_of_another_length(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    wide = F.pad(u.float(), (0, LENGTH))
    return irfft(rfft(u.float(), n=N) * rfft(k, n=N), n=N) + wide * d[:, None]


def _gated_by_a_row(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return _convolved(u.float(), k) * z[:, :1]


def _scaled_after_the_skip(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (_convolved(u.float(), k) + u * d[:, None]) * 0.5


def _result_read_twice(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    y = _convolved(u.float(), k)
    return y * y.sigmoid()


def _cast_like_the_result(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return z.type_as(_convolved(u.float(), k))


def _padded_on_the_left(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(F.pad(u.float(), (3, LENGTH - 3)), n=N) * rfft(k, n=N), n=N)


def _padded_with_ones(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(F.pad(u.float(), (0, LENGTH), value=1.0)) * rfft(k, n=N), n=N)


def _padded_around(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(F.pad(u.float(), (0, LENGTH), mode="circular")) * rfft(k, n=N), n=N)


def _cut_by_padding(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(F.pad(u.float(), (0, -2)), n=N) * rfft(k, n=N), n=N)


def _padded_by_cat(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(torch.cat([u, torch.zeros_like(u)], -1).float()) * rfft(k, n=N), n=N)


def _padded_by_cat_of_ones(u: Tensor, k: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(torch.cat([u, torch.ones_like(u)], -1).float()) * rfft(k, n=N), n=N)


FOLDED: dict[Program, str] = {
    _in_halves: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 pre_gate skip post_gate -> bf16[12]",
    _cast_of_filter: "<bf16> [2,3,12] filter bf16[12] points 24 lag 0 -> bf16[12]",
    _gate_of_float32: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 post_gate -> bf16[12]",
    _rounded_then_widened: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> bf16[12]",
    _gates_of_two_dtypes: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 pre_gate -> f32[12]",
    _gate_read_elsewhere: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]",
    _skip_before_the_gate: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 pre_gate -> f32[12]",
    _skip_of_another: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]",
    _skip_after_the_gate: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 post_gate -> f32[12]",
    _skip_by_time: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]",
    _skip_subtracted: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]",
    _skip_of_another_length: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[24]",
    _gated_by_a_row: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]",
    _scaled_after_the_skip: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 skip -> f32[12]",
    _result_read_twice: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]",
    _cast_like_the_result: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]",
    _padded_on_the_left: "<f32> [2,3,24] filter f32[12] points 24 lag 0 -> f32[24]",
    _padded_with_ones: "<f32> [2,3,24] filter f32[12] points 24 lag 0 -> f32[24]",
    _padded_around: "<f32> [2,3,24] filter f32[12] points 24 lag 0 -> f32[24]",
    _cut_by_padding: "<f32> [2,3,10] filter f32[12] points 24 lag 0 -> f32[24]",
    _padded_by_cat: "<bf16> [2,3,12] filter f32[12] points 24 lag 0 -> f32[24]",
    _padded_by_cat_of_ones: "<bf16> [2,3,24] filter f32[12] points 24 lag 0 -> f32[24]",
}


@pytest.mark.parametrize("program", FOLDED, ids=[program.__name__ for program in FOLDED])
def test_what_is_folded_in(program: Program) -> None:
    u, k, _, d, x, z = (tensor.detach().float() for tensor in inputs(LENGTH))
    u, x, z = u.to(HALF), x.to(HALF), z.to(HALF)
    output, (result,) = run_passes(program, u, k, d, x, z)
    (decision,) = result.decisions
    assert str(decision.ir).removeprefix("monarch.long_convolution") == FOLDED[program]
    expected = program(u, k, d, x, z)
    precise = program(*(tensor.double() for tensor in (u, k, d, x, z)))
    for own, wanted, exact in zip(*map(_flat, (output, expected, precise)), strict=True):
        assert own.dtype is wanted.dtype
        error, eager = (float((tensor.double() - exact.double()).abs().max()) for tensor in (own, wanted))
        assert error <= 1.1 * eager + 1e-5 * float(exact.abs().max()), "it is at least as exact as eager"


def _flat(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        (hyena, "<f64> [2,3,12] filter f64[12] points 24 lag 0 skip -> f64[12]"),
        (monarch_mixer, "<f64> [2,3,12] filter f64[12] points 24 lag 0 pre_gate skip post_gate -> f64[12]"),
        (padded_gates, "<f64> [2,3,12] filter f64[12] points 24 lag 0 pre_gate post_gate -> f64[24]"),
        (s4, "<f64> [2,3,12] filter f64[12] points 24 lag 0 skip -> f64[12]"),
        (s4_channels, "<f64> [2,6,12] filter f64[12] points 24 lag 0 skip -> f64[12]"),
    ],
)
def test_public_models_fold_whole(program: Program, text: str) -> None:
    assert _irs(program, *inputs(LENGTH)) == [text]


def test_the_filter_is_told_from_an_input_of_one_sequence() -> None:
    u, k, _, d, _, _ = inputs(LENGTH, batch=1)

    def program(u: Tensor, k: Tensor, d: Tensor) -> Tensor:
        return irfft(rfft(k, n=N) * rfft(u, n=N), n=N)[..., :LENGTH] + u * d[:, None]

    assert _irs(program, u, k, d) == ["<f64> [1,3,12] filter f64[12] points 24 lag 0 skip -> f64[12]"]


def test_sites_share_the_transform_of_their_input() -> None:
    u, k, r, _, x, _ = inputs(LENGTH)

    def program(u: Tensor, k: Tensor, r: Tensor, x: Tensor) -> Tensor:
        u_f = rfft(u * x, n=N)
        return irfft(u_f * rfft(k, n=N), n=N) + irfft(u_f * rfft(r, n=N), n=N)

    output, (result,) = run_passes(program, u, k, r, x)
    assert [d.code for d in result.decisions] == ["lowered", "lowered"]
    assert not [n for n in result.after.graph.nodes if "fft" in str(n.target)]
    torch.testing.assert_close(output, program(u, k, r, x))


def test_what_one_convolution_ends_with_another_does_not_begin_with() -> None:
    """The product of both results is a gate of the first alone; a gate of the first result is none of the second."""
    u, k, r, _, x, _ = inputs(LENGTH)

    def multiplied(u: Tensor, k: Tensor, r: Tensor, x: Tensor) -> Tensor:
        return _convolved(u, k) * _convolved(x, r)

    def in_turn(u: Tensor, k: Tensor, r: Tensor, x: Tensor) -> Tensor:
        return _convolved(_convolved(u, k) * x, r)

    def cast_in_turn(u: Tensor, k: Tensor, r: Tensor, x: Tensor) -> Tensor:
        return _convolved(_convolved(u, k).to(u.dtype), r)

    for program in (multiplied, in_turn, cast_in_turn):
        output, (result,) = run_passes(program, u, k, r, x)
        assert [d.code for d in result.decisions] == ["lowered", "lowered"]
        assert not [n for n in result.after.graph.nodes if "fft" in str(n.target)]
        torch.testing.assert_close(output, program(u, k, r, x))


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_result_of_another_layout_keeps_it_where_it_is_seen() -> None:
    u, k = (x.detach() for x in inputs(LENGTH)[:2])

    def returned(u: Tensor, k: Tensor) -> Tensor:
        u, k = u.transpose(1, 2).contiguous(), k.t().contiguous()
        return irfft(rfft(u, N, dim=1) * rfft(k, N, dim=0), N, dim=1).contiguous()

    def read(u: Tensor, k: Tensor) -> Tensor:
        return returned(u, k) @ torch.ones(3, 3, dtype=u.dtype)

    output, (result,) = run_passes(returned, u, k)
    assert output.stride() == returned(u, k).stride()
    assert torch.ops.aten.clone.default in [n.target for n in result.after.graph.nodes]
    output, (result,) = run_passes(read, u, k)
    torch.testing.assert_close(output, read(u, k))
    targets = [n.target for n in result.after.graph.nodes]
    assert CONVOLUTION_OP in targets
    assert torch.ops.aten.clone.default not in targets


def _written_input(u: Tensor, k: Tensor) -> Tensor:
    u_f = rfft(u, n=N)
    u.add_(1)
    return irfft(u_f * rfft(k, n=N), n=N)


def _written_filter(u: Tensor, k: Tensor) -> Tensor:
    k_f = rfft(k, n=N)
    k.zero_()
    return irfft(rfft(u, n=N) * k_f, n=N)


def _written_skip(u: Tensor, k: Tensor) -> Tensor:
    y = irfft(rfft(u, n=N) * rfft(k, n=N), n=N)[..., :LENGTH]
    skipped = u * k[:, :1]
    u.zero_()
    return y + skipped


def _written_copy_or_view(u: Tensor, k: Tensor) -> Any:
    y = irfft(rfft(u, n=N) * rfft(k, n=N), n=N)[..., :LENGTH]
    flat = y.reshape(-1)
    flat.sin_()
    return y, flat


@pytest.mark.parametrize("program", [_written_input, _written_filter, _written_skip, _written_copy_or_view])
def test_writes_meanwhile_are_refused(program: Program) -> None:
    u, k = (x.detach() for x in inputs(LENGTH)[:2])
    output, (result,) = run_passes(program, u.clone(), k.clone())
    assert [d.code for d in result.decisions] == ["mutation"]
    torch.testing.assert_close(output, program(u.clone(), k.clone()))


def test_a_result_may_be_written_to() -> None:
    u, k = (x.detach() for x in inputs(LENGTH)[:2])

    def program(u: Tensor, k: Tensor) -> Tensor:
        y = irfft(rfft(u, n=N) * rfft(k, n=N), n=N)[..., :LENGTH]
        y[..., 0] = 0
        return y

    output, (result,) = run_passes(program, u, k)
    assert [d.code for d in result.decisions] == ["lowered"]
    torch.testing.assert_close(output, program(u, k))


# ---- modes -----------------------------------------------------------------------------------------------------------


def test_casts_outside_of_autocast_stay_outside() -> None:
    u, k, _, d, _, _ = (x.detach().float() for x in inputs(LENGTH))

    def program(u: Tensor, k: Tensor, d: Tensor) -> Tensor:
        wide = u.float()
        with torch.autocast("cpu", enabled=False):
            y = irfft(rfft(wide, n=N) * rfft(k, n=N), n=N)[..., :LENGTH]
        return (y + wide * d[:, None]).to(HALF)

    assert _irs(program, u.to(HALF), k, d) == ["<f32> [2,3,12] filter f32[12] points 24 lag 0 -> f32[12]"]
    output, _ = run_passes(program, u.to(HALF), k, d)
    torch.testing.assert_close(output, program(u.to(HALF), k, d))


def test_under_autocast() -> None:
    u, k, _, d, _, z = (x.detach().float() for x in inputs(LENGTH))

    def program(u: Tensor, k: Tensor, d: Tensor, z: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=HALF):
            y = irfft(rfft(u, n=N) * rfft(k, n=N), n=N)[..., :LENGTH]
            return (y + torch.einsum("bcl,c->bcl", u, d)) * z

    output, (result,) = run_passes(program, u, k, d, z)
    assert [d.code for d in result.decisions] == ["lowered"]
    expected = program(u, k, d, z)
    assert output.dtype is expected.dtype
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


def test_without_gradients_of_the_filter() -> None:
    """Detached, the filter stays so: what is detached is read, not what it was detached from."""
    u, k = inputs(LENGTH)[:2]

    def program(u: Tensor, k: Tensor) -> Tensor:
        return irfft(rfft(u, n=N) * rfft(k.detach(), n=N), n=N)

    output, (result,) = run_passes(program, u, k)
    assert [d.code for d in result.decisions] == ["lowered"]
    assert torch.autograd.grad(output.sum(), (u, k), allow_unused=True)[1] is None
