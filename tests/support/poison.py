"""Buffers of compiled code between margins, filled with NaN: reads past a buffer, or of what was never written, show.

Inductor's generated modules take their allocator from `torch._C._dynamo.guards` when they are imported, so the poisoned
one has to be installed before anything is compiled in the process.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

ALLOCATORS = {"cpu": "_empty_strided_cpu", "cuda": "_empty_strided_cuda"}
"""What generated code allocates its buffers with, in `torch._C._dynamo.guards`, by type of device."""

LEAST_MARGIN, MOST_MARGIN = 1024, 1 << 16
"""Elements on either side of a buffer: as many as it has, within these bounds. Multiples of 64 keep the alignment."""


class Poisoned:
    """Allocators that leave NaN around and inside every buffer, and note writes to what is around them."""

    def __init__(self) -> None:
        self.num_buffers = 0
        self.overwritten: list[str] = []

    @contextlib.contextmanager
    def installed(self, device: str = "cpu") -> Iterator[None]:
        """While this lasts, code that is compiled for a type of device allocates poisoned buffers.

        On "cuda" each takes a kernel more and, at the end, a look from the host: nothing for CUDA graphs.
        """
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch._C._dynamo.guards, ALLOCATORS[device], self._allocator(device))
            yield

    def _allocator(self, device: str) -> Callable[..., Tensor]:
        def allocate(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
            return self.empty_strided(size, stride, dtype, device)

        return allocate

    def empty_strided(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
        """As torch.empty_strided, poisoned."""
        span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
        margin = max(LEAST_MARGIN, min(MOST_MARGIN, -(-span // 64) * 64))
        base = _poison(span + 2 * margin, dtype, device)
        buffer = base.as_strided(tuple(size), tuple(stride), margin)
        self.num_buffers += 1
        weakref.finalize(buffer, self._check, base, margin, f"{dtype} {tuple(size)} {tuple(stride)} on {device}")
        return buffer

    def _check(self, base: Tensor, margin: int, what: str) -> None:
        whole = _poison(len(base), base.dtype, base.device)
        for found, poison in ((base[:margin], whole[:margin]), (base[-margin:], whole[-margin:])):
            if not torch.equal(found.view(torch.uint8), poison.view(torch.uint8)):
                self.overwritten.append(what)


def _poison(numel: int, dtype: torch.dtype, device: str | torch.device) -> Tensor:
    """NaN; bools in turn, of which one or the other is wrong; a large integer."""
    if dtype == torch.bool:
        return torch.arange(numel, device=device) % 2 == 0
    number = float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max // 2
    return torch.full((numel,), number, dtype=dtype, device=device)


def between_margins(x: Tensor) -> Tensor:
    """A copy of `x` with its strides, between margins of NaN: code that reads past an input shows too."""
    copy = Poisoned().empty_strided(x.shape, x.stride(), x.dtype, x.device.type)
    return copy.copy_(x)
