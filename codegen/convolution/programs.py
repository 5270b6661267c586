"""The program of a long convolution, by the factors of its transform."""

from __future__ import annotations

from monarch_compile.codegen.convolution import kernels, three_factors
from monarch_compile.codegen.convolution.kernels import Specialization
from monarch_compile.codegen.convolution.schedule import Schedule
from monarch_compile.codegen.program import Program
from monarch_compile.convolution.ir import LongConvolution


def program(ir: LongConvolution, schedule: Schedule, specialization: Specialization) -> Program:
    """Kernels of a bucketed IR."""
    make = kernels.program if schedule.outer is None else three_factors.program
    return make(ir, schedule, specialization)
