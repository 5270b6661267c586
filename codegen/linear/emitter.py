"""The emitter of block linears."""

from __future__ import annotations

from pathlib import Path

from monarch_compile.codegen.emitters import Emitter, Tuning
from monarch_compile.codegen.linear import kernels, launch, schedule, search
from monarch_compile.codegen.tiling import Capability
from monarch_compile.linear import costs, forms, ir


def _choose_schedule(ir: launch.IR, capability: Capability | None = None) -> schedule.Schedule:
    return schedule.choose_schedule(launch.formed(ir), capability)


EMITTER = Emitter(
    family="linear",
    templates=Path(__file__).parent / "templates",
    check=lambda ir: schedule.check_supported(launch.formed(ir)),
    bucketed=launch.bucketed,
    canonical=launch.canonical,
    describe=schedule.describe,
    choose_schedule=_choose_schedule,
    check_schedule=lambda made, ir: schedule.check_schedule(made, launch.formed(ir)),
    is_made_for=lambda made, ir: schedule.is_made_for(made, launch.formed(ir)),
    read_schedule=schedule.read_schedule,
    program=kernels.program,
    expected=kernels.expected,
    specialize=kernels.specialize,
    run=launch.run,
    gradients=launch.gradients_of,
    tuning=Tuning(
        applies=search.applies,
        sized=search.sized,
        stages=search.stages,
        variants=search.variants,
        shared_bytes=schedule.shared_bytes,
        inputs=search.inputs,
        small=search.small,
        expected=search.expected,
        bound=search.bound,
    ),
    meaning=(ir, forms, costs),
)
