"""A kernel of a program to Triton source: one readable file, a function of nothing else."""

from __future__ import annotations

import functools
import re

import jinja2

from monarch_compile.codegen.emitters import emitter
from monarch_compile.codegen.program import Kernel, Program
from monarch_compile.codegen.source import KernelSource


def sources(program: Program) -> tuple[KernelSource, ...]:
    """The text of each kernel once, in the order in which they are first launched."""
    return tuple(dict.fromkeys(render(kernel) for kernel in program.kernels))


@functools.lru_cache(maxsize=256)
def render(kernel: Kernel) -> KernelSource:
    """The text of one kernel; of the constants and sizes that are there, it has those that it uses."""
    fixed = {
        "name": kernel.name,
        "header": kernel.header,
        "num_stages": kernel.tiling.num_stages,
        **dict(kernel.variables),
    }
    template = _environment(kernel.family).get_template(kernel.template)
    body = template.render(**fixed, constants={}, parameter_groups=()).partition("@triton.jit")[2]
    used = set(re.findall(r"\w+", body))
    constants = {name: value for name, value in kernel.constants if name in used}
    tensors = tuple(buffer.name for buffer in kernel.buffers)
    strides = [tuple(name for name, _ in buffer.strides) for buffer in kernel.reads if buffer.strides]
    groups = tuple(group for group in (tensors, *strides, tuple(n for n in kernel.sizes if n in used)) if group)
    text = template.render(**fixed, constants=constants, parameter_groups=groups)
    return KernelSource(kernel.name, text, tuple(name for group in groups for name in group))


@functools.cache
def _environment(family: str) -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(emitter(family).templates)
    return jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
