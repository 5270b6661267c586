"""Long convolutions, as the report and the cost model see them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.work import LEAST_CAPABILITY, MOST_POINTS, cost, fft_cost, predict, runs_kernels
from monarch_compile.cost.prediction import Cost
from monarch_compile.decision import Decision
from monarch_compile.family import Family


def _exact_cost(decision: Decision) -> Cost | None:
    """That of the FFTs, in whole bytes."""
    if decision.ir is None:
        return None
    found = fft_cost(decision.ir)
    return replace(found, bytes=round(found.bytes)) if isinstance(found.bytes, float) else found


def _shape(decision: Decision) -> str:
    """(batch, channels, seq_len) of the input, and the filter's length; a convolution that is refused has no IR."""
    ir: LongConvolution | None = decision.ir
    return "" if ir is None else f"{ir.batch}x{ir.channels}x{ir.seq_len}, filter {ir.filter_len}"


def _no_kernels(ir: LongConvolution) -> str:
    lengths = [size if isinstance(size, int) else 1 for size in (ir.seq_len, ir.out_len)]
    if runs_kernels("cuda", ir.dtype, ir.filter_dtype, ir.out_dtype, *lengths):
        return ""
    least = ".".join(map(str, LEAST_CAPABILITY))
    return (
        f"torch.fft computes it: kernels are for 16-bit inputs and results of at most {MOST_POINTS} points, "
        f"on NVIDIA GPUs of compute capability {least} or later"
    )


def _no_size(ir: Any) -> None:
    return None


FAMILY = Family(
    name="convolution",
    noun="long convolution",
    cost=cost,
    exact_cost=_exact_cost,
    predict=predict,
    shape=_shape,
    blocks=lambda ir: "-",
    block_size=_no_size,
    no_kernels=_no_kernels,
)
