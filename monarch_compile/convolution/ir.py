"""The typed IR of a long convolution: what a lowered site computes, independent of how it runs.

A value is frozen, hashable and equal by value, prints on one line, and is checked by `verify`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from monarch_compile.errors import IRError
from monarch_compile.ir import DTYPE_NAMES, Dim


def looks_back(seq_len: Any, filter_len: Any, transform_len: Any, lag: Any) -> bool:
    """Whether outputs depend on inputs before them and on their own alone, the filter's first number at lag 0.

    Symbolic sizes are not guarded on: where it is not known, it is False, which is right for all.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(lag == 0) and statically_known_true(transform_len - seq_len >= filter_len - 1))


@dataclass(frozen=True)
class LongConvolution:
    """A depthwise convolution, circular in a transform of `transform_len` points.

    With n = transform_len, h = the filter, padded with zeros or cut to n points, and v = u * pre_gate, likewise to n:
    y[t] = (scale * sum over s of v[s] h[(t + lag - s) mod n] + skip * v[t]) * post_gate[t], 0 <= t < out_len.

    It is the causal convolution where lag = 0 and n >= seq_len + filter_len - 1; no wrap is needed for that, nor is
    one ruled out. Shapes: u and pre_gate (batch, channels, seq_len), filter (channels, filter_len), skip (channels,),
    post_gate and y (batch, channels, out_len).

    dtype, filter_dtype, out_dtype: of u, of the filter and of y. Products and sums are those of float32 (of float64
    where u has it), whatever these are.
    skip, pre_gate, post_gate: whether there are such.
    second_gate: whether the result is also multiplied by another gate instead of post_gate, for a second result.
    """

    family: ClassVar[str] = "convolution"

    batch: Dim
    channels: Dim
    seq_len: Dim
    filter_len: Dim
    transform_len: Dim
    out_len: Dim
    lag: Dim
    dtype: torch.dtype
    filter_dtype: torch.dtype
    out_dtype: torch.dtype
    scale: float = 1.0
    skip: bool = False
    pre_gate: bool = False
    post_gate: bool = False
    second_gate: bool = False

    def __post_init__(self) -> None:
        verify(self)

    @property
    def wraps(self) -> bool:
        """Whether an output may depend on inputs after it, or on more than the lags from 0 on; where sizes are
        symbolic, it may."""
        sizes = (self.seq_len, self.filter_len, self.transform_len, self.lag)
        return any(isinstance(size, str) for size in sizes) or not looks_back(*sizes)

    def __str__(self) -> str:
        return _text(self)


@dataclass(frozen=True)
class FilterGradient:
    """The gradients of the filter and of the skip term of a convolution: sums over the batch.

    With g = grad * post_gate and v = u * pre_gate, for the filter's number at p: scale * sum over batch, t of
    g[t] v[(t + lag - p) mod n]; for the skip term: sum over batch, t of g[t] v[t].

    of: the convolution; `of.out_dtype` is the dtype of grad, `of.filter_dtype` that of the gradient of the filter.
    """

    family: ClassVar[str] = "convolution"

    of: LongConvolution

    @property
    def batch(self) -> Dim:
        """That of the convolution."""
        return self.of.batch

    def __str__(self) -> str:
        return f"gradient of the filter of {self.of}"


class Rule(NamedTuple):
    """What must hold of an IR, and its wording."""

    holds: Callable[[LongConvolution], bool]
    wording: str


def _is_size(value: Dim, least: int = 1) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and value >= least)


def _fits(ir: LongConvolution) -> bool:
    sizes = (ir.out_len, ir.transform_len)
    return any(isinstance(size, str) for size in sizes) or int(ir.out_len) <= int(ir.transform_len)


def _skips_whole(ir: LongConvolution) -> bool:
    sizes = (ir.out_len, ir.seq_len)
    return not ir.skip or any(isinstance(size, str) for size in sizes) or ir.out_len == ir.seq_len


RULES: tuple[Rule, ...] = (
    Rule(
        lambda ir: all(map(_is_size, (ir.batch, ir.channels, ir.seq_len, ir.filter_len, ir.transform_len, ir.out_len))),
        "sizes are at least 1",
    ),
    Rule(lambda ir: _is_size(ir.lag, 0), "lag is at least 0"),
    Rule(_fits, "no more is put out than the transform has points"),
    Rule(_skips_whole, "a skip term needs an output as long as the sequence"),
    Rule(
        lambda ir: all(dtype in DTYPE_NAMES for dtype in (ir.dtype, ir.filter_dtype, ir.out_dtype)),
        f"dtypes are {', '.join(DTYPE_NAMES.values())}",
    ),
    Rule(lambda ir: math.isfinite(ir.scale), "the scale is finite"),
)


def verify(ir: LongConvolution) -> None:
    """Raise IRError, with the printed IR, at the first rule that `ir` breaks."""
    for rule in RULES:
        if not rule.holds(ir):
            raise IRError(f"{rule.wording}\n  in {_text(ir)}")


def _text(ir: LongConvolution) -> str:
    names = {dtype: DTYPE_NAMES.get(dtype, str(dtype)) for dtype in (ir.dtype, ir.filter_dtype, ir.out_dtype)}
    parts: list[Any] = [
        f"monarch.long_convolution<{names[ir.dtype]}> [{ir.batch},{ir.channels},{ir.seq_len}]",
        f"filter {names[ir.filter_dtype]}[{ir.filter_len}]",
        f"points {ir.transform_len}",
        f"lag {ir.lag}",
        *([f"scale {ir.scale:.6g}"] if ir.scale != 1.0 else []),
        *(name for name in ("pre_gate", "skip", "post_gate", "second_gate") if getattr(ir, name)),
        f"-> {names[ir.out_dtype]}[{ir.out_len}]",
    ]
    return " ".join(parts)
