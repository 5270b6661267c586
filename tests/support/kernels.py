"""The kernels of attention, as tests ask for them."""

from __future__ import annotations

from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.schedule import Schedule
from monarch_compile.codegen.attention.specialization import UNKNOWN, Specialization
from monarch_compile.codegen.render import sources
from monarch_compile.codegen.source import KernelSource


def emit(
    ir: MonarchAttention, schedule: Schedule, specialization: Specialization = UNKNOWN
) -> tuple[KernelSource, ...]:
    """The text of the kernels of `ir`, each once."""
    return sources(EMITTER.program_of(ir, schedule, specialization))
