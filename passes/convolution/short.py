"""Finds short convolutions: depthwise ones of a few taps, which models put before the gates of long ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.passes.graph import FLOATS, arg, aten, dtype_of, shape_of, value_of

MAX_TAPS = 4
"""Convolutions of more taps are left to PyTorch: the sum reads the input once for each."""


@dataclass(frozen=True)
class ShortConvolution:
    """A depthwise convolution of stride 1 over the last dim of x (..., channels, length).

    y[..., c, t] is bias[c] plus the sum over j < taps of weight[c, 0, j] x[..., c, t + j dilation - before], where x is
    zero outside of its length. before, after: zeros put before and after x; after may differ from before by one.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    taps: int
    dilation: int
    before: int
    after: int

    @property
    def output(self) -> Node:
        """The node to replace."""
        return self.node

    @property
    def inside(self) -> tuple[Node, ...]:
        """What is replaced."""
        return (self.node,)

    @property
    def read(self) -> tuple[Node, ...]:
        """The tensors that the sum reads."""
        return (self.x, self.weight) if self.bias is None else (self.x, self.weight, self.bias)

    def padding(self, tap: int) -> tuple[int, int]:
        """Zeros before and after the product of a tap with x, which put it at its place; below 0: points cut off."""
        shift = tap * self.dilation
        return self.before - shift, self.after - (self.taps - 1) * self.dilation + shift


def short_convolution(node: Node) -> ShortConvolution | None:
    """What a node convolves, if it is a depthwise convolution in one dim, of stride 1 and at most `MAX_TAPS` taps."""
    read = CONVOLUTIONS.get(node.target)
    found = None if read is None else read(node)
    return found if found is not None and _is_depthwise(found) and _is_plain(found) else None


def _is_depthwise(found: ShortConvolution) -> bool:
    """Whether each channel has one filter and gives one channel."""
    x, weight = shape_of(found.x), shape_of(found.weight)
    groups = arg(found.node, GROUPS[found.node.target], "groups", 1)
    sizes = (groups, *x[-2:-1], *weight[:2])
    return len(x) in (2, 3) and all(isinstance(n, int) for n in sizes) and sizes == (groups, groups, groups, 1)


def _is_plain(found: ShortConvolution) -> bool:
    """Whether all tensors are plain ones of real numbers, and no tap lies wholly beside the input."""
    if any(dtype_of(node) not in FLOATS for node in (found.node, *found.read)):
        return False
    if any(is_traceable_wrapper_subclass(value_of(node)) for node in found.read):
        return False
    cut = -min(side for tap in range(found.taps) for side in found.padding(tap))
    return bool(statically_known_true(shape_of(found.x)[-1] >= cut))


def _of(node: Node, stride: Any, padding: Any, dilation: Any) -> ShortConvolution | None:
    """One dim of stride 1, padded as a number for both sides or a word says."""
    x, weight, bias = (arg(node, place, name) for place, name in enumerate(("input", "weight", "bias")))
    taps, strides, dilations = shape_of(weight)[2:], _numbers(stride), _numbers(dilation)
    if len(taps) != 1 or strides != (1,) or len(dilations) != 1:
        return None
    if not isinstance(taps[0], int) or not 1 <= taps[0] <= MAX_TAPS or not isinstance(dilations[0], int):
        return None
    rest = dilations[0] * (taps[0] - 1)
    sides = (rest // 2, rest - rest // 2) if padding == "same" else 2 * (_numbers(0 if padding == "valid" else padding))
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return ShortConvolution(node, x, weight, bias, taps[0], dilations[0], *sides)


def _numbers(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _conv1d(node: Node) -> ShortConvolution | None:
    names = (("stride", 1), ("padding", 0), ("dilation", 1))
    return _of(node, *(arg(node, 3 + place, name, default) for place, (name, default) in enumerate(names)))


def _convolution(node: Node) -> ShortConvolution | None:
    stride, padding, dilation, transposed = (arg(node, 3 + i, name) for i, name in enumerate(CONVOLUTION_ARGUMENTS))
    return None if transposed else _of(node, stride, padding, dilation)


CONVOLUTION_ARGUMENTS = ("stride", "padding", "dilation", "transposed")
"""Of aten.convolution, after the tensors."""

CONVOLUTIONS: dict[Any, Callable[[Node], ShortConvolution | None]] = {
    aten.conv1d.default: _conv1d,
    aten.conv1d.padding: _conv1d,
    aten.convolution.default: _convolution,
}
"""Ops that may be short convolutions, and how each is read."""

GROUPS: dict[Any, int] = {aten.conv1d.default: 6, aten.conv1d.padding: 6, aten.convolution.default: 8}
"""The place of the number of groups among the arguments of each."""
