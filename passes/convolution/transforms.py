"""Fourier transforms along one dim, as the graph has them: PyTorch's functions, and the ops that these are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, normal_dim, shape_of, value_of
from monarch_compile.refusal import Refused

MODES: dict[Any, int] = {None: 0, "backward": 0, "ortho": -1, "forward": -2}
"""What a forward transform of n points is multiplied by, as a power of sqrt(n), by its `norm`."""
CODES: dict[Any, int] = {0: 0, 1: -1, 2: -2}
"""The same by the code that the ops have."""


@dataclass(frozen=True)
class Transform:
    """One transform of `points` points along dim `axis` of `source`.

    half: whether its spectrum has the first points // 2 + 1 values alone. power: it is multiplied by sqrt(points) to
    this power; an inverse one, beside the division by `points` that undoes a forward one. gives_real: for an inverse.
    """

    node: Node
    source: Node
    axis: int
    points: Any
    power: int
    half: bool = False
    gives_real: bool = False


def is_same(one: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard."""
    if str(one) == str(other):
        return True
    return statically_known_true(one == other) if _is_size(one) and _is_size(other) else False


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt))


def number_of(value: Any) -> Any:
    """An argument that is a size: a number, symbolic or not."""
    return value_of(value) if isinstance(value, Node) else value


def _single_axis(node: Node, source: Node, dims: Any) -> int:
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:
        raise Refused("transform_dims", f"{node.target} transforms several dims", node)
    return normal_dim(int(dims[0]), len(shape_of(source)))


def _function(node: Node, *, half: bool) -> Transform:
    source = inputs(node)[0]
    axis = normal_dim(arg(node, 2, "dim", -1), len(shape_of(source)))
    points = number_of(arg(node, 1, "n"))
    points = shape_of(source)[axis] if points is None else points
    return Transform(node, source, axis, points, MODES[arg(node, 3, "norm")], half)


def _of_real(node: Node) -> Transform:
    source, dims, code, onesided = inputs(node)[:4]
    axis = _single_axis(node, source, dims)
    return Transform(node, source, axis, shape_of(source)[axis], CODES[code], bool(onesided))


def _of_complex(node: Node) -> Transform:
    source, dims, code = inputs(node)[:3]
    axis = _single_axis(node, source, dims)
    return Transform(node, source, axis, shape_of(source)[axis], CODES[code])


def _of_dims(node: Node, *, half: bool) -> Transform:
    source, (axis, points) = inputs(node)[0], _only_dim(node)
    points = shape_of(source)[axis] if points in (None, -1) else points
    return Transform(node, source, axis, points, MODES[arg(node, 3, "norm")], half)


def _only_dim(node: Node) -> tuple[int, Any]:
    """The dim of an op that may transform several ones, and its length there, if given."""
    source, lengths, dims = inputs(node)[0], arg(node, 1, "s"), arg(node, 2, "dim")
    if dims is None:  # the last ones that have a length, else all
        dims = [*range(-len(shape_of(source) if lengths is None else lengths), 0)]
    axis = _single_axis(node, source, dims)
    return axis, None if lengths is None else number_of(lengths[0])


FORWARD: dict[Any, Callable[[Node], Transform]] = {
    aten.fft_rfft.default: lambda node: _function(node, half=True),
    aten.fft_fft.default: lambda node: _function(node, half=False),
    aten._fft_r2c.default: _of_real,
    aten._fft_c2c.default: _of_complex,
    aten.fft_rfft2.default: lambda node: _of_dims(node, half=True),
    aten.fft_rfftn.default: lambda node: _of_dims(node, half=True),
    aten.fft_fft2.default: lambda node: _of_dims(node, half=False),
    aten.fft_fftn.default: lambda node: _of_dims(node, half=False),
}
"""Of a real tensor, or of one that was made complex."""


def _inverse_function(node: Node, *, gives_real: bool) -> Transform:
    source = inputs(node)[0]
    axis = normal_dim(arg(node, 2, "dim", -1), len(shape_of(source)))
    power = -MODES[arg(node, 3, "norm")]
    return Transform(node, source, axis, shape_of(node)[axis], power, gives_real=gives_real)


def _inverse_of_dims(node: Node, *, gives_real: bool) -> Transform:
    source, (axis, _) = inputs(node)[0], _only_dim(node)
    return Transform(node, source, axis, shape_of(node)[axis], -MODES[arg(node, 3, "norm")], gives_real=gives_real)


def _to_real(node: Node) -> Transform:
    source, dims, code = inputs(node)[:3]
    axis = _single_axis(node, source, dims)
    return Transform(node, source, axis, shape_of(node)[axis], 2 + CODES[code], gives_real=True)


def _to_complex(node: Node) -> Transform:
    source, dims, code = inputs(node)[:3]
    axis = _single_axis(node, source, dims)
    return Transform(node, source, axis, shape_of(node)[axis], 2 + CODES[code])


INVERSE: dict[Any, Callable[[Node], Transform]] = {
    aten.fft_irfft.default: lambda node: _inverse_function(node, gives_real=True),
    aten.fft_ifft.default: lambda node: _inverse_function(node, gives_real=False),
    aten._fft_c2r.default: _to_real,
    aten._fft_c2c.default: _to_complex,
    aten.fft_irfft2.default: lambda node: _inverse_of_dims(node, gives_real=True),
    aten.fft_irfftn.default: lambda node: _inverse_of_dims(node, gives_real=True),
    aten.fft_ifft2.default: lambda node: _inverse_of_dims(node, gives_real=False),
    aten.fft_ifftn.default: lambda node: _inverse_of_dims(node, gives_real=False),
}


def is_forward(node: Node) -> bool:
    """Whether a node is a forward transform."""
    return node.target in FORWARD and (node.target is not aten._fft_c2c.default or bool(inputs(node)[3]))


def is_inverse(node: Node) -> bool:
    """Whether a node is an inverse transform."""
    return node.target in INVERSE and (node.target is not aten._fft_c2c.default or not inputs(node)[3])


def is_complex(node: Any) -> bool:
    """Whether a node is a complex tensor."""
    dtype = dtype_of(node) if isinstance(node, Node) else None
    return dtype is not None and dtype.is_complex
