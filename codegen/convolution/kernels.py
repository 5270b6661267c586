"""The programs of a long convolution: its kernels and the buffers between them, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.convolution.schedule import Schedule, points
from monarch_compile.codegen.program import Buffer, Kernel, Program, Tiles, header_of
from monarch_compile.codegen.tiling import MIN_TILE, Tiling
from monarch_compile.convolution.ir import LongConvolution

STORED = {"half": torch.float16, "single": torch.float32}
"""What tables and what is between kernels are stored in, by `Schedule.precision`."""
NOISE = 0.1
"""Products of float16 numbers leave rounding errors of a power of 1.1e-7 of that of the transform, and as much of what
the filter makes of an input with a flat spectrum; a result in bfloat16, itself rounded with a power of 2.8e-6, may have
.4 of that: 1.18 times the error of rounding alone. What has more is marked."""
PROGRAMS_AGAIN, MARKS_AT_ONCE = 264, 64
"""How many programs of the second pass there are, two for each multiprocessor of an H100, and how many sequences of a
channel each looks at, at a time."""
SPECTRUM_UNIT = 2.0**-4
"""The largest number of a spectrum, so that nothing leaves the range of float16: of numbers below 2, the transform has
a norm of at most 2 POINTS, and a sum of 128 of its numbers is at most 2**3.5 times that, for 2**13 points 2**17.5."""
HEADROOM = 6
"""The power of two of numbers that are multiplied as pairs of float16 numbers: 128 of them, below 2**8, add up to
2**15, which float16 holds, and what is below the largest by 2**-32 is lost."""
MAX_OFFSET = 2**31 - 1
SMALL = Tiling(16, 16, 4, 1)
"""Of the kernel that prepares tables: its tiles follow from the transform's."""

SIZES = ("batch", "channels", "seq_len", "out_len", "filter_len", "transform_len", "lag", "scale")
"""What a kernel may be told at run time; it takes what it reads."""
STRIDES = {"u": "u", "pre_gate": "pre", "post_gate": "post", "second_gate": "second"}


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
    make = Maker(ir, schedule, specialization)
    outputs = tuple(buffer.name for buffer in result_buffers(ir))
    if schedule.precision == "single":
        matrices = tables(schedule, "single")
        return Program((make.tables(matrices), *_transforms(make, matrices)), outputs)
    matrices, again = tables(schedule, "half"), tables(for_one_sequence(schedule), "single", "_single")
    made = (make.tables((*matrices, *again), "marks"), *_transforms(make, matrices, "marks"), _again(make, again))
    return Program(made, outputs)


def for_one_sequence(schedule: Schedule) -> Schedule:
    """`schedule` with tiles of one sequence each."""
    main = replace(schedule.main, step=schedule.main.step // schedule.sequences)
    return replace(schedule, main=main, sequences=1)


def _transforms(make: Maker, matrices: tuple[Buffer, ...], role: str = "") -> tuple[Kernel, ...]:
    """Spectrum and transform. role: "marks" where what its products are too coarse for is marked."""
    ir, main = make.ir, make.schedule.main
    spectrum = Buffer("spectrum", STORED[make.schedule.precision], ("channels", 2, points(ir)))
    gain = Buffer("gain", torch.float32, (2, "channels"))
    any_noisy, noisy = _marks() if role else ((), ())
    small = Tiling(main.rows, max(MIN_TILE, points(ir) // main.rows), main.num_warps, 1)
    kernel = partial(make.kernel, precision=make.schedule.precision, role=role)
    return (
        kernel("spectrum", (filter_buffer(ir), *matrices), (spectrum, gain, *any_noisy), ("channels",), small),
        kernel(
            "transform",
            (*sequence_buffers(ir), *matrices, spectrum, gain),
            (*result_buffers(ir), *noisy),
            ("channels", Tiles("batch", make.schedule.sequences * main.turns)),
            main,
            updates=any_noisy,
        ),
    )


def _again(make: Maker, matrices: tuple[Buffer, ...]) -> Kernel:
    """What computes marked sequences a second time: enough warps for operands of twice the size."""
    ir, main = make.ir, for_one_sequence(make.schedule).main
    (any_noisy,), (noisy,) = _marks()
    return make.kernel(
        "again",
        (filter_buffer(ir), *sequence_buffers(ir), *matrices, any_noisy, noisy),
        (),
        (PROGRAMS_AGAIN,),
        replace(main, num_warps=max(4, main.num_warps), turns=1),
        precision="single",
        kept="nothing",
        updates=result_buffers(ir),
    )


def _marks() -> tuple[tuple[Buffer], tuple[Buffer]]:
    """Whether any sequence is marked, and which are."""
    return (Buffer("any_noisy", torch.int32, (1,)),), (Buffer("noisy", torch.int8, ("batch", "channels")),)


def tables(schedule: Schedule, precision: str, suffix: str = "") -> tuple[Buffer, ...]:
    """The matrices of the transform, as the kernel `tables` makes them; `suffix` ends their names."""
    rows, width, dtype = schedule.main.rows, schedule.main.step, STORED[precision]
    return (
        Buffer("first" + suffix, dtype, (2, rows, rows)),
        Buffer("twiddle" + suffix, dtype, (2, rows, width)),
        Buffer("second" + suffix, dtype, (2, width, width)),
    )


def filter_buffer(ir: LongConvolution) -> Buffer:
    strides = (("filter_channel", 0), ("filter_time", 1))
    return Buffer("filter", ir.filter_dtype, ("channels", "filter_len"), strides)


def sequence_buffers(ir: LongConvolution) -> tuple[Buffer, ...]:
    """What is read for each output, as far as it is there."""
    lengths = {"u": "seq_len", "pre_gate": "seq_len", "post_gate": "out_len", "second_gate": "out_len"}
    here = ("u", *(name for name in ("pre_gate", "post_gate", "second_gate") if getattr(ir, name)))
    found = []
    for name in here:
        strides = tuple((f"{STRIDES[name]}_{dim}", place) for place, dim in enumerate(("batch", "channel", "time")))
        found.append(Buffer(name, ir.dtype, ("batch", "channels", lengths[name]), strides))
    if ir.skip:
        found.append(Buffer("skip", torch.float32, ("channels",), (("skip_channel", 0),)))
    return tuple(found)


def result_buffer(ir: LongConvolution, name: str = "y") -> Buffer:
    """A result."""
    return Buffer(name, ir.out_dtype, ("batch", "channels", "out_len"))


def result_buffers(ir: LongConvolution) -> tuple[Buffer, ...]:
    """The result; where there is a second gate, also the second one."""
    second = (result_buffer(ir, "y_second"),) if ir.second_gate else ()
    return (result_buffer(ir), *second)


@dataclass(frozen=True)
class Maker:
    """Kernels of one program, which share what texts are told."""

    ir: LongConvolution
    schedule: Schedule
    specialization: Specialization
    title: str = ""
    """What headers say is computed; the IR by default."""

    def tables(self, matrices: tuple[Buffer, ...], role: str = "") -> Kernel:
        """The kernel that makes `matrices`: of the schedule's precision, and with role "marks" those of `again`."""
        main = self.schedule.main
        grid = (max(main.rows, main.step),)
        return self.kernel("tables", (), matrices, grid, SMALL, precision=self.schedule.precision, role=role)

    def kernel(
        self,
        template: str,
        reads: tuple[Buffer, ...],
        writes: tuple[Buffer, ...],
        grid: tuple[Any, ...],
        tiling: Tiling,
        *,
        precision: str,
        role: str = "",
        kept: str = "",
        updates: tuple[Buffer, ...] = (),
    ) -> Kernel:
        """One kernel, named by its template and role."""
        name = f"convolution_{template}" + f"_{role}" * bool(role)
        return Kernel(
            family="convolution",
            name=name,
            template=f"{template}.py.jinja",
            reads=reads,
            writes=writes,
            updates=updates,
            sizes=SIZES,
            constants=tuple(self._constants().items()),
            variables=tuple(
                {
                    **self._variables(),
                    "single": precision == "single",
                    "marks": role == "marks",
                    **({"kept": kept} if kept else {}),
                }.items()
            ),
            grid=grid,
            tiling=tiling,
            header=header_of(name, self.title or self.ir, self.schedule, self.specialization),
        )

    def _constants(self) -> dict[str, Any]:
        main, sequences = self.schedule.main, self.schedule.sequences
        count = points(self.ir)
        return {
            "HEADROOM": HEADROOM,
            "MARKS": MARKS_AT_ONCE,
            "PROGRAMS": PROGRAMS_AGAIN,
            "NOISE": NOISE,
            "ROWS": main.rows,
            "WIDTH": main.step,
            "COLUMNS": count // main.rows,
            "POINTS": count,
            "SEQUENCES": sequences,
            "TURNS": main.turns,
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
            "second_gates": self.ir.second_gate,
            "kept": self.schedule.kept,
            "ahead": self.schedule.ahead,
            "sequences": self.schedule.sequences,
            "turns": self.schedule.main.turns,
            "partial_in": found.partial_in,
            "partial_out": found.partial_out,
            "ragged_batch": found.ragged_batch,
            "wide_offsets": found.wide_offsets,
        }


def _equal(size: Any, number: int) -> bool:
    return isinstance(size, int) and size == number
