"""The emitter of attention."""

from __future__ import annotations

from pathlib import Path

from monarch_compile.attention import blocking, form, groups, ir
from monarch_compile.codegen.attention import kernels, launch, schedule, search, specialization
from monarch_compile.codegen.attention.gradient_ir import gradients_of
from monarch_compile.codegen.emitters import Emitter, Tuning

EMITTER = Emitter(
    family="attention",
    templates=Path(__file__).parent / "templates",
    check=schedule.check_supported,
    bucketed=launch.bucketed,
    canonical=kernels.canonical,
    describe=launch.describe,
    choose_schedule=schedule.choose_schedule,
    check_schedule=schedule.check_schedule,
    is_made_for=schedule.is_made_for,
    read_schedule=schedule.read_schedule,
    program=kernels.program,
    expected=specialization.expected,
    specialize=specialization.specialize,
    run=launch.run,
    gradients=gradients_of,
    sizes=launch.sizes_of_ir,
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
    meaning=(blocking, form, groups, ir),
)
