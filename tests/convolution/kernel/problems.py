"""Problems that kernels of long convolutions are checked on, on whatever device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monarch_compile.codegen.convolution.filter_gradient import launch as filter_gradient_by_lags
from monarch_compile.codegen.convolution.launch import launch
from monarch_compile.convolution.correlation import filter_gradient, from_lags
from monarch_compile.convolution.reference import reference

BOUNDS = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7}
"""Relative error of a sequence, by the dtype of the result: the interpreter cuts bfloat16 instead of rounding it."""

GRADIENT_BOUND = 4e-6
"""Relative error of a channel's gradient of the filter, of inputs whose correlations do not cancel."""
BOUND_AT_ALL_LAGS = 1e-6
"""Its error over the norm of a channel's correlation at all lags. Float32 FFTs reach 1.5e-7 there."""
BOUND_ON_TENSOR_CORES = 6 * 2**-21
"""The same on a device, where each of the six products of three transforms is three of TensorFloat-32 numbers."""


@dataclass(frozen=True)
class Case:
    """Sizes of a convolution, and its terms: "d" skip, "a" pre_gate, "z" post_gate. layout: "rows", "turned", "cut"."""

    batch: int
    channels: int
    seq_len: int
    filter_len: int
    transform_len: int
    out_len: int
    lag: int = 0
    terms: str = ""
    layout: str = "rows"
    scale: float = 1.0

    def __str__(self) -> str:
        sizes = f"b{self.batch}c{self.channels}l{self.seq_len}k{self.filter_len}n{self.transform_len}o{self.out_len}"
        return f"{sizes}lag{self.lag}{self.terms}-{self.layout}"


CASES = (
    Case(3, 2, 1000, 1000, 2000, 1000, terms="d"),
    Case(17, 2, 256, 256, 512, 256, terms="z", scale=0.5),
    Case(5, 3, 300, 300, 600, 300, terms="daz", layout="turned"),
    Case(2, 1, 1000, 1000, 1000, 1000, terms="da", layout="cut"),
    Case(2, 2, 900, 1000, 1950, 1000, lag=77, terms="az"),
    Case(2, 1, 700, 1500, 1500, 600, lag=1400),
    Case(3, 2, 3, 3, 6, 3, terms="daz"),
    Case(2, 1, 1, 1, 2, 1),
    Case(2, 3, 5, 9, 7, 7, lag=3),
    Case(9, 2, 127, 64, 254, 127, terms="dz"),
    Case(2, 1, 2000, 2000, 4000, 2000, terms="d"),
    Case(1, 2, 4096, 4096, 8192, 4096),
)

GRADIENT_CASES = (
    Case(3, 2, 1000, 1000, 2000, 1000),
    Case(19, 2, 256, 256, 512, 256, terms="z", scale=0.5),
    Case(5, 3, 300, 300, 600, 300, terms="az", layout="turned"),
    Case(2, 1, 1000, 1000, 1000, 1000, terms="a", layout="cut"),
    Case(2, 2, 900, 1000, 1950, 1000, lag=77, terms="az"),
    Case(2, 1, 700, 1500, 1500, 600, lag=1400),
    Case(3, 2, 3, 3, 6, 3, terms="az"),
    Case(2, 1, 1, 1, 2, 1),
    Case(2, 3, 5, 9, 7, 7, lag=3),
    Case(9, 2, 127, 64, 254, 127, terms="z"),
    Case(2, 2, 100, 400, 600, 100),
    Case(2, 1, 2000, 2000, 4000, 2000),
    Case(1, 2, 4096, 4096, 8192, 4096),
)


def tensors(case: Case, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> tuple[list[Any], dict[str, Any]]:
    """The tensors of `launch`, and its options but the dtype of the result. Sequences differ in size by 2**10."""
    generator = torch.Generator(device).manual_seed(case.seq_len)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    def sequences(length: int) -> Tensor:
        if case.layout == "turned":
            return normal(case.batch, length, case.channels).to(dtype).transpose(1, 2)
        if case.layout == "cut":
            return normal(case.batch, case.channels, 2 * length + 3).to(dtype)[..., 3 : length + 3]
        return normal(case.batch, case.channels, length).to(dtype)

    u = sequences(case.seq_len)
    u = u * 2.0 ** -(torch.arange(case.batch, device=device) % 3 * 10)[:, None, None].to(dtype)
    decay = torch.exp(-3 * torch.arange(case.filter_len, device=device) / case.filter_len)
    given = [
        u,
        normal(case.channels, case.filter_len) * decay,
        normal(case.channels) if "d" in case.terms else None,
        sequences(case.seq_len) if "a" in case.terms else None,
        sequences(case.out_len) if "z" in case.terms else None,
    ]
    options = {"transform_len": case.transform_len, "out_len": case.out_len, "lag": case.lag, "scale": case.scale}
    return given, options


def expected(given: list[Any], options: dict[str, Any]) -> Tensor:
    """The float64 reference."""
    wide = [None if x is None else x.double() for x in given]
    return reference(wide[0], wide[1], *wide[2:], **options)


def errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative error of each sequence."""
    difference = (found.double() - wanted).flatten(1).norm(dim=1)
    return difference / wanted.flatten(1).norm(dim=1).clamp(min=1e-300)


def check(case: Case, device: str = "cpu", out_dtype: torch.dtype = torch.float32) -> None:
    """The kernels against the float64 reference, sequence by sequence."""
    given, options = tensors(case, device)
    found = launch(*given, **options, out_dtype=out_dtype)
    assert found.shape == (case.batch, case.channels, case.out_len)
    assert found.is_contiguous()
    assert errors(found, expected(given, options)).max() < BOUNDS[out_dtype]


def filter_gradient_problem(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, filter_dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """grad, u and the gates of the gradient of a filter, and its options; gradients, too, differ in size by 2**10."""
    (u, _, _, pre_gate, post_gate), options = tensors(case, device, dtype)
    grad = torch.randn(
        case.batch, case.channels, case.out_len, device=device, generator=torch.Generator(device).manual_seed(1)
    )
    grad = grad * 2.0 ** -(torch.arange(case.batch, device=device) % 2 * 10)[:, None, None]
    del options["out_len"]
    return [grad.to(dtype), u, pre_gate, post_gate], {
        **options,
        "filter_len": case.filter_len,
        "filter_dtype": filter_dtype,
    }


def cancelling_problem(points: int, device: str = "cpu") -> tuple[list[Tensor | None], dict[str, Any]]:
    """As `filter_gradient_problem`: constants, chirps, impulses and decays, each with each."""
    ramp = torch.arange(points, device=device)
    chirp = torch.cos(torch.pi * ramp**2 / points / 64)
    impulse = (ramp == points - 1).float()
    signals = torch.stack([torch.ones(points, device=device), chirp, impulse, torch.exp(-6 * ramp / points)])
    u = signals.repeat_interleave(4, 0)[None].bfloat16().repeat(2, 1, 1)
    grad = signals.flip(-1).repeat(4, 1)[None].bfloat16().repeat(2, 1, 1)
    options = {"filter_dtype": torch.float32, "transform_len": 2 * points, "filter_len": points, "lag": 0, "scale": 1.0}
    return [grad, u, None, None], options


def by_kernels(tensors: list[Tensor | None], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Gradients of the filter and of the skip term by the kernels."""
    sizes = {name: options[name] for name in ("transform_len", "filter_len", "lag")}
    later, earlier, at_zero = filter_gradient_by_lags(*tensors, **options)  # type: ignore[arg-type]
    return from_lags(later, earlier, **sizes), at_zero


def in_float64(tensors: list[Tensor | None], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same by float64 FFTs."""
    wide = [None if x is None else x.double() for x in tensors]
    return filter_gradient(*wide, **{**options, "filter_dtype": torch.float64})  # type: ignore[arg-type]


def gradient_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """Relative, of each channel."""
    return (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-300)
