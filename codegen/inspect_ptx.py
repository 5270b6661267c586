"""What a kernel becomes on a given GPU, without one at hand: registers, shared memory, spills, tensor cores."""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from monarch_compile.codegen.emit import OUTER, SIZES, STRIDES, role_tiling, steps
from monarch_compile.codegen.facts import sees_strides
from monarch_compile.codegen.schedule import Schedule
from monarch_compile.codegen.source import KernelSource, is_interpreted
from monarch_compile.errors import CodegenError
from monarch_compile.ir import MaskKind, MonarchAttention

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}
FLOAT32_TENSORS = ("c", "near", "unlog")
TENSORS = ("q", "k", "v", "z", "a", "y", "qhat", "rows")
ALIGNED = [["tt.divisibility", 16]]


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


def compile_report(
    source: KernelSource, ir: MonarchAttention, schedule: Schedule, capability: tuple[int, int] = (9, 0)
) -> CompileReport:
    """Compile one kernel of `emit(ir, schedule)` for `capability`, as for aligned tensors that one projection gave.

    Raises:
        CodegenError: triton is missing or is set to interpret, or does not compile the kernel.
    """
    if is_interpreted():
        raise CodegenError("nothing compiles while TRITON_INTERPRET=1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: _type(name, ir) for name in source.parameters}
    places = {name: (place,) for place, name in enumerate(source.parameters)}
    constants = {places[name]: 1 for name, kind in signature.items() if kind == "constexpr"}
    strides = () if sees_strides(ir.head_dim, ir.value_dim) else itertools.chain(*(STRIDES[x] for x in OUTER))
    unseen = {*SIZES, *strides}
    aligned = [name for name, kind in signature.items() if kind != "constexpr" and name not in unseen]
    attributes = {places[name]: ALIGNED for name in aligned}
    role = next(role for role in steps(ir, schedule) if role.name == source.name)
    tiling = role_tiling(role, schedule)
    major, minor = capability
    try:
        compiled = triton.compile(
            ASTSource(source.load(), signature, constants, attributes),
            target=GPUTarget("cuda", 10 * major + minor, 32),
            options={"num_warps": tiling.num_warps, "num_stages": tiling.num_stages},
        )
    except Exception as error:
        raise CodegenError(f"{source.name} does not compile for sm_{major}{minor}: {error}\n{source.text}") from error
    ptx = compiled.asm["ptx"]
    return CompileReport(
        name=source.name,
        num_warps=tiling.num_warps,
        registers=_usage(compiled.asm["cubin"], "REG"),
        shared_bytes=compiled.metadata.shared,
        local_bytes=_usage(compiled.asm["cubin"], "STACK") + _usage(compiled.asm["cubin"], "LOCAL"),
        has_wgmma="wgmma.mma_async" in ptx,
        has_mma="mma.sync" in ptx,
        ptx=ptx,
    )


def _type(name: str, ir: MonarchAttention) -> str:
    if name.endswith("_dim"):
        return "constexpr"
    if name in FLOAT32_TENSORS:
        return "*fp32"
    if name == "key_mask":
        return "*fp32" if ir.mask is MaskKind.KEY_BIAS else "*i1"  # a bias is centred in float32
    return POINTERS[ir.dtype] if name in TENSORS else "i32"


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
