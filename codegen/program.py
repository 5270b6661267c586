"""What is launched for one IR under one schedule, as data: kernels, and the buffers that they read and write.

The launcher, the report of the compiler and the count of bytes moved read it, and know no family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from monarch_compile.codegen.tiling import Tiling

Size = int | str
"""A number, or the name of one that is known when kernels are launched."""


class Tiles(NamedTuple):
    """How many tiles of `by` cover `size`."""

    size: Size
    by: int


@dataclass(frozen=True)
class Buffer:
    """A tensor that kernels read or write.

    dims: its sizes; where a kernel writes it, it is allocated with these, contiguous.
    strides: those that kernels take as parameters, (parameter, dim); of the caller's tensors, all in the order of dims.
        What a kernel wrote with a dim of literal size 1 is read with stride 0 there: it is the same for all.
    """

    name: str
    dtype: torch.dtype
    dims: tuple[Size, ...]
    strides: tuple[tuple[str, int], ...] = ()

    def stride_values(self, strides: tuple[Any, ...]) -> list[tuple[str, Any]]:
        """The kernel parameters of a tensor that a kernel wrote, with these strides."""
        return [(name, 0 if self.dims[dim] == 1 else strides[dim]) for name, dim in self.strides]


@dataclass(frozen=True)
class Kernel:
    """One kernel. Its parameters: the buffers it reads, writes and updates, the strides of what it reads, and sizes.

    template: the file of the family's `templates/` that it is rendered from.
    reads, writes, updates: `writes` are allocated when it is launched; an earlier kernel has written what it `updates`.
    sizes: what it may be told at run time; it takes what its text uses.
    constants: what may stand as a literal at the top of its text; so does what the text uses.
    variables: what the template is told beside these.
    grid: how many programs run: the product.
    header: comment lines on top of its text.
    """

    family: str
    name: str
    template: str
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    updates: tuple[Buffer, ...]
    sizes: tuple[str, ...]
    constants: tuple[tuple[str, Any], ...]
    variables: tuple[tuple[str, Any], ...]
    grid: tuple[Size | Tiles, ...]
    tiling: Tiling
    header: str

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All its tensors, in the order of its parameters."""
        return (*self.reads, *self.writes, *self.updates)


@dataclass(frozen=True)
class Program:
    """The kernels of one IR in the order in which they are launched; one may repeat. outputs: buffers to return."""

    kernels: tuple[Kernel, ...]
    outputs: tuple[str, ...]

    @property
    def given(self) -> tuple[Buffer, ...]:
        """Buffers with strides that are read and that no kernel writes."""
        written = {buffer.name for kernel in self.kernels for buffer in kernel.writes}
        read = dict.fromkeys(buffer for kernel in self.kernels for buffer in kernel.reads if buffer.strides)
        return tuple(buffer for buffer in read if buffer.name not in written)

    def bytes_moved(self, sizes: Mapping[str, int]) -> int:
        """Bytes that kernels read and write: of each buffer once a kernel, twice where it is updated."""
        moved = [buffer for kernel in self.kernels for buffer in (*kernel.buffers, *kernel.updates)]
        return sum(math.prod(extent(dim, sizes) for dim in x.dims) * x.dtype.itemsize for x in moved)


def extent(size: Size | Tiles, sizes: Mapping[str, Any]) -> Any:
    """A size of a buffer or of a grid, where the named sizes have these values; symbolic where one of them is."""
    if size.__class__ is str:
        return sizes[size]
    if not isinstance(size, Tiles):
        return size
    whole = extent(size.size, sizes)
    return whole if size.by == 1 else (whole + size.by - 1) // size.by
