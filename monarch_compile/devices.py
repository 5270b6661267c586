"""Descriptions of devices for the cost model: rates that were fitted to measurements, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from monarch_compile.errors import InputError


@dataclass(frozen=True)
class Rates:
    """FLOP per second that a form of attention reaches in its matrix products, by the size of an element."""

    half: float
    single: float
    double: float

    def of(self, dtype: torch.dtype) -> float:
        """The rate for `dtype`, a floating type of 2, 4 or 8 bytes."""
        return {2: self.half, 4: self.single, 8: self.double}[dtype.itemsize]


WIDE = 128
"""Heads of this many features or more fill the tensor cores better."""


@dataclass(frozen=True)
class Form:
    """How fast a device runs one form of attention.

    flops: rates of its matrix products. bytes_per_s: memory bandwidth that its kernels reach.
    exps_per_s: softmax elements per second where they are passes of their own; inf where they are fused.
    launch_s: fixed seconds of each kernel.
    """

    flops: Rates
    bytes_per_s: float
    exps_per_s: float = math.inf
    launch_s: float = 0.0


@dataclass(frozen=True)
class Ceiling:
    """A device at its best: FLOP per second of a large 16-bit matrix product, bytes per second of a copy."""

    half_flops: float
    bytes_per_s: float


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a device.

    kind: "cpu" or "cuda".
    exact, monarch: rates of the two forms.
    kernels_per_iter: Monarch kernels in an iteration.
    tile: the Monarch form's matrix products are padded to tiles of at least this, as cost.py has it; 1: to none.
    overlap: exponent p with which times combine, (sum t^p)^(1/p): 1 where nothing overlaps, large for a pure roofline.
    pad_penalty: factor on the Monarch form's time where the sequence is padded to whole blocks.
    wide_gain: factor on the exact form's FLOP rate in 16 bits for heads of `WIDE` features or more.
    ceiling: what benchmarks compare with; None where it was not measured. Predictions do not use it.
    """

    name: str
    kind: str
    exact: Form
    monarch: Form
    kernels_per_iter: int
    tile: int
    overlap: float
    pad_penalty: float = 1.0
    wide_gain: float = 1.0
    ceiling: Ceiling | None = None

    def seconds(self, form: Form, flops: float, moved: float, exps: float, dtype: torch.dtype) -> float:
        """Seconds of work of a form, without launches: `flops`, `moved` bytes and `exps` softmax elements."""
        parts = (flops / form.flops.of(dtype), moved / form.bytes_per_s, exps / form.exps_per_s)
        total: float = math.fsum(part**self.overlap for part in parts) ** (1 / self.overlap)
        return total


DEVICES: dict[str, Device] = {
    # float32 on one thread of a 2.5 GHz AVX-512 server core; its speed-ups: benchmarks/results/cpu_attention.json, from
    # a busy machine; times from quieter runs. Other types are guesses. The low bandwidth stands for the copies
    # that the reference makes between its products.
    "cpu": Device(
        name="cpu",
        kind="cpu",
        exact=Form(Rates(half=55e9, single=55e9, double=27e9), bytes_per_s=10e9, launch_s=100e-6),
        monarch=Form(Rates(half=45e9, single=45e9, double=22e9), bytes_per_s=2.3e9, exps_per_s=0.5e9, launch_s=50e-6),
        kernels_per_iter=2,
        tile=1,
        overlap=1.0,
        pad_penalty=1.05,
    ),
    # 16 bits fitted to CUDA-graph replays (benchmarks/results/speed_h200.json, h200_dims.json): cuDNN for exact
    # attention, two kernels for the Monarch form.
    # The float32 and float64 rates are guesses on the careful side (equal for both forms), not measured.
    "h200": Device(
        name="h200",
        kind="cuda",
        exact=Form(Rates(half=435e12, single=40e12, double=20e12), bytes_per_s=3.5e12, launch_s=5e-6),
        monarch=Form(Rates(half=238e12, single=40e12, double=20e12), bytes_per_s=4.5e12, launch_s=2.2e-6),
        kernels_per_iter=2,
        tile=16,
        overlap=2.0,
        wide_gain=1.36,
        ceiling=Ceiling(half_flops=790e12, bytes_per_s=4.27e12),
    ),
    # A data-centre GPU of no particular make: guesses, not measured.
    "cuda": Device(
        name="cuda",
        kind="cuda",
        exact=Form(Rates(half=150e12, single=15e12, double=7e12), bytes_per_s=1.5e12, launch_s=5e-6),
        monarch=Form(Rates(half=90e12, single=12e12, double=5e12), bytes_per_s=1.5e12, launch_s=4e-6),
        kernels_per_iter=2,
        tile=64,
        overlap=2.0,
    ),
}

_CUDA_NAMES = (("H200", "h200"), ("H100", "h200"))
"""A substring of torch.cuda.get_device_name() and the description it selects; the first that fits."""


def device_for(device_type: str, name: str | None = None) -> Device:
    """The description of a device of `device_type` ("cpu" or "cuda"), `name` as torch.cuda.get_device_name() gives it.

    Raises:
        InputError: there is no description for this type of device.
    """
    if device_type == "cuda":
        known = next((key for part, key in _CUDA_NAMES if part in (name or "")), "cuda")
        return DEVICES[known]
    if device_type == "cpu":
        return DEVICES["cpu"]
    raise InputError(f"device_type must be 'cpu' or 'cuda'; found {device_type!r}")


def installed(device: str | torch.device) -> Device:
    """The description of a device of this machine.

    Raises:
        InputError: there is no description for this type of device.
    """
    place = torch.device(device)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" and torch.cuda.is_available() else None
    return device_for(place.type, name)
