"""The programs of long convolutions in three factors: the outer one through memory, the other two on chip."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from monarch_compile.codegen.convolution.kernels import (
    MARKS_AT_ONCE,
    SIZES,
    STORED,
    Specialization,
    filter_buffer,
    result_buffers,
    sequence_buffers,
)
from monarch_compile.codegen.convolution.schedule import Schedule, points, precise
from monarch_compile.codegen.program import Buffer, Kernel, Program, Size, Tiles, header_of
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.convolution.ir import LongConvolution

NOISE = 0.17
"""As `kernels.NOISE`: with an outer factor, rounding errors have at most 1.9e-7 of the power of the transform; with
.4 of the power of rounding to bfloat16, the error is 1.19 times that of rounding alone."""
NOT_FINITE = 1 << 16
"""The exponent of what is infinite or NaN."""
BLOCK = 32
"""Rows and terms of the outer factor that are multiplied at a time where products are of float32 numbers."""
TABLES, SUMS = Tiling(16, 16, 4, 1), Tiling(16, 16, 1, 1)
"""Of kernels whose tiles follow from the transform's."""


def program(ir: LongConvolution, schedule: Schedule, specialization: Specialization) -> Program:
    """Kernels of a bucketed IR. With products of float16 numbers, some sequences are transformed twice."""
    outputs = tuple(buffer.name for buffer in result_buffers(ir))
    if schedule.precision == "single":
        return Program(_Maker(ir, schedule, specialization, "").kernels(), outputs)
    once = _Maker(ir, schedule, specialization, "marks")
    twice = _Maker(ir, precise(points(ir)), specialization, "marked")
    return Program((*once.kernels(), *twice.kernels()), outputs)


class _Buffers:
    """What the kernels of one pass leave to one another; the templates say what it holds. inner: points on chip."""

    def __init__(self, schedule: Schedule, inner: int) -> None:
        main, outer = schedule.main, schedule.outer
        assert outer is not None
        stored = STORED[schedule.precision]
        rows, columns, tiles = outer.rows, outer.step, inner // outer.step
        self.outer = Buffer("outer", stored, (2, rows, rows))
        self.base = Buffer("base", torch.float32, (2, rows, columns))
        self.step = Buffer("step", torch.float32, (2, tiles, rows))
        self.first = Buffer("first", stored, (2, main.rows, main.rows))
        self.twiddle = Buffer("twiddle", stored, (2, main.rows, main.step))
        self.second = Buffer("second", stored, (2, main.step, main.step))
        self.lag_exponent = Buffer("lag_exponent", torch.int32, ("channels", tiles))
        self.spectrum = Buffer("spectrum", stored, ("channels", rows, 2, inner))
        self.spectrum_exponent = Buffer("spectrum_exponent", torch.int32, ("channels", rows))
        self.spectrum_power = Buffer("spectrum_power", torch.float32, ("channels", rows))
        self.values = Buffer("values", stored, ("batch", "channels", rows, 2, inner))
        self.in_exponent = Buffer("in_exponent", torch.int32, ("batch", "channels", tiles))
        self.in_power = Buffer("in_power", torch.float32, ("batch", "channels", tiles))
        self.out_exponent = Buffer("out_exponent", torch.int32, ("batch", "channels", rows))
        self.out_power = Buffer("out_power", torch.float32, ("batch", "channels", rows))
        self.result_power = Buffer("result_power", torch.float32, ("batch", "channels", tiles))
        self.noisy = Buffer("noisy", torch.int8, ("batch", "channels"))


@dataclass(frozen=True)
class _Maker:
    """Kernels of one pass over sequences. role: "marks" what is to be computed again, or computes what is "marked", or
    all there is: ""."""

    ir: LongConvolution
    schedule: Schedule
    specialization: Specialization
    role: str

    @property
    def outer(self) -> Tiling:
        """The outer factor's tiling."""
        assert self.schedule.outer is not None
        return self.schedule.outer

    @property
    def inner(self) -> int:
        """Points of the other two factors."""
        return points(self.ir) // self.outer.rows

    @property
    def tiles(self) -> int:
        """Tiles of the outer factor."""
        return self.inner // self.outer.step

    def kernels(self) -> tuple[Kernel, ...]:
        """In the order in which they are launched."""
        ir, main, outer, b = self.ir, self.schedule.main, self.outer, _Buffers(self.schedule, self.inner)
        marks = self.role == "marks"
        marked = (b.noisy,) if self.role == "marked" else ()
        by_outer, by_inner = (b.outer, b.base, b.step), (b.first, b.twiddle, b.second)
        sequences = sequence_buffers(ir)
        inputs = tuple(x for x in sequences if x.name in ("u", "pre_gate"))
        ending = tuple(x for x in sequences if x.name not in ("u", "pre_gate"))
        ending = (*(inputs if ir.skip else ()), *ending)
        results = result_buffers(ir)
        made = [
            self._kernel("tables", (), (*by_outer, *by_inner), (self._most_rows(),), TABLES, template="outer_tables"),
            self._kernel(
                "filter",
                (filter_buffer(ir), *by_outer, *marked),
                (b.spectrum, b.lag_exponent),
                ("channels", max(1, self.tiles // outer.turns)),
                outer,
                template="outer_forward",
            ),
            self._kernel(
                "spectrum",
                (*by_inner, b.lag_exponent, *marked),
                (b.spectrum_exponent, *((b.spectrum_power,) if marks else ())),
                ("channels", max(1, outer.rows // main.turns)),
                main,
                updates=(b.spectrum,),
                template="inner_spectrum",
            ),
            self._kernel(
                "forward",
                (*inputs, *by_outer, *marked),
                (b.values, b.in_exponent, *((b.in_power,) if marks else ())),
                ("channels", *_groups(self.tiles, outer.turns)),
                outer,
                template="outer_forward",
            ),
            self._kernel(
                "product",
                (*by_inner, b.spectrum, b.spectrum_exponent, b.in_exponent, *marked),
                (b.out_exponent, *((b.out_power,) if marks else ())),
                ("channels", *_groups(outer.rows, main.turns)),
                main,
                updates=(b.values,),
                template="inner_product",
            ),
            self._kernel(
                "inverse",
                (*ending, *by_outer, b.values, b.out_exponent, *marked),
                () if marked else (*results, *((b.result_power,) if marks else ())),
                ("channels", *_groups(self.tiles, outer.turns)),
                outer,
                updates=results if marked else (),
                template="outer_inverse",
            ),
        ]
        if marks:
            of_sequences = (b.in_exponent, b.in_power, b.out_exponent, b.out_power, b.result_power)
            read = (*of_sequences, b.spectrum_exponent, b.spectrum_power)
            made.append(self._kernel("noise", read, (b.noisy,), ("channels", "batch"), SUMS, template="outer_marks"))
        return tuple(made)

    def _most_rows(self) -> int:
        return max(self.outer.rows, self.tiles, self.schedule.main.rows, self.schedule.main.step)

    def _kernel(
        self,
        part: str,
        reads: tuple[Buffer, ...],
        writes: tuple[Buffer, ...],
        grid: tuple[Size | Tiles, ...],
        tiling: Tiling,
        *,
        template: str,
        updates: tuple[Buffer, ...] = (),
    ) -> Kernel:
        """One kernel, named by its part of the work and the role."""
        name = f"long_convolution_{part}" + f"_{self.role}" * bool(self.role)
        return Kernel(
            family="convolution",
            name=name,
            template=f"{template}.py.jinja",
            reads=reads,
            writes=writes,
            updates=updates,
            sizes=SIZES,
            constants=tuple((self._constants() | {"TURNS": tiling.turns}).items()),
            variables=tuple((self._variables() | {"turns": tiling.turns, "of_filter": part == "filter"}).items()),
            grid=grid,
            tiling=tiling,
            header=header_of(name, self.ir, self.schedule, self.specialization),
        )

    def _constants(self) -> dict[str, Any]:
        main = self.schedule.main
        return {
            "MARKS": MARKS_AT_ONCE,
            "NOISE": NOISE,
            "NOT_FINITE": NOT_FINITE,
            "BLOCK": min(BLOCK, self.outer.rows),
            "OUTER": self.outer.rows,
            "INNER": self.inner,
            "ROWS": main.rows,
            "COLUMNS": main.step,
            "TILE": self.outer.step,
            "TILES": self.tiles,
            "POINTS": points(self.ir),
            "TAU": math.tau,
        }

    def _variables(self) -> dict[str, Any]:
        found = self.specialization
        return {
            "single": self.schedule.precision == "single",
            "marks": self.role == "marks",
            "marked": self.role == "marked",
            "wraps": self.ir.wraps,
            "skips": self.ir.skip,
            "pre_gates": self.ir.pre_gate,
            "post_gates": self.ir.post_gate,
            "second_gates": self.ir.second_gate,
            "partial_in": found.partial_in,
            "partial_out": found.partial_out,
            "wide_offsets": found.wide_offsets,
        }


def _groups(items: int, turns: int) -> tuple[Size | Tiles, ...]:
    """Programs of a channel that take `items` of each sequence, `turns` each; both are powers of two."""
    return ("batch", items // turns) if turns <= items else (Tiles("batch", turns // items),)
