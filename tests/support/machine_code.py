"""What compiled kernels do with the stack pointer, and kernels of all families drawn at random to look at.

ptxas 12.8, which Triton 3.6 brings, may compute the address of a tile in shared memory from R1, the stack pointer, in
kernels that have no stack: no instruction has set it to anything that the kernel knows. Run as a module, it reads
`{"seed": 0, "draw": {"attention": 8}, "known": true}` as JSON and prints a report of each kernel; with `known`, two
last ones of a kernel that ptxas 12.8 compiles wrongly: as it is emitted, and with tiles as they were before the mend.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen import tiling
from monarch_compile.codegen.attention import backward, gradient_schedule, schedule
from monarch_compile.codegen.attention import kernels as forward
from monarch_compile.codegen.attention.emitter import EMITTER as ATTENTION
from monarch_compile.codegen.attention.gradient_emitter import GRADIENTS
from monarch_compile.codegen.attention.gradient_ir import GradientsOf, gradients_of
from monarch_compile.codegen.convolution.emitter import EMITTER as CONVOLUTION
from monarch_compile.codegen.convolution.kernels import Specialization
from monarch_compile.codegen.emitters import IR, Emitter
from monarch_compile.codegen.linear.emitter import EMITTER as LINEAR
from monarch_compile.codegen.program import Kernel
from monarch_compile.codegen.tuning.compiler_report import compile_kernel
from monarch_compile.convolution.ir import FilterGradient, LongConvolution
from monarch_compile.linear import forms
from monarch_compile.linear.ir import BLAST, MONARCH, BlockLinear, FormedLinear, LinearGradients

HOPPER = (9, 0)
STACK_POINTER = re.compile(r"(?<![\w.])-?\|?R1(?:\.(?:reuse|64|H0_H0|H1_H1|X\d+))*\|?(?![\w.])")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s+(.*?)\s*;")
LOCAL_MEMORY = ("LDL", "STL")
"""Instructions whose addresses are in the stack: of spilled registers, they are `[R1 + a number]`."""


def computed_from_stack_pointer(sass: str) -> list[str]:
    """The instructions of nvdisasm's text that compute a value from R1, in a kernel without a stack frame.

    A kernel makes itself a frame by moving R1; there, addresses of local memory come from it. The first operand is
    where an instruction writes, further ones after a predicate.
    """
    found = []
    for line in sass.splitlines():
        parts = INSTRUCTION.match(line)
        if parts is None or parts[1].partition(".")[0] in LOCAL_MEMORY:
            continue
        into, *sources = parts[2].split(",")
        if not any(STACK_POINTER.search(source) for source in sources):
            continue
        if into.strip() == "R1":
            return []
        found.append(f"{parts[1]} {parts[2]}")
    return found


def disassembled(cubin: bytes) -> str:
    """The SASS of a compiled kernel, by the nvdisasm that Triton brings."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def attention_kernels(draw: random.Random) -> Iterator[Kernel]:
    """Forward, backward, causal and chosen, of narrow and wide heads, which the fault was seen with."""
    dims = draw.choice(((16, 25, 32), (64, 80, 128), (16, 25, 32, 64, 80, 128)))
    n, block = draw.choice((777, 1024, 2048, 997)), draw.choice((16, 32, 45, 64, 128, 150, 200))
    listed: dict[str, Any] = draw.choice(({}, {}, {"is_causal": True}, {"chosen": 3}, {"is_causal": True, "chosen": 3}))
    ir = MonarchAttention(1, 4, 2, n, n, draw.choice(dims), draw.choice(dims), torch.float16, Form(block), 0.125)
    ir = ir.changed(
        dtype=draw.choice((torch.float16, torch.bfloat16)),
        mask=draw.choice(tuple(MaskKind)),
        pad=draw.choice(("pre", "post")),
        window=draw.choice((None, 1)),
        prefix=draw.choice((0, 0, 4)),
        **listed,
    )
    if ir.is_causal and draw.random() < 0.5:
        ir = ir.changed(seq_len_q=n // 3)
    yield from _kernels(ATTENTION, ir)
    gradients = gradients_of(ir)
    if gradients is not None:
        yield from _kernels(GRADIENTS, gradients)


def linear_kernels(draw: random.Random) -> Iterator[Kernel]:
    blocks, rank = draw.choice((4, 8, 16)), draw.choice((8, 16, 24, 32, 48, 64, 96))
    kind = draw.choice((MONARCH, MONARCH, BLAST))
    widths = (blocks * draw.choice((48, 64, 128, 192, 256)), blocks * draw.choice((48, 64, 128, 256)))
    tokens, total = draw.choice((1, 16, 100, 1024, 8192)), rank * (8 if kind == BLAST else 1)
    of = BlockLinear(kind, tokens, *widths, blocks, blocks, total, torch.float16)
    gradients = (LinearGradients(of),) if kind == MONARCH else ()
    for ir in (*(FormedLinear(of, form) for form in forms.kernel_forms(of)), *gradients):
        yield from _kernels(LINEAR, ir)


def convolution_kernels(draw: random.Random) -> Iterator[Kernel]:
    points = draw.choice((200, 500, 1000, 2000, 4096))
    sizes = (16, 768, points, points, points, points, 0)
    dtypes = (draw.choice((torch.float16, torch.bfloat16)), torch.float32, torch.bfloat16)
    gates = {name: draw.random() < 0.5 for name in ("skip", "pre_gate", "post_gate")}
    convolution = LongConvolution(*sizes, *dtypes, **gates)
    for ir in (CONVOLUTION.bucketed(x) for x in (convolution, FilterGradient(convolution))):
        yield from CONVOLUTION.program_of(ir, CONVOLUTION.choose_schedule(ir, HOPPER), Specialization()).kernels


def _kernels(own: Emitter, ir: IR) -> Iterator[Kernel]:
    chosen = own.choose_schedule(ir, HOPPER)
    yield from dict.fromkeys(own.program_of(ir, chosen, own.expected(ir, chosen)).kernels)


DRAWN: dict[str, Callable[[random.Random], Iterator[Kernel]]] = {
    "attention": attention_kernels,
    "linear": linear_kernels,
    "convolution": convolution_kernels,
}


def drawn_kernels(family: str, seed: int, count: int) -> Iterator[Kernel]:
    """`count` different kernels of a family, at most two of one IR's; some with fewer stages than their own."""
    draw, seen = random.Random(seed), set[Kernel]()
    while len(seen) < count:
        kernels = [kernel for kernel in DRAWN[family](draw) if kernel not in seen]
        for kernel in draw.sample(kernels, min(2, len(kernels), count - len(seen))):
            seen.add(kernel)
            yield draw.choice((kernel, with_one_stage(kernel)))


def with_one_stage(kernel: Kernel) -> Kernel:
    return replace(kernel, tiling=replace(kernel.tiling, num_stages=1))


def tile_features_as_before() -> None:
    """Let tiles of 16-bit features be as narrow as they are, as they were before `tiling.feature_tiles`."""
    for module in (tiling, forward, backward, schedule, gradient_schedule):
        vars(module)["feature_tiles"] = lambda head, value, dtype: (tiling.padded(head), tiling.padded(value))


def known_to_fail() -> Kernel:
    """A kernel that ptxas 12.8 compiles wrongly where its tiles are as they were before."""
    ir = MonarchAttention(1, 2, 2, 997, 997, 80, 25, torch.float16, Form(150), 0.2)
    ir = ir.changed(pad="pre", mask=MaskKind.KEY_BIAS, window=1)
    own = GradientsOf(ir)
    (kernel,) = (x for x in _kernels(GRADIENTS, own) if x.name == "monarch_summarize_keys_backward")
    return with_one_stage(kernel)


def report_of(kernel: Kernel) -> dict[str, Any]:
    """What is compiled of a kernel: how it is called, how many instructions it has, those that compute from R1."""
    sass = disassembled(compile_kernel(kernel, HOPPER).asm["cubin"])
    count = sum(INSTRUCTION.match(line) is not None for line in sass.splitlines())
    called = f"{kernel.name}, {kernel.tiling}\n{kernel.header}"
    return {"of": called, "found": computed_from_stack_pointer(sass), "instructions": count, "ptxas": ptxas_version()}


def ptxas_version() -> str:
    from triton import knobs

    return str(knobs.nvidia.ptxas.version)


def main() -> None:
    asked = json.loads(sys.stdin.read())
    reports = [
        report_of(kernel)
        for name, count in asked["draw"].items()
        for kernel in drawn_kernels(name, asked["seed"], count)
    ]
    if asked.get("known"):
        reports.append(report_of(known_to_fail()))
        tile_features_as_before()
        reports.append(report_of(known_to_fail()))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
