"""What the kernels of one IR take of a GPU: compiled without one at hand, and counted."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from monarch_compile.codegen.emitters import IR, emitter
from monarch_compile.codegen.program import Kernel, Program
from monarch_compile.codegen.tiling import Capability
from monarch_compile.codegen.tuning.compiler_report import CompileReport, compile_report


@dataclass(frozen=True)
class Resources:
    """Of one kernel.

    capability: what it is compiled for, such as "sm_90". registers: a thread's. spilled_bytes: a thread's local memory:
    registers that are spilled, and its stack. shared_bytes: a program's. moved_bytes: what a launch reads and writes of
    its tensors, each counted once; None where the sizes are not known.
    """

    name: str
    capability: str
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    moved_bytes: int | None

    def __str__(self) -> str:
        moved = "" if self.moved_bytes is None else f", {self.moved_bytes / 2**20:.1f} MiB moved"
        return (
            f"{self.name}: {self.registers} registers x {self.threads} threads, {self.spilled_bytes} B spilled, "
            f"{self.shared_bytes / 1024:.1f} KiB shared{moved}"
        )


def resources_of(program: Program, ir: IR, hints: Mapping[str, int], capability: Capability) -> tuple[Resources, ...]:
    """Of each kernel of a program of `ir`, once each; `hints` has a value for each symbolic size of `ir`.

    Raises:
        CodegenError: a kernel does not compile, triton is missing or is set to interpret.
    """
    sizes = _sizes(ir, hints)
    return tuple(_resources(kernel, sizes, capability) for kernel in dict.fromkeys(program.kernels))


def _resources(kernel: Kernel, sizes: Mapping[str, int] | None, capability: Capability) -> Resources:
    found = _compiled(kernel, capability)
    moved = None if sizes is None else Program((kernel,), ()).bytes_moved(sizes)
    place, threads = "sm_{}{}".format(*capability), 32 * found.num_warps
    return Resources(kernel.name, place, threads, found.registers, found.local_bytes, found.shared_bytes, moved)


def _sizes(ir: IR, hints: Mapping[str, int]) -> Mapping[str, int] | None:
    count = emitter(ir.family).sizes
    try:
        return None if count is None else count(ir, hints)
    except KeyError:
        return None


@functools.lru_cache(maxsize=256)
def _compiled(kernel: Kernel, capability: Capability) -> CompileReport:
    return compile_report(kernel, capability)
