"""Random programs around one convolution: transforms, scales, conjugates, layouts, crops and neighbours at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Random:
    """One program. Each field picks a way to write one step of it."""

    kind: str
    norms: tuple[str | None, str | None, str | None]
    conjugated: tuple[bool, bool]
    axis: int
    points: int
    padded: bool
    scaled: str
    summed: str
    gate: str
    crop: tuple[int, int] | None
    rolled: int
    skip: bool
    after: str
    swapped: bool
    lead: str

    def __call__(self, u: Tensor, k: Tensor, r: Tensor, d: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """u, x (batch, channels, length), k, r (channels, taps), d (channels,), z (batch, channels, 1)."""
        v = u * x if self.gate == "before" else u
        signal = F.pad(v, (0, 3)) if self.padded else v
        u_f = self._forward(signal, self.norms[0])
        k_f = self._filters(k, r)
        u_f, k_f = (f.conj() if turned else f for f, turned in zip((u_f, k_f), self.conjugated, strict=True))
        if self.lead == "unsqueezed":
            k_f = k_f.unsqueeze(0)
        y_f = k_f * u_f if self.swapped else u_f * k_f
        if self.lead == "einsum":
            y_f = torch.einsum("bcl,cl->bcl", u_f, k_f)
        y_f = y_f / self.points if self.scaled == "product" else y_f
        y = self._after(self._back(y_f), u, v, d, z)
        return y.transpose(1, 2) if self.axis == 1 and self.after == "turned" else y

    def _filters(self, k: Tensor, r: Tensor) -> Tensor:
        k_f = self._forward(k, self.norms[1])
        if self.scaled == "filter":
            k_f = k_f * (2.0 / self.points)
        if self.summed == "sum":
            return k_f + self._forward(r, self.norms[1])
        if self.summed == "both ways":
            return k_f - 0.5 * self._forward(r, self.norms[1]).conj()
        return k_f

    def _forward(self, signal: Tensor, norm: str | None) -> Tensor:
        if self.axis == 1:
            signal = signal.mT
        dim = -2 if self.axis == 1 else -1
        if self.kind == "complex":
            found = torch.fft.fft(signal, self.points, dim, norm)
        elif self.kind == "mixed" and signal.dim() == 3:
            found = torch.fft.fft(signal, self.points, dim, norm).narrow(dim, 0, self.points // 2 + 1)
        else:
            found = torch.fft.rfft(signal, self.points, dim, norm)
        return found.mT if self.axis == 1 else found

    def _back(self, y_f: Tensor) -> Tensor:
        if self.kind == "complex":
            return torch.fft.ifft(y_f, norm=self.norms[2]).real
        return torch.fft.irfft(y_f, self.points, norm=self.norms[2])

    def _after(self, y: Tensor, u: Tensor, v: Tensor, d: Tensor, z: Tensor) -> Tensor:
        if self.rolled:
            y = torch.roll(y, self.rolled, -1)
        if self.crop is not None:
            y = y[..., self.crop[0] : self.crop[1]]
        y = y * 3 if self.scaled == "result" else y
        if self.skip and y.shape == u.shape:
            y = y + v * d[:, None]
        if self.gate == "after":
            y = y * z.expand(y.shape).sin()
        return y


LENGTH, TAPS = 9, 7


def random_convolutions() -> st.SearchStrategy[Random]:
    """All of them."""
    norm = st.sampled_from([None, "backward", "ortho", "forward"])
    return st.builds(
        Random,
        kind=st.sampled_from(["real", "complex", "mixed"]),
        norms=st.tuples(norm, norm, norm),
        conjugated=st.tuples(st.booleans(), st.booleans()),
        axis=st.sampled_from([1, 2]),
        points=st.integers(1, 20),
        padded=st.booleans(),
        scaled=st.sampled_from(["", "product", "filter", "result"]),
        summed=st.sampled_from(["", "sum", "both ways"]),
        gate=st.sampled_from(["", "before", "after"]),
        crop=st.sampled_from([None, (0, 9), (0, 5), (2, 11), (-9, 20), (1, -1)]),
        rolled=st.sampled_from([0, 1, -4]),
        skip=st.booleans(),
        after=st.sampled_from(["", "turned"]),
        swapped=st.booleans(),
        lead=st.sampled_from(["", "unsqueezed", "einsum"]),
    )


def inputs(batch: int, channels: int, seed: int = 0) -> tuple[Any, ...]:
    """u, k, r, d, x and z in float64, which want gradients."""
    generator = torch.Generator().manual_seed(seed)
    signal, taps = (batch, channels, LENGTH), (channels, TAPS)
    shapes = (signal, taps, taps, (channels,), signal, (batch, channels, 1))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
