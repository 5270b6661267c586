"""The programs of a long convolution: its kernels and the buffers between them, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.convolution.schedule import Schedule, points
from monarch_compile.codegen.program import Buffer, Kernel, Program, Tiles
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.version import __version__

SPECTRUM_UNIT = 2.0**-4
"""The largest number of a spectrum, so that no product of transforms leaves the range of float16: their rows of at most
128 numbers have a norm below 4 sqrt(POINTS) sqrt(128 POINTS), which is 2**19.5 for 2**14 points and one number only."""
MAX_OFFSET = 2**31 - 1
SMALL = Tiling(16, 16, 4, 1)
"""Of kernels that prepare tables: their tiles follow from the transform's."""
COEFFICIENTS = 256
"""Coefficients that a program writes at once."""

SIZES = ("batch", "channels", "seq_len", "out_len", "filter_len", "transform_len", "lag", "scale")
"""What a kernel may be told at run time; it takes what it reads."""
STRIDES = {"u": "u", "pre_gate": "pre", "post_gate": "post"}


@dataclass(frozen=True)
class Specialization:
    """What of a launch lets kernels do with less.

    partial_in, partial_out: whether sequences are shorter than the transform. ragged_batch: whether the last tile has
    fewer sequences. wide_offsets: whether a sequence reaches over more than 2**31 elements.
    """

    partial_in: bool = True
    partial_out: bool = True
    ragged_batch: bool = True
    wide_offsets: bool = True


def specialize(
    ir: LongConvolution, schedule: Schedule, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]
) -> Specialization:
    """What holds of these tensors and sizes; nothing is asked of symbolic ones, which would add guards."""
    tile = schedule.sequences * schedule.main.turns
    reaches = [x.shape[-1] * x.stride(-1) for name, x in tensors.items() if name != "skip"]
    return Specialization(
        partial_in=not _equal(sizes["seq_len"], points(ir)),
        partial_out=not _equal(sizes["out_len"], points(ir)),
        ragged_batch=not isinstance(sizes["batch"], int) or sizes["batch"] % tile != 0,
        wide_offsets=not all(isinstance(reach, int) and reach <= MAX_OFFSET for reach in reaches),
    )


def expected(ir: LongConvolution, schedule: Schedule) -> Specialization:
    """That of a launch on contiguous tensors that fill tiles."""
    return Specialization(False, False, not isinstance(ir.batch, int), False)


def program(ir: LongConvolution, schedule: Schedule, specialization: Specialization) -> Program:
    """Kernels of a bucketed IR."""
    build = _toeplitz if schedule.method == "toeplitz" else _transform
    return Program(build(ir, schedule, specialization), ("y",))


def _transform(ir: LongConvolution, schedule: Schedule, specialization: Specialization) -> tuple[Kernel, ...]:
    rows, width, count = schedule.main.rows, schedule.main.step, points(ir)
    half = torch.float16
    tables = (
        Buffer("first", half, (2, rows, rows)),
        Buffer("twiddle", half, (2, rows, width)),
        Buffer("second", half, (2, width, width)),
    )
    spectrum = Buffer("spectrum", half, ("channels", 2, count))
    gain = Buffer("gain", torch.float32, ("channels",))
    warps = max(4, schedule.main.num_warps) if rows >= 64 else schedule.main.num_warps
    small = Tiling(rows, max(16, count // rows), warps, 1)
    tile = schedule.sequences * schedule.main.turns
    make = _Maker(ir, schedule, specialization)
    return (
        make.kernel("tables", (), tables, (max(rows, width),), SMALL),
        make.kernel("spectrum", (_filter(ir), *tables), (spectrum, gain), ("channels",), small),
        make.kernel(
            "transform",
            (*_sequences(ir), *tables, spectrum, gain),
            (_result(ir),),
            ("channels", Tiles("batch", tile)),
            schedule.main,
        ),
    )


def _toeplitz(ir: LongConvolution, schedule: Schedule, specialization: Specialization) -> tuple[Kernel, ...]:
    coefficients = Buffer("coefficients", torch.float16, ("channels", "distances"))
    gain = Buffer("gain", torch.float32, ("channels",))
    grid = ("channels", Tiles("batch", schedule.sequences), Tiles("out_len", schedule.main.rows))
    make = _Maker(ir, schedule, specialization)
    return (
        make.kernel("coefficients", (_filter(ir),), (coefficients, gain), ("channels",), SMALL),
        make.kernel("toeplitz", (*_sequences(ir), coefficients, gain), (_result(ir),), grid, schedule.main),
    )


def _filter(ir: LongConvolution) -> Buffer:
    strides = (("filter_channel", 0), ("filter_time", 1))
    return Buffer("filter", ir.filter_dtype, ("channels", "filter_len"), strides)


def _sequences(ir: LongConvolution) -> tuple[Buffer, ...]:
    """What is read for each output, as far as it is there."""
    lengths = {"u": "seq_len", "pre_gate": "seq_len", "post_gate": "out_len"}
    here = ("u", *(name for name in ("pre_gate", "post_gate") if getattr(ir, name)))
    found = []
    for name in here:
        strides = tuple((f"{STRIDES[name]}_{dim}", place) for place, dim in enumerate(("batch", "channel", "time")))
        found.append(Buffer(name, ir.dtype, ("batch", "channels", lengths[name]), strides))
    if ir.skip:
        found.append(Buffer("skip", torch.float32, ("channels",), (("skip_channel", 0),)))
    return tuple(found)


def _result(ir: LongConvolution) -> Buffer:
    return Buffer("y", ir.out_dtype, ("batch", "channels", "out_len"))


@dataclass(frozen=True)
class _Maker:
    """Kernels of one program, which share what texts are told."""

    ir: LongConvolution
    schedule: Schedule
    specialization: Specialization

    def kernel(
        self,
        template: str,
        reads: tuple[Buffer, ...],
        writes: tuple[Buffer, ...],
        grid: tuple[Any, ...],
        tiling: Tiling,
    ) -> Kernel:
        """One kernel, named by its template."""
        name = f"convolution_{template}"
        return Kernel(
            family="convolution",
            name=name,
            template=f"{template}.py.jinja",
            reads=reads,
            writes=writes,
            updates=(),
            sizes=SIZES,
            constants=tuple(self._constants().items()),
            variables=tuple(self._variables().items()),
            grid=grid,
            tiling=tiling,
            header="\n".join(
                (
                    f"# {name}: generated by monarch_compile {__version__}; do not edit.",
                    f"# ir: {self.ir}",
                    f"# schedule: {self.schedule}",
                    f"# specialization: {self.specialization}",
                )
            ),
        )

    def _constants(self) -> dict[str, Any]:
        main, sequences = self.schedule.main, self.schedule.sequences
        count = points(self.ir)
        return {
            "ROWS": main.rows,
            "WIDTH": main.step,
            "STEP": main.step,
            "COLUMNS": count // main.rows,
            "POINTS": count,
            "SEQUENCES": sequences,
            "TURNS": main.turns,
            "TILE": COEFFICIENTS,
            "TAU": math.tau,
            "SPECTRUM_UNIT": SPECTRUM_UNIT,
        }

    def _variables(self) -> dict[str, Any]:
        found = self.specialization
        return {
            "wraps": self.ir.wraps,
            "skips": self.ir.skip,
            "pre_gates": self.ir.pre_gate,
            "post_gates": self.ir.post_gate,
            "kept": self.schedule.kept,
            "sequences": self.schedule.sequences,
            "turns": self.schedule.main.turns,
            "partial_in": found.partial_in,
            "partial_out": found.partial_out,
            "ragged_batch": found.ragged_batch,
            "wide_offsets": found.wide_offsets,
        }


def _equal(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number
