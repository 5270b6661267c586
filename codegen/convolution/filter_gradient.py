"""The gradients of a long convolution's filter and skip term on kernels: their program, its tiling, and the launch.

Products are those of float32 numbers, as sums of two float16 numbers each: the sum over a batch has no error that could
be checked for each sequence, as that of a result has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.convolution import kernels
from monarch_compile.codegen.convolution.kernels import Maker, Specialization
from monarch_compile.codegen.convolution.launch import bucket, bucketed, by_rows
from monarch_compile.codegen.convolution.schedule import (
    USUAL_BATCH,
    Schedule,
    check_supported,
    points,
    power_of_two,
)
from monarch_compile.codegen.launcher import Launcher, build, capability_of, on_device
from monarch_compile.codegen.program import Buffer, Kernel, Program, Tiles
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.codegen.tiling import Capability, Tiling
from monarch_compile.convolution.ir import FilterGradient, LongConvolution, looks_back
from monarch_compile.convolution.work import MOST_GRADIENT_POINTS, points_of
from monarch_compile.errors import CodegenError

CORRELATIONS: dict[int, Schedule] = {
    256: Schedule(Tiling(16, 16, 1, 1, 16), precision="single", ahead=True),
    512: Schedule(Tiling(32, 16, 1, 1, 16), precision="single", ahead=True),
    1024: Schedule(Tiling(32, 32, 2, 1, 16), precision="single", ahead=True),
    2048: Schedule(Tiling(64, 32, 4, 1, 16), precision="single", ahead=True),
    4096: Schedule(Tiling(64, 64, 4, 1, 16), precision="single"),
    8192: Schedule(Tiling(128, 64, 8, 1, 16), precision="single"),
}
"""By points, for large batches."""


def canonical(ir: FilterGradient) -> FilterGradient:
    """`ir` as its launcher is made for it."""
    return FilterGradient(bucketed(replace(ir.of, scale=1.0)))


def check(ir: FilterGradient) -> None:
    """Raise CodegenError where no kernel exists for `ir`."""
    check_supported(ir.of)
    if points(ir.of) > MOST_GRADIENT_POINTS:
        raise CodegenError(f"the gradient of a filter has kernels up to {MOST_GRADIENT_POINTS} points; found {ir}")


def choose_schedule(ir: FilterGradient, capability: Capability | None = None) -> Schedule:
    """The shipped schedule.

    Raises:
        CodegenError: no kernel exists.
    """
    check(ir)
    batch = ir.of.batch if isinstance(ir.of.batch, int) else USUAL_BATCH
    chosen = CORRELATIONS[points(ir.of)]
    return replace(chosen, main=replace(chosen.main, turns=min(chosen.main.turns, power_of_two(batch))))


def program(ir: FilterGradient, schedule: Schedule, specialization: Specialization) -> Program:
    """Kernels of a bucketed IR: sums of spectra over parts of the batch, then of these, and the transform back."""
    of, main = ir.of, schedule.main
    make = Maker(of, schedule, specialization, str(ir))
    tables = kernels.tables(schedule, "single")
    spectra = Buffer("spectra", torch.float32, ("channels", "groups", 2, points(of)))
    lag_zero = Buffer("lag_zero", torch.float32, ("batch", "channels"))
    later = Buffer("later", of.filter_dtype, ("channels", "out_len"))
    earlier = (Buffer("earlier", of.filter_dtype, ("channels", "seq_len")),) if of.wraps else ()
    at_zero = Buffer("at_zero", torch.float32, ("channels",))
    made: tuple[Kernel, ...] = (
        make.tables(tables),
        make.kernel(
            "correlation",
            (*_sequences(of), *tables),
            (spectra, lag_zero),
            ("channels", Tiles("batch", main.turns)),
            main,
            precision="single",
        ),
        make.kernel(
            "lags",
            (*tables, spectra, lag_zero),
            (later, *earlier, at_zero),
            ("channels",),
            replace(main, turns=1),
            precision="single",
        ),
    )
    return Program(made, (later.name, *(buffer.name for buffer in earlier), at_zero.name))


def _sequences(of: LongConvolution) -> tuple[Buffer, ...]:
    """What is read: those of the convolution, without its skip term, and the gradient of its result."""
    read = [buffer for buffer in kernels.sequence_buffers(of) if buffer.name != "skip"]
    strides = (("grad_batch", 0), ("grad_channel", 1), ("grad_time", 2))
    return (*read, Buffer("grad", of.out_dtype, ("batch", "channels", "out_len"), strides))


def launch(
    grad: Tensor,
    u: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    *,
    filter_dtype: torch.dtype,
    transform_len: Any,
    filter_len: Any,
    lag: Any,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The correlation of `grad` with `u`, by lag: what `correlation.from_lags` takes, and its value
    at lag 0 without the scale, float32 (C,), by the emitted kernels.

    Raises:
        CodegenError: no kernel exists for these sizes, dtypes or device, or triton is not installed.
    """
    batch, _, seq_len = u.shape
    count = points_of(seq_len, grad.shape[-1])
    of = LongConvolution(
        batch=bucket(batch) if isinstance(batch, int) else "B",
        channels="C",
        seq_len=count,
        filter_len=count,
        transform_len=2 * count if looks_back(seq_len, filter_len, transform_len, lag) else count,
        out_len=count,
        lag=0,
        dtype=u.dtype,
        filter_dtype=filter_dtype,
        out_dtype=grad.dtype,
        pre_gate=pre_gate is not None,
        post_gate=post_gate is not None,
    )
    launcher = build(FilterGradient(of), capability_of(u.device), is_interpreted())
    options = {"transform_len": transform_len, "filter_len": filter_len, "lag": lag, "scale": scale}
    with on_device(u):
        return run(launcher, grad, u, pre_gate, post_gate, options)


def run(
    launcher: Launcher,
    grad: Tensor,
    u: Tensor,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch on tensors as those of `launch`. options: at least `scale`."""
    batch, channels, seq_len = u.shape
    given = {"u": u, "pre_gate": pre_gate, "post_gate": post_gate, "grad": grad}
    tensors = {name: by_rows(x) for name, x in given.items() if x is not None}
    groups = (batch + launcher.schedule.main.turns - 1) // launcher.schedule.main.turns
    sizes = {"batch": batch, "channels": channels, "seq_len": seq_len, "out_len": grad.shape[-1], "groups": groups}
    later, *earlier, at_zero = launcher(tensors, {**sizes, **options})
    return later, earlier[0] if earlier else None, at_zero
