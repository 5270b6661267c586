"""The emitter of long convolutions and of the gradients of their filters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from monarch_compile.codegen.convolution import filter_gradient, kernels, launch, programs, schedule, search
from monarch_compile.codegen.convolution.kernels import Specialization
from monarch_compile.codegen.convolution.schedule import Schedule
from monarch_compile.codegen.emitters import Emitter, Tuning
from monarch_compile.codegen.program import Program
from monarch_compile.codegen.tiling import Capability
from monarch_compile.convolution import ir as ir_module
from monarch_compile.convolution import work
from monarch_compile.convolution.ir import FilterGradient, LongConvolution

IR = LongConvolution | FilterGradient


def _check(ir: IR) -> None:
    if isinstance(ir, FilterGradient):
        filter_gradient.check(ir)
    else:
        schedule.check_supported(ir)


def _canonical(ir: IR) -> IR:
    return filter_gradient.canonical(ir) if isinstance(ir, FilterGradient) else launch.bucketed(ir)


def _choose_schedule(ir: IR, capability: Capability | None = None) -> Schedule:
    if isinstance(ir, FilterGradient):
        return filter_gradient.choose_schedule(ir, capability)
    return schedule.choose_schedule(ir, capability)


def _program(ir: IR, made: Schedule, specialization: Specialization) -> Program:
    if isinstance(ir, FilterGradient):
        return filter_gradient.program(ir, made, specialization)
    return programs.program(ir, made, specialization)


def _specialize(ir: IR, made: Schedule, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> Specialization:
    return kernels.specialize(_convolution(ir), made, tensors, sizes)


def _convolution(ir: IR) -> LongConvolution:
    return ir.of if isinstance(ir, FilterGradient) else ir


EMITTER = Emitter(
    family="convolution",
    templates=Path(__file__).parent / "templates",
    check=_check,
    bucketed=_canonical,
    canonical=_canonical,
    describe=lambda ir: schedule.describe(_convolution(ir)),
    choose_schedule=_choose_schedule,
    check_schedule=lambda made, ir: schedule.check_schedule(made, _convolution(ir)),
    is_made_for=schedule.is_made_for,
    read_schedule=schedule.read_schedule,
    program=_program,
    expected=lambda ir, made: kernels.expected(_convolution(ir), made),
    specialize=_specialize,
    run=launch.run,
    tuning=Tuning(
        applies=search.applies,
        sized=search.sized,
        stages=search.stages,
        variants=search.variants,
        shared_bytes=lambda name, tiling, ir: schedule.shared_bytes(tiling, ir),
        inputs=search.inputs,
        small=search.small,
        expected=search.expected,
        bound=search.bound,
    ),
    meaning=(ir_module, work),
)
