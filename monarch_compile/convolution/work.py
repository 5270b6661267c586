"""What a long convolution costs: as FFTs, which is what runs today, and as the emitted kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from monarch_compile.calls import DEVICE_ALONE, Calls
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import Cost, Prediction
from monarch_compile.cost.sizes import known, quantity


@dataclass(frozen=True)
class Rates:
    """How fast a GPU convolves, beside what the cost model knows of it.

    fft_s: seconds for each point of the transform of each sequence: real FFTs, the product, casts. long_fft_s: the same
    of sequences of more than `ON_CHIP` points, and of their filters.
    own_s: those of the emitted kernels, by the points of their transform, for results in bfloat16; single_s: for other
    ones, with products of float32 numbers; gradient_s: of the gradient of a filter.
    filter_s: for each point of a filter; long_filter_s: of one of more than `ON_CHIP` points.
    fft_launches, launches, long_launches, gradient_launches: how many kernels there are.
    fallback_s: host seconds of a call that Inductor generates no code for; fallbacks: how many of the former's launches
    are such.
    """

    fft_s: float
    long_fft_s: float
    own_s: Mapping[int, float]
    single_s: Mapping[int, float]
    gradient_s: Mapping[int, float]
    filter_s: float
    long_filter_s: float
    fft_launches: int
    launches: int
    long_launches: int
    gradient_launches: int
    fallbacks: int
    fallback_s: float


ON_CHIP_S = {256: 2.3e-12, 512: 2.7e-12, 1024: 3.1e-12, 2048: 4.0e-12, 4096: 4.3e-12, 8192: 6.6e-12}
THROUGH_MEMORY_S = {1 << 14: 9e-12, 1 << 15: 9.5e-12, 1 << 16: 10e-12, 1 << 17: 11.5e-12, 1 << 18: 12e-12}
LONGEST_S = {1 << 19: 15e-12, 1 << 20: 18e-12}
GPU = Rates(
    fft_s=17e-12,
    long_fft_s=21e-12,
    own_s={**ON_CHIP_S, **THROUGH_MEMORY_S, **LONGEST_S},
    single_s={256: 5.7e-12, 512: 7.3e-12, 1024: 8.9e-12, 2048: 12.1e-12, 4096: 11.4e-12, 8192: 16.9e-12},
    gradient_s={256: 4.4e-12, 512: 5.7e-12, 1024: 6.9e-12, 2048: 8.0e-12, 4096: 10.5e-12, 8192: 13.7e-12},
    filter_s=6e-12,
    long_filter_s=8e-12,
    fft_launches=5,
    launches=6,
    long_launches=13,
    gradient_launches=3,
    fallbacks=3,
    fallback_s=25e-6,
)
"""Fitted to CUDA-graph replays on an H100 of 80 GB HBM3, whose copies move 3.01 TB/s; other devices are scaled. What
is said of 512 points is interpolated. There are four launches by now; small problems were timed with six, and are
predicted by these."""
FITTED_BYTES_PER_S = 3.01e12
FFT_BYTES = 54
"""Bytes that the FFTs move for each point."""
CPU_POINT_S = 20e-9
"""Elsewhere both forms are the same FFTs; about as long as a point of one takes on two cores."""
HOST_LAUNCHES = 2
"""Small kernels in a row took the host 18 to 37 us each in plain calls, up to twice what attention's take."""
BACK_FFT = 1.2
"""The gradient of a filter, in FFTs of the forward pass."""

LEAST_CAPABILITY = (9, 0)
LEAST_POINTS, ON_CHIP, MOST_POINTS = 256, 1 << 13, 1 << 20
"""Sequences are padded to the first many points at least, and to a power of two. Up to the second, transforms stay on
chip; longer ones have an outer factor, through memory; beyond the third, there are no kernels."""
MOST_GRADIENT_POINTS = ON_CHIP
"""The longest that the gradient of a filter has kernels for."""


def factors(points: int) -> tuple[int, int]:
    """Two factors of a transform of a power of two points, the first at least the second."""
    bits = points.bit_length() - 1
    first = 1 << -(-bits // 2)
    return first, points // first


OUTER_FACTORS = {1 << 14: 16, 1 << 15: 32, 1 << 16: 64, 1 << 17: 32, 1 << 18: 64, 1 << 19: 128, 1 << 20: 128}
"""The factor of a transform that goes through memory, by its points."""


def points_of(seq_len: Any, out_len: Any) -> int:
    """Points of the complex transform that the kernels make of a sequence: it is as long as input and output.

    Of symbolic lengths, only the power of two is guarded on.
    """
    points = LEAST_POINTS
    while seq_len > points or out_len > points:
        points *= 2
    return points


def runs_kernels(
    device: torch.device | str,
    dtype: torch.dtype,
    filter_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seq_len: Any,
    out_len: Any,
) -> bool:
    """Whether the operator runs on the emitted kernels, which are as accurate as a result of 16 bits asks for."""
    halves = (torch.float16, torch.bfloat16)
    if (
        not has_kernels(torch.device(device))
        or dtype not in halves
        or out_dtype not in halves
        or filter_dtype is torch.float64
    ):
        return False
    most = MOST_POINTS if out_dtype is torch.bfloat16 else ON_CHIP
    return bool(seq_len <= most and out_len <= most)


def correlates_on_kernels(
    device: torch.device | str,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    filter_dtype: torch.dtype,
    seq_len: Any,
    out_len: Any,
) -> bool:
    """Whether the gradient of a filter is computed by the emitted kernels, from 16-bit inputs and gradients."""
    if not runs_kernels(device, dtype, filter_dtype, grad_dtype, seq_len, out_len):
        return False
    return bool(seq_len <= MOST_GRADIENT_POINTS and out_len <= MOST_GRADIENT_POINTS)


@functools.cache
def has_kernels(device: torch.device) -> bool:
    """Whether kernels were measured on such a device: Hopper and later, whose shared memory holds all schedules. Where
    there is none to ask, a CUDA device is taken for one."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def cost(ir: LongConvolution) -> Cost:
    """Work of the emitted kernels; where a size is symbolic, of a sequence that is not padded."""
    batch, channels, seq_len, out_len = map(quantity, (ir.batch, ir.channels, ir.seq_len, ir.out_len))
    if isinstance(seq_len, int) and isinstance(out_len, int):
        points = points_of(seq_len, out_len)
        outer = OUTER_FACTORS.get(points, 1)
        first, second = factors(points // outer)
        flops = batch * channels * points * 8 * (first + 2 * second if outer == 1 else outer + 2 * first + 2 * second)
        between, of_filter = (0, 24 * seq_len) if outer == 1 else (16 * points, 24 * points)
    else:
        flops = batch * channels * seq_len * 24 * sympy.sqrt(seq_len)
        between, of_filter = 0, 24 * seq_len
    gates = int(ir.pre_gate) * seq_len + int(ir.post_gate) * out_len
    moved = (seq_len + gates) * ir.dtype.itemsize + out_len * ir.out_dtype.itemsize + between
    return Cost(flops, batch * channels * moved + channels * of_filter, 0)


def fft_cost(ir: LongConvolution) -> Cost:
    """Work of the FFTs."""
    batch, channels, points = map(quantity, (ir.batch, ir.channels, ir.transform_len))
    rows = batch * channels
    logarithm = sympy.log(points, 2) if isinstance(points, sympy.Expr) else math.ceil(math.log2(max(2, points)))
    return Cost(5 * rows * points * logarithm, rows * points * FFT_BYTES, 0)


def predict(
    ir: LongConvolution, device: Device, hints: Mapping[str, int] | None = None, calls: Calls = DEVICE_ALONE
) -> Prediction:
    """Seconds as FFTs and as the emitted kernels, where each symbolic size is what `hints` has.

    Raises:
        InputError: a size has no value.
    """
    sizes = {name: known(getattr(ir, name), hints) for name in SIZES}
    if device.kind != "cuda" or torch.float64 in (ir.dtype, ir.filter_dtype):
        seconds = sizes["batch"] * sizes["channels"] * sizes["transform_len"] * CPU_POINT_S
        return Prediction(seconds, seconds)
    rows, seq_len, out_len = sizes["batch"] * sizes["channels"], sizes["seq_len"], sizes["out_len"]
    slower = FITTED_BYTES_PER_S / (device.ceiling.bytes_per_s if device.ceiling else device.monarch.bytes_per_s)
    points = points_of(seq_len, out_len)
    gates = rows * (int(ir.pre_gate) * seq_len + int(ir.post_gate) * out_len) * ir.dtype.itemsize / FITTED_BYTES_PER_S
    is_long, channels = points > ON_CHIP, sizes["channels"]
    transformed = (rows + channels) * GPU.long_fft_s if is_long else rows * GPU.fft_s
    fft_s = (sizes["transform_len"] * transformed + gates) * slower
    of_filter, launches = (GPU.long_filter_s, GPU.long_launches) if is_long else (GPU.filter_s, GPU.launches)
    rates = GPU.own_s if ir.out_dtype is torch.bfloat16 else GPU.single_s
    own_s = (points * (rows * rates.get(points, GPU.fft_s * 2) + channels * of_filter) + gates) * slower
    launch_s = device.monarch.launch_s
    exact_s, monarch_s = fft_s + GPU.fft_launches * launch_s, own_s + launches * launch_s
    if calls.trains:
        exact_s += 2 * BACK_FFT * fft_s
        monarch_s += own_s * (1 + ir.pre_gate + ir.post_gate) + _filter_gradient_s(
            rows, points, fft_s, slower, launch_s
        )
    host = device.host(calls.launcher)
    if host is not None and host.kernel_s:
        fused = GPU.fft_launches - GPU.fallbacks
        exact_s = max(exact_s, GPU.fallbacks * GPU.fallback_s + fused * host.kernel_s)
        monarch_s = max(monarch_s, launches * HOST_LAUNCHES * host.kernel_s)
    return Prediction(exact_s, monarch_s)


def _filter_gradient_s(rows: int, points: int, fft_s: float, slower: float, launch_s: float) -> float:
    """Seconds of the gradient of a filter, by the emitted kernels where there are any, else by FFTs."""
    rate = GPU.gradient_s.get(points)
    if rate is None:
        return BACK_FFT * fft_s
    return rows * points * rate * slower + GPU.gradient_launches * launch_s


SIZES = ("batch", "channels", "seq_len", "filter_len", "transform_len", "out_len")
