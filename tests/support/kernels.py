"""The kernels of attention, as tests ask for them."""

from __future__ import annotations

import ast

from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.gradient_emitter import GRADIENTS
from monarch_compile.codegen.attention.gradient_ir import GradientsOf
from monarch_compile.codegen.attention.gradient_schedule import GradientSchedule
from monarch_compile.codegen.attention.schedule import Schedule
from monarch_compile.codegen.attention.specialization import UNKNOWN, Specialization
from monarch_compile.codegen.render import sources
from monarch_compile.codegen.source import KernelSource

OF_GRIDS = ("EXTENT", "counts_", "NEIGHBOURS")
"""Lines that say where a token of a grid is may be longer than others."""


def emit(
    ir: MonarchAttention, schedule: Schedule, specialization: Specialization = UNKNOWN
) -> tuple[KernelSource, ...]:
    """The text of the kernels of `ir`, each once."""
    return sources(EMITTER.program_of(ir, schedule, specialization))


def emit_backward(
    ir: MonarchAttention, schedule: GradientSchedule, specialization: Specialization = UNKNOWN
) -> tuple[KernelSource, ...]:
    """The text of the kernels of the gradients of `ir`, each once."""
    return sources(GRADIENTS.program_of(GradientsOf(ir), schedule, specialization))


def check_text(source: KernelSource) -> None:
    """A kernel's text is one function, which uses all that it is given, in lines that can be read."""
    tree = ast.parse(source.text)
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert function.name == source.name
    assert tuple(argument.arg for argument in function.args.args) == source.parameters
    _check_names(function)
    lines = [line for line in source.text.splitlines() if not line.startswith(("# ir:", "# schedule:"))]
    assert all(len(line) <= 120 or any(name in line for name in OF_GRIDS) for line in lines)
    assert all(line == line.rstrip() for line in source.text.splitlines())
    assert "\n\n\n" not in source.text.partition("@triton.jit")[2]


def _check_names(function: ast.FunctionDef) -> None:
    """A kernel reads only its parameters, what it assigned and its imports, and it reads all of those it could."""
    parameters = {argument.arg for argument in function.args.args}
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    stored = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    read = {node.id for node in nodes if isinstance(node.ctx, ast.Load)}
    assert read <= parameters | stored | {"tl", "triton", "float"}
    assert parameters <= read
    assert stored <= read, f"assigned and never read: {stored - read}"
