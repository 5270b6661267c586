"""The emitter of block linears."""

from __future__ import annotations

from pathlib import Path

from monarch_compile.codegen.emitters import Emitter, Tuning
from monarch_compile.codegen.linear import kernels, launch, schedule, search
from monarch_compile.linear import ir

EMITTER = Emitter(
    family="linear",
    templates=Path(__file__).parent / "templates",
    check=schedule.check_supported,
    bucketed=launch.bucketed,
    canonical=launch.canonical,
    describe=schedule.describe,
    choose_schedule=schedule.choose_schedule,
    check_schedule=schedule.check_schedule,
    is_made_for=schedule.is_made_for,
    read_schedule=schedule.read_schedule,
    program=kernels.program,
    expected=kernels.expected,
    specialize=kernels.specialize,
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
    meaning=(ir,),
)
