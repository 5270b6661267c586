"""A long convolution on its kernels: from tensors to the IR of a launcher, and the launch."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.launcher import Launcher, build, capability_of, on_device
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.convolution.ir import LongConvolution, looks_back
from monarch_compile.convolution.work import points_of

MOST_BATCH = 64
"""Schedules look no further than this number of sequences."""

Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""u, filter, skip, pre_gate, post_gate and second_gate."""


def launch(
    u: Tensor,
    filter: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    *,
    transform_len: Any,
    out_len: Any,
    lag: Any,
    scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """A long convolution by the emitted kernels; the meaning and the shapes are those of `reference.reference`.

    Tensors are read through their strides; sizes may be symbolic. Works eagerly, under fake tensors and inside
    `torch.library.triton_op`, and on CPU tensors when TRITON_INTERPRET=1. Products are formed of float16 numbers, each
    sequence and each filter in units of its largest number, and summed in float32.

    Raises:
        CodegenError: no kernel exists for these sizes, dtypes or device, or triton is not installed.
    """
    options = {"transform_len": transform_len, "out_len": out_len, "lag": lag, "scale": scale}
    return _launch((u, filter, skip, pre_gate, post_gate, None), options, out_dtype)[0]


def launch_twice(
    u: Tensor,
    filter: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor,
    second_gate: Tensor,
    *,
    transform_len: Any,
    out_len: Any,
    lag: Any,
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Two long convolutions as of `launch` that differ in the gates of their results alone.

    Raises:
        CodegenError: as `launch`.
    """
    options = {"transform_len": transform_len, "out_len": out_len, "lag": lag, "scale": scale}
    one, other = _launch((u, filter, skip, pre_gate, post_gate, second_gate), options, out_dtype)
    return one, other


def _launch(tensors: Given, options: dict[str, Any], out_dtype: torch.dtype) -> tuple[Tensor, ...]:
    u, filter, *terms = tensors
    points = points_of(u.shape[-1], options["out_len"])
    wraps = not looks_back(u.shape[-1], filter.shape[-1], options["transform_len"], options["lag"])
    batch = bucket(u.shape[0]) if isinstance(u.shape[0], int) else None
    there = tuple(term is not None for term in terms)
    ir = _bucket_ir(batch, points, wraps, u.dtype, filter.dtype, out_dtype, *there)
    launcher = build(ir, capability_of(u.device), is_interpreted())
    with on_device(u):
        return _run(launcher, tensors, options)


def run(
    launcher: Launcher,
    u: Tensor,
    filter: Tensor,
    skip: Tensor | None,
    pre_gate: Tensor | None,
    post_gate: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """Launch on tensors as those of `launch`. options: transform_len, out_len, lag and scale."""
    return _run(launcher, (u, filter, skip, pre_gate, post_gate, None), options)[0]


def _run(launcher: Launcher, given: Given, options: dict[str, Any]) -> tuple[Tensor, ...]:
    u, filter, skip, pre_gate, post_gate, second_gate = given
    batch, channels, seq_len = u.shape
    sizes = {"batch": batch, "channels": channels, "seq_len": seq_len, "filter_len": filter.shape[-1], **options}
    tensors = {"u": by_rows(u), "filter": filter}
    for name, tensor in (("pre_gate", pre_gate), ("post_gate", post_gate), ("second_gate", second_gate)):
        if tensor is not None:
            tensors[name] = by_rows(tensor)
    if skip is not None:
        tensors["skip"] = skip.to(torch.float32)
    return launcher(tensors, sizes)


def by_rows(x: Tensor) -> Tensor:
    """`x` with the positions of a sequence side by side: a program reads whole sequences, and it would read a cache
    line for each number of one that lies otherwise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def bucketed(ir: LongConvolution) -> LongConvolution:
    """`ir` as its launcher is made for it: a batch and lengths of powers of two."""
    batch = bucket(ir.batch) if isinstance(ir.batch, int) else None
    terms = (ir.skip, ir.pre_gate, ir.post_gate, ir.second_gate)
    if not isinstance(ir.seq_len, int) or not isinstance(ir.out_len, int):
        return replace(ir, batch="B", channels="C", scale=1.0)
    points = points_of(ir.seq_len, ir.out_len)
    return _bucket_ir(batch, points, ir.wraps, ir.dtype, ir.filter_dtype, ir.out_dtype, *terms)


@functools.lru_cache(maxsize=1024)
def _bucket_ir(
    batch: int | None,
    points: int,
    wraps: bool,
    dtype: torch.dtype,
    filter_dtype: torch.dtype,
    out_dtype: torch.dtype,
    skip: bool,
    pre_gate: bool,
    post_gate: bool,
    second_gate: bool,
) -> LongConvolution:
    """The IR of the longest sequences in a transform of `points`: circular where the filter wraps, else causal."""
    return LongConvolution(
        batch="B" if batch is None else batch,
        channels="C",
        seq_len=points,
        filter_len=points,
        transform_len=points if wraps else 2 * points,
        out_len=points,
        lag=0,
        dtype=dtype,
        filter_dtype=filter_dtype,
        out_dtype=out_dtype,
        skip=skip,
        pre_gate=pre_gate,
        post_gate=post_gate,
        second_gate=second_gate,
    )


def bucket(batch: int) -> int:
    """The largest power of two of at most this batch: schedules depend on no more of it."""
    return min(MOST_BATCH, 1 << (max(1, batch).bit_length() - 1))
