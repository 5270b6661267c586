"""The emitter of the gradients of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from monarch_compile.codegen.attention import gradient_schedule, gradient_search, gradients, launch, specialization
from monarch_compile.codegen.attention.backward import backward_program
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.gradient_ir import GradientsOf
from monarch_compile.codegen.attention.gradient_schedule import GradientSchedule
from monarch_compile.codegen.attention.kernels import canonical
from monarch_compile.codegen.attention.specialization import Specialization
from monarch_compile.codegen.emitters import Emitter, Tuning
from monarch_compile.codegen.program import Program
from monarch_compile.codegen.tiling import Capability, Tiling


def _choose_schedule(ir: GradientsOf, capability: Capability | None) -> GradientSchedule:
    return gradient_schedule.choose_gradient_schedule(ir.forward, capability)


def _program(ir: GradientsOf, schedule: GradientSchedule, special: Specialization) -> Program:
    return backward_program(ir.forward, schedule, special)


def _specialize(
    ir: GradientsOf, schedule: GradientSchedule, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]
) -> Specialization:
    return specialization.specialize(ir.forward, schedule, tensors, sizes)


def _shared_bytes(name: str, tiling: Tiling, ir: GradientsOf) -> int:
    return gradient_schedule.shared_bytes(tiling, name, ir.forward)


GRADIENTS = Emitter(
    family=GradientsOf.family,
    templates=EMITTER.templates,
    check=lambda ir: EMITTER.check(ir.forward),
    bucketed=lambda ir: GradientsOf(launch.bucketed(ir.forward)),
    canonical=lambda ir: GradientsOf(canonical(ir.forward)),
    describe=lambda ir: f"gradients of {launch.describe(ir.forward)}",
    choose_schedule=_choose_schedule,
    check_schedule=lambda schedule, ir: gradient_schedule.check_gradient_schedule(schedule, ir.forward),
    is_made_for=lambda schedule, ir: gradient_schedule.is_made_for(schedule, ir.forward),
    read_schedule=gradient_schedule.read_gradient_schedule,
    program=_program,
    expected=lambda ir, schedule: specialization.expected(ir.forward, schedule),
    specialize=_specialize,
    run=gradients.run,
    sizes=lambda ir, hints: launch.sizes_of_ir(ir.forward, hints),
    tuning=Tuning(
        applies=gradient_search.applies,
        sized=gradient_search.sized,
        stages=gradient_search.stages,
        variants=gradient_search.variants,
        shared_bytes=_shared_bytes,
        inputs=gradient_search.inputs,
        small=gradient_search.small,
        expected=gradient_search.expected,
        bound=gradient_search.bound,
    ),
    meaning=EMITTER.meaning,
)
