"""Descriptions of devices for the cost model: rates that were fitted to measurements, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from monarch_compile.calls import COMPILED, EAGER, REPLAYED
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

    def times(self, factor: float) -> Rates:
        """All rates, so many times as high."""
        return Rates(self.half * factor, self.single * factor, self.double * factor)


WIDE = 128
"""Heads of this many features or more fill the tensor cores better."""
SHORT_BLOCK, LONG_BLOCK = 64, 512
"""Between these, blocks of more keys keep the tensor cores busy for longer."""


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
class Backward:
    """How fast a device runs the backward pass of a form, in terms of what its forward pass counts.

    flops: forward FLOP per second. values_per_s: elements per second that the forward pass moves, whatever their dtype.
    exps_per_s: softmax elements per second. launch_s: fixed seconds of all of its kernels.
    near: factor on the whole where there are exact groups.
    """

    flops: Rates | None = None
    values_per_s: float = math.inf
    exps_per_s: float = math.inf
    launch_s: float = 0.0
    near: float = 1.0

    def seconds(self, flops: float, values: float, exps: float, dtype: torch.dtype, near: bool = False) -> float:
        """Seconds of the pass."""
        products = 0.0 if self.flops is None else flops / self.flops.of(dtype)
        total = self.launch_s + products + values / self.values_per_s + exps / self.exps_per_s
        return total * (self.near if near else 1.0)


@dataclass(frozen=True)
class Host:
    """Seconds that a way of calling takes of the host; the device works meanwhile on what it was given before.

    call_s, call_back_s: a call of a compiled graph, and of its backward pass, whatever is in it.
    dense_s: a product with weights, and what is fused beside it.
    exact_s: exact attention. site_s, kernel_s: Monarch attention, once and for each kernel. rows_s: rows of a prefix.
    exact_back_s, monarch_back_s: their backward passes; near: factor on the latter where there are exact groups.
    work, near_work, back_work: factors on the device's time of the Monarch form's forward pass (with exact groups:
    near_work) and backward pass: of eager calls, in which nothing is fused.
    """

    exact_s: float = 0.0
    site_s: float = 0.0
    kernel_s: float = 0.0
    rows_s: float = 0.0
    exact_back_s: float = 0.0
    monarch_back_s: float = 0.0
    near: float = 1.0
    call_s: float = 0.0
    call_back_s: float = 0.0
    dense_s: float = 0.0
    work: float = 1.0
    near_work: float = 1.0
    back_work: float = 1.0

    def times(self, factor: float) -> Host:
        """The same on a host where launches take so many times as long."""
        names = [field.name for field in fields(self) if field.name.endswith("_s")]
        return replace(self, **{name: getattr(self, name) * factor for name in names})


@dataclass(frozen=True)
class Ceiling:
    """A device at its best: FLOP per second of a large 16-bit matrix product, bytes per second of a copy.

    launch_s: seconds that the launch of a small eager kernel takes of the host.
    """

    half_flops: float
    bytes_per_s: float
    launch_s: float = 6.4e-6

    def __str__(self) -> str:
        rates = f"{self.half_flops / 1e12:.0f} TFLOP/s, copies {self.bytes_per_s / 1e12:.2f} TB/s"
        return f"16-bit matrix products {rates}, a launch {self.launch_s * 1e6:.1f} us of the host"


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a device.

    kind: "cpu" or "cuda".
    exact, monarch: rates of the two forms.
    kernels_per_iter: Monarch kernels in an iteration.
    tile: the Monarch form's matrix products are padded to tiles of at least this, as the cost model has it; 1: to none.
    overlap: exponent p with which times combine, (sum t^p)^(1/p): 1 where nothing overlaps, large for a pure roofline.
    pad_penalty: factor on the Monarch form's time where the sequence is padded to whole blocks.
    wide_gain: factor on the exact form's FLOP rate in 16 bits for heads of `WIDE` features or more.
    block_gain: what each doubling of blocks from `SHORT_BLOCK` to `LONG_BLOCK` adds to the Monarch form's FLOP rate in
        16 bits, as a share.
    exact_back, monarch_back: rates of their backward passes, of the Monarch form's without kernels.
    gradients: rates of the kernels of the Monarch form's backward pass; None where there are none.
    dense: FLOP per second of products with weights and what is fused beside them, rather too high than too low.
    replayed, compiled, eager: what calls take of the host; None where it is itself the device.
    ceiling: what benchmarks compare with, and what descriptions of other devices are scaled by; None: not measured.
    """

    name: str
    kind: str
    exact: Form
    monarch: Form
    kernels_per_iter: int
    tile: int
    overlap: float
    exact_back: Backward
    monarch_back: Backward
    gradients: Form | None = None
    pad_penalty: float = 1.0
    wide_gain: float = 1.0
    block_gain: float = 0.0
    dense: Rates = Rates(math.inf, math.inf, math.inf)
    replayed: Host | None = None
    compiled: Host | None = None
    eager: Host | None = None
    ceiling: Ceiling | None = None

    def host(self, launcher: str) -> Host | None:
        """What a way of calling takes of the host; None: nothing that the device's rates do not hold."""
        return {REPLAYED: self.replayed, COMPILED: self.compiled, EAGER: self.eager}[launcher]

    def seconds(self, form: Form, flops: float, moved: float, exps: float, dtype: torch.dtype) -> float:
        """Seconds of work of a form, without launches: `flops`, `moved` bytes and `exps` softmax elements."""
        parts = (flops / form.flops.of(dtype), moved / form.bytes_per_s, exps / form.exps_per_s)
        total: float = math.fsum(part**self.overlap for part in parts) ** (1 / self.overlap)
        return total


_REPLAYED = Host(call_s=85e-6, call_back_s=400e-6)
_COMPILED = Host(
    exact_s=21e-6,
    kernel_s=11e-6,
    rows_s=25e-6,
    exact_back_s=50e-6,
    monarch_back_s=650e-6,
    near=1.85,
    call_s=31e-6,
    call_back_s=400e-6,
    dense_s=32e-6,
)
_EAGER = Host(
    exact_s=26e-6,
    site_s=110e-6,
    kernel_s=45e-6,
    rows_s=60e-6,
    exact_back_s=270e-6,
    monarch_back_s=3.5e-3,
    near=2.0,
    back_work=3.0,
)
"""What calls take of the host: of one vCPU of a machine that holds an H100 (benchmarks/results/h100_rates.json, and
never_slower_h100.json for replays, of which each copies the graph's inputs)."""

# Fitted to CUDA-graph replays on an H100 of 80 GB HBM3 (benchmarks/results/h100_rates.json): the fastest of cuDNN,
# flash and memory-efficient attention, two kernels for the Monarch form, and steps of training through Inductor.
# The float64 rates are guesses. Those of the backward kernels are three quarters of the forward pass's, rather slow.
_H100 = Device(
    name="h100",
    kind="cuda",
    exact=Form(Rates(half=430e12, single=30e12, double=20e12), bytes_per_s=3.0e12, launch_s=5.6e-6),
    monarch=Form(Rates(half=290e12, single=27e12, double=20e12), bytes_per_s=3.4e12, launch_s=2.8e-6),
    kernels_per_iter=2,
    tile=16,
    overlap=1.6,
    exact_back=Backward(Rates(half=170e12, single=13e12, double=8e12), launch_s=20e-6),
    monarch_back=Backward(values_per_s=85e9, exps_per_s=42e9, launch_s=60e-6, near=1.25),
    gradients=Form(Rates(half=220e12, single=20e12, double=15e12), bytes_per_s=2.55e12, launch_s=2.8e-6),
    wide_gain=1.4,
    dense=Rates(half=500e12, single=400e12, double=50e12),
    replayed=_REPLAYED,
    compiled=_COMPILED,
    eager=_EAGER,
    ceiling=Ceiling(half_flops=762e12, bytes_per_s=3.01e12),
)

DEVICES: dict[str, Device] = {
    # float32 on one thread of a 2.5 GHz AVX-512 server core; its speed-ups: benchmarks/results/cpu_attention.json, from
    # a busy machine; times from quieter runs. Other types are guesses. The low bandwidth stands for the copies
    # that the reference makes between its products. Backward passes and eager calls: benchmarks/results/cpu_rates.json.
    "cpu": Device(
        name="cpu",
        kind="cpu",
        exact=Form(Rates(half=55e9, single=55e9, double=27e9), bytes_per_s=10e9, launch_s=100e-6),
        monarch=Form(Rates(half=45e9, single=45e9, double=22e9), bytes_per_s=2.3e9, exps_per_s=0.5e9, launch_s=50e-6),
        kernels_per_iter=2,
        tile=1,
        overlap=1.0,
        exact_back=Backward(Rates(half=22e9, single=22e9, double=11e9)),
        monarch_back=Backward(values_per_s=0.54e9, exps_per_s=0.07e9, near=2.6),
        pad_penalty=1.05,
        eager=Host(work=1.45, near_work=2.2, back_work=2.7),
    ),
    "h100": _H100,
    # 16 bits fitted to CUDA-graph replays (benchmarks/results/speed_h200.json, h200_dims.json): cuDNN for exact
    # attention, two kernels for the Monarch form. What was not measured there is the H100's, the same chip beside less
    # memory: float32, backward passes and the host.
    "h200": replace(
        _H100,
        name="h200",
        exact=Form(Rates(half=435e12, single=30e12, double=20e12), bytes_per_s=3.5e12, launch_s=5e-6),
        monarch=Form(Rates(half=238e12, single=27e12, double=20e12), bytes_per_s=4.5e12, launch_s=2.2e-6),
        overlap=2.0,
        wide_gain=1.36,
        block_gain=0.17,  # benchmarks/results/scale_graphs_h200.json, of blocks of 128 to 512
        ceiling=Ceiling(half_flops=790e12, bytes_per_s=4.27e12),
    ),
    # A data-centre GPU that cannot be measured, because it is not there: guesses.
    "cuda": Device(
        name="cuda",
        kind="cuda",
        exact=Form(Rates(half=150e12, single=15e12, double=7e12), bytes_per_s=1.5e12, launch_s=5e-6),
        monarch=Form(Rates(half=90e12, single=12e12, double=5e12), bytes_per_s=1.5e12, launch_s=4e-6),
        kernels_per_iter=2,
        tile=64,
        overlap=2.0,
        exact_back=Backward(Rates(half=60e12, single=6e12, double=3e12), launch_s=20e-6),
        monarch_back=Backward(values_per_s=40e9, exps_per_s=20e9, launch_s=60e-6, near=1.25),
        gradients=Form(Rates(half=45e12, single=6e12, double=2e12), bytes_per_s=0.75e12, launch_s=4e-6),
        dense=Rates(half=250e12, single=125e12, double=20e12),
        replayed=_REPLAYED,
        compiled=_COMPILED,
        eager=_EAGER,
    ),
}

MEASURED = "measured"
"""Name of a description that is scaled by what was measured on this machine."""

_KNOWN = {"NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100"}
"""torch.cuda.get_device_name() of the GPUs that were measured, and their descriptions; others of the family (an H100
PCIe, a GH200) have other memory or clocks."""


def device_for(device_type: str, name: str | None = None) -> Device:
    """The description of a device of `device_type` ("cpu" or "cuda"), `name` as torch.cuda.get_device_name() gives it.

    Raises:
        InputError: there is no description for this type of device.
    """
    if device_type == "cuda":
        return DEVICES[_KNOWN.get(name or "", "cuda")]
    if device_type == "cpu":
        return DEVICES["cpu"]
    raise InputError(f"device_type must be 'cpu' or 'cuda'; found {device_type!r}")


def scaled(ceiling: Ceiling) -> Device:
    """The description of a GPU of which only the ceilings are known: the H100's, each rate by the ratio of ceilings.

    Times that kernels take whatever they do stay as they are.
    """
    like = DEVICES["h100"]
    known = like.ceiling or ceiling
    flops, moved = ceiling.half_flops / known.half_flops, ceiling.bytes_per_s / known.bytes_per_s
    launch = ceiling.launch_s / known.launch_s

    def form(given: Form) -> Form:
        return replace(given, flops=given.flops.times(flops), bytes_per_s=given.bytes_per_s * moved)

    def back(given: Backward) -> Backward:
        rates = None if given.flops is None else given.flops.times(flops)
        values, exps = given.values_per_s * moved, given.exps_per_s * moved
        return replace(given, flops=rates, values_per_s=values, exps_per_s=exps)

    return replace(
        like,
        name=MEASURED,
        exact=form(like.exact),
        monarch=form(like.monarch),
        exact_back=back(like.exact_back),
        monarch_back=back(like.monarch_back),
        gradients=like.gradients and form(like.gradients),
        dense=like.dense.times(flops),
        replayed=like.replayed and like.replayed.times(launch),
        compiled=like.compiled and like.compiled.times(launch),
        eager=like.eager and like.eager.times(launch),
        ceiling=ceiling,
    )


def installed(device: str | torch.device) -> Device:
    """The description of a device of this machine; a GPU that has none is measured, once (`ceilings.ceiling_of`).

    Raises:
        InputError: there is no description for this type of device.
    """
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        return device_for(place.type)
    name = torch.cuda.get_device_name(place)
    if name in _KNOWN:
        return device_for(place.type, name)
    from monarch_compile.cost.ceilings import ceiling_of

    ceiling = ceiling_of(place)
    return DEVICES["cuda"] if ceiling is None else scaled(ceiling)
