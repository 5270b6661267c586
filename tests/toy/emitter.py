"""The kernel of the toy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from monarch_compile.codegen.emitters import Emitter, Tuning
from monarch_compile.codegen.launcher import Launcher
from monarch_compile.codegen.program import Buffer, Kernel, Program, Tiles
from monarch_compile.codegen.tiling import Tiling
from monarch_compile.errors import CodegenError
from tests.toy.family import Gate, reference


@dataclass(frozen=True)
class GateSchedule:
    """gate: its step is the number of columns of a program."""

    family: ClassVar[str] = "toy"

    gate: Tiling

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "gate", self.gate


def check(ir: Gate) -> None:
    """Raise CodegenError where no kernel exists."""
    if ir.dtype is not torch.float32:
        raise CodegenError(f"the toy has kernels for float32; found {ir.dtype}")


def program(ir: Gate, schedule: GateSchedule, partial_tile: bool) -> Program:
    """One kernel."""
    dims = ("rows", "columns")
    x, y = (Buffer(name, ir.dtype, dims, ((f"{name}_row", 0), (f"{name}_column", 1))) for name in "xy")
    kernel = Kernel(
        family="toy",
        name="toy_gate",
        template="gate.py.jinja",
        reads=(x, y),
        writes=(Buffer("z", ir.dtype, dims),),
        updates=(),
        sizes=("rows", "columns"),
        constants=(("TILE", schedule.gate.step),),
        variables=(("partial_tile", partial_tile),),
        grid=("rows", Tiles("columns", schedule.gate.step)),
        tiling=schedule.gate,
        header=f"# {ir}",
    )
    return Program((kernel,), ("z",))


def run(launcher: Launcher, x: Tensor, y: Tensor) -> Tensor:
    """Launch on two tensors."""
    return launcher({"x": x, "y": y}, {"rows": x.shape[0], "columns": x.shape[1]})[0]


def inputs(ir: Gate, device: torch.device) -> tuple[Tensor | None, ...]:
    """Standard normal x and y."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (int(ir.rows), int(ir.columns))
    return tuple(torch.randn(shape, device=device, dtype=ir.dtype, generator=generator) for _ in "xy")


def specialize(ir: Gate, schedule: GateSchedule, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> bool:
    """Whether the last tile of a row is not whole."""
    return bool(sizes["columns"] % schedule.gate.step)


EMITTER = Emitter(
    family="toy",
    templates=Path(__file__).parent / "templates",
    check=check,
    bucketed=lambda ir: replace(ir, rows="R"),
    canonical=lambda ir: replace(ir, rows="R", columns="C"),
    describe=lambda ir: f"gate of {ir.columns} columns",
    choose_schedule=lambda ir, capability: GateSchedule(Tiling(16, 32, 1, 1)),
    check_schedule=lambda schedule, ir: None,
    is_made_for=lambda schedule, ir: True,
    read_schedule=lambda fields: GateSchedule(Tiling(**fields["gate"])),
    program=program,
    expected=lambda ir, schedule: True,
    specialize=specialize,
    run=run,
    tuning=Tuning(
        applies=lambda ir: True,
        sized=lambda ir: ir,
        stages=lambda ir: ("gate",),
        variants=lambda start, stage, ir: (GateSchedule(replace(start.gate, step=step)) for step in (16, 64, 128)),
        shared_bytes=lambda name, tiling, ir: 0,
        inputs=inputs,
        small=lambda ir: replace(ir, rows=2),
        expected=lambda ir, given: reference(*(x.double() for x in given if x is not None)),
        bound=lambda ir: 1e-6,
    ),
)
