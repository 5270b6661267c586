"""What a long convolution costs: as FFTs, which is what runs today, and as the emitted kernels."""

from __future__ import annotations

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
from monarch_compile.errors import InputError
from monarch_compile.ir import Dim


@dataclass(frozen=True)
class Rates:
    """How fast a GPU runs convolutions, beside what the cost model knows of it.

    fft_bytes: bytes that the real FFTs of the input and of the product, the product and casts move, for each point of
    a transform that one kernel of cuFFT makes; longer: factor on it, by the number of points above which it holds.
    flops: FLOP per second of the emitted kernels. fallback_s: host seconds of a call that Inductor does not generate.
    """

    fft_bytes: float
    longer: tuple[tuple[int, float], ...]
    flops: float
    fallback_s: float


GPU = Rates(fft_bytes=54.0, longer=((1 << 15, 1.35), (1 << 17, 2.5)), flops=200e12, fallback_s=25e-6)
"""Fitted to CUDA-graph replays on an H100 of 80 GB HBM3."""

LEAST_POINTS, MOST_POINTS = 256, 8192
"""Sequences are padded to this many points at least, and to a power of two; longer ones have no kernels."""


def factors(points: int) -> tuple[int, int]:
    """Two factors of a transform of a power of two points, the first at least the second."""
    bits = points.bit_length() - 1
    first = 1 << -(-bits // 2)
    return first, points // first


def points_of(seq_len: Any, out_len: Any) -> int:
    """Points of the complex transform that the kernels make of a sequence: it is as long as input and output.

    Of symbolic lengths, only the power of two is guarded on.
    """
    points = LEAST_POINTS
    while seq_len > points or out_len > points:
        points *= 2
    return points


def runs_kernels(
    device: str, dtype: torch.dtype, filter_dtype: torch.dtype, out_dtype: torch.dtype, seq_len: Any, out_len: Any
) -> bool:
    """Whether the operator runs on the emitted kernels, which are as accurate as a result in bfloat16 asks for."""
    halves = (torch.float16, torch.bfloat16)
    if device != "cuda" or dtype not in halves or out_dtype is not torch.bfloat16 or filter_dtype is torch.float64:
        return False
    return bool(seq_len <= MOST_POINTS and out_len <= MOST_POINTS)


def cost(ir: LongConvolution) -> Cost:
    """Work of the emitted kernels; where a size is symbolic, of a sequence that is not padded."""
    batch, channels, seq_len, out_len = map(quantity, (ir.batch, ir.channels, ir.seq_len, ir.out_len))
    if isinstance(seq_len, int) and isinstance(out_len, int):
        points = points_of(seq_len, out_len)
        first, second = factors(points)
        flops = batch * channels * points * 8 * (first + 2 * second)
    else:
        flops = batch * channels * seq_len * 24 * sympy.sqrt(seq_len)
    gates = ir.pre_gate * seq_len + ir.post_gate * out_len
    moved = (seq_len + gates) * ir.dtype.itemsize + out_len * ir.out_dtype.itemsize
    return Cost(flops, batch * channels * moved + channels * 24 * seq_len, 0)


def fft_cost(ir: LongConvolution) -> Cost:
    """Work of the FFTs."""
    batch, channels, points = map(quantity, (ir.batch, ir.channels, ir.transform_len))
    rows = batch * channels
    logarithm = sympy.log(points, 2) if isinstance(points, sympy.Expr) else math.ceil(math.log2(max(2, points)))
    return Cost(5 * rows * points * logarithm, rows * points * GPU.fft_bytes, 0)


def predict(
    ir: LongConvolution, device: Device, hints: Mapping[str, int] | None = None, calls: Calls = DEVICE_ALONE
) -> Prediction:
    """Seconds as FFTs and as the emitted kernels, where each symbolic size is what `hints` has.

    Raises:
        InputError: a size has no value.
    """
    sizes = {name: known(getattr(ir, name), hints) for name in SIZES}
    if device.kind != "cuda" or torch.float64 in (ir.dtype, ir.filter_dtype):
        seconds = sizes["batch"] * sizes["channels"] * sizes["transform_len"] * 20e-9
        return Prediction(seconds, seconds)
    points = points_of(sizes["seq_len"], sizes["out_len"])
    first, second = factors(points)
    rows = sizes["batch"] * sizes["channels"]
    bandwidth = device.monarch.bytes_per_s
    longer = next((factor for least, factor in reversed(GPU.longer) if sizes["transform_len"] >= least), 1.0)
    fft_s = rows * sizes["transform_len"] * GPU.fft_bytes * longer / bandwidth + 5 * device.monarch.launch_s
    moved = rows * (sizes["seq_len"] * ir.dtype.itemsize + sizes["out_len"] * ir.out_dtype.itemsize)
    moved += sizes["channels"] * points * 40
    products = rows * points * 8 * (first + 2 * second) / GPU.flops
    own_s = math.hypot(products, moved / bandwidth) + 4 * device.monarch.launch_s
    host = device.host(calls.launcher)
    if host is not None and host.kernel_s:
        fft_s = max(fft_s, 3 * GPU.fallback_s + 2 * host.kernel_s)
        own_s = max(own_s, GPU.fallback_s + 4 * host.kernel_s)
    return Prediction(fft_s, own_s)


SIZES = ("batch", "channels", "seq_len", "filter_len", "transform_len", "out_len")


def quantity(size: Dim) -> Any:
    """A size as an int or a sympy expression."""
    return size if isinstance(size, int) else sympy.sympify(size)


def known(size: Dim, hints: Mapping[str, int] | None) -> int:
    """A size where symbols have the values of `hints`.

    Raises:
        InputError: one has none.
    """
    if isinstance(size, int):
        return size
    value = sympy.sympify(size).subs(dict(hints or {}))
    if not value.is_number:
        raise InputError(f"the size {size} has no value; give one for each symbol in it")
    return int(value)
