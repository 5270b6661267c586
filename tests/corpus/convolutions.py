"""Long convolutions in every spelling of public models, and programs that are close to one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fft import fft, irfft, rfft

from tests.corpus.entry import Entry
from tests.support.convolutions import ONCE, TWICE, Program
from tests.support.convolutions import inputs as tensors

LENGTH = 24


def inputs(train: bool = False) -> tuple[Tensor, ...]:
    """u, k, r, d, x and z of the programs, in float32."""
    return tuple(x.detach().requires_grad_(train) for x in tensors(LENGTH, torch.float32))


def _global_filter(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u, norm="ortho") * torch.complex(k, r)[..., : LENGTH // 2 + 1], norm="ortho")


def _autocorrelation(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(rfft(u) * rfft(x).conj(), n=LENGTH)


def _dense(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return irfft(torch.einsum("bcl,dcl->bdl", rfft(u), rfft(torch.stack([k, r]))), n=LENGTH)


def _fourier_mixing(u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return fft(fft(u, dim=-1), dim=-2).real


EXACT: dict[str, Program] = {
    "global_filter": _global_filter,
    "autocorrelation": _autocorrelation,
    "dense": _dense,
    "fourier_mixing": _fourier_mixing,
}


def entries() -> list[Entry]:
    """Every program, under no_grad and in training; `want` is left open, for coverage counts attention alone."""
    lowered = [
        Entry(program.__name__ + suffix, lambda p=program, t=train: (p, inputs(t)), want="", train=train)
        for program in (*ONCE, *TWICE)
        for suffix, train in (("", False), ("_trained", True))
    ]
    return lowered + [Entry(name, lambda p=program: (p, inputs()), want="exact") for name, program in EXACT.items()]
