"""What a kernel becomes on a given GPU, without one at hand: registers, shared memory, spills, tensor cores."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from monarch_compile.codegen.program import Buffer, Kernel
from monarch_compile.codegen.render import render
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.codegen.tiling import Capability
from monarch_compile.errors import CodegenError

POINTERS = {
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNMENT = 16
ALIGNED = [["tt.divisibility", ALIGNMENT]]


@dataclass(frozen=True)
class CompileReport:
    """Resources of one compiled kernel.

    registers: a thread's; shared_bytes: a program's; local_bytes: a thread's spills and stack.
    has_wgmma, has_mma: whether the PTX uses Hopper's or the older tensor-core instructions.
    """

    name: str
    num_warps: int
    registers: int
    shared_bytes: int
    local_bytes: int
    has_wgmma: bool
    has_mma: bool
    ptx: str

    def __str__(self) -> str:
        cores = "wgmma" if self.has_wgmma else "mma" if self.has_mma else "no tensor cores"
        return (
            f"{self.name}: {self.registers} registers x {32 * self.num_warps} threads, "
            f"{self.shared_bytes} B shared, {self.local_bytes} B local, {cores}"
        )


class Argument(NamedTuple):
    """Type of a kernel's argument, and whether it is a multiple of 16."""

    type: str
    is_aligned: bool = False


def _arguments(buffer: Buffer) -> Iterator[tuple[str, Argument]]:
    """Of a tensor and of its strides: the last dim's is 1; the others are multiples of a row of known length."""
    yield buffer.name, Argument(POINTERS[buffer.dtype], is_aligned=True)
    row = buffer.dims[-1]
    for name, dim in buffer.strides:
        last = dim == len(buffer.dims) - 1
        is_aligned = not isinstance(row, int) or row % ALIGNMENT == 0
        yield name, Argument("constexpr") if last else Argument("i32", is_aligned)


def compile_kernel(kernel: Kernel, capability: Capability = (9, 0)) -> Any:
    """Triton's result of compiling one kernel of a program for `capability`, as for aligned, contiguous tensors.

    Raises:
        CodegenError: triton is missing or is set to interpret, or does not compile the kernel.
    """
    if is_interpreted():
        raise CodegenError("nothing compiles while TRITON_INTERPRET=1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, tiling = render(kernel), kernel.tiling
    known = {name: argument for buffer in kernel.buffers for name, argument in _arguments(buffer)}
    arguments = {name: known.get(name, Argument("i32")) for name in source.parameters}
    places = {name: (place,) for place, name in enumerate(source.parameters)}
    signature = {name: argument.type for name, argument in arguments.items()}
    constants = {places[name]: 1 for name, kind in signature.items() if kind == "constexpr"}
    attributes = {places[name]: ALIGNED for name, argument in arguments.items() if argument.is_aligned}
    major, minor = capability
    try:
        return triton.compile(
            ASTSource(source.load(), signature, constants, attributes),
            target=GPUTarget("cuda", 10 * major + minor, 32),
            options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        )
    except Exception as error:
        raise CodegenError(f"{kernel.name} does not compile for sm_{major}{minor}: {error}\n{source.text}") from error


def compile_report(kernel: Kernel, capability: Capability = (9, 0)) -> CompileReport:
    """The resources of what `compile_kernel` gives.

    Raises:
        CodegenError: as `compile_kernel`.
    """
    compiled = compile_kernel(kernel, capability)
    ptx = compiled.asm["ptx"]
    return CompileReport(
        name=kernel.name,
        num_warps=kernel.tiling.num_warps,
        registers=_usage(compiled.asm["cubin"], "REG"),
        shared_bytes=compiled.metadata.shared,
        local_bytes=_usage(compiled.asm["cubin"], "STACK") + _usage(compiled.asm["cubin"], "LOCAL"),
        has_wgmma="wgmma.mma_async" in ptx,
        has_mma="mma.sync" in ptx,
        ptx=ptx,
    )


def _usage(cubin: bytes, field: str) -> int:
    """One field of cuobjdump's resource usage."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(rf"\b{field}:(\d+)", text)
    if found is None:
        raise CodegenError(f"cuobjdump reports no {field}:\n{text}")
    return int(found[1])
