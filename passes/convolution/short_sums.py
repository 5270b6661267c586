"""Short convolutions beside long ones become sums of products, which Inductor fuses with their neighbours.

PyTorch runs a depthwise convolution in a kernel of its own, after a copy of its input where that is transposed, and
what follows reads its result from memory again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from monarch_compile.decision import Change
from monarch_compile.passes.capture.enclosed import all_graphs, enclosing, place_of
from monarch_compile.passes.checks import CONTEXT, DEVICE, MUTATION, STRIDED, TRANSFORMED, first_refusal
from monarch_compile.passes.convolution.choose import FAMILY
from monarch_compile.passes.convolution.short import ShortConvolution, short_convolution
from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, normal_dim, shape_of, site_name, value_of
from monarch_compile.passes.memory import (
    is_written,
    must_be_kept,
    sharing_is_seen,
    sharing_leaves,
    storages_of,
    strides_are_seen,
)
from monarch_compile.passes.replacing import replace_by, with_strides_of
from monarch_compile.passes.state import State

DEVICES = frozenset({"cuda"})
"""Types of devices whose short convolutions become sums."""

WHOLE_CHECKS = (TRANSFORMED, DEVICE, STRIDED)
PART_CHECKS = (CONTEXT, MUTATION, STRIDED)
"""What may keep a convolution as it is, and what its parts from being computed where each is taken."""


@dataclass(frozen=True)
class Part:
    """Channels of a short convolution's result, from `start` to `stop`, as the graph takes them.

    output: the node that has them. views: nodes of one reader between, which crop the length.
    """

    short: ShortConvolution
    output: Node
    start: int
    stop: int
    views: tuple[Node, ...]

    @property
    def inside(self) -> tuple[Node, ...]:
        """What is replaced or looked through."""
        return (self.short.node, *self.views)

    @property
    def read(self) -> tuple[Node, ...]:
        """The tensors that the sum reads."""
        return self.short.read


def short_convolutions_to_sums(state: State) -> str:
    """The pass: rewrites the short convolutions of graphs in which a long one is lowered, unless the option is off."""
    lowers = any(choice.lowers for _, choice in state.of_family(FAMILY))
    changed = 0
    for gm in all_graphs(state.graph) if lowers and state.config.short_convolutions else ():
        # Each is read when those before it are rewritten: the results of these may be its operands.
        found = (short for node in [*gm.graph.nodes] if (short := short_convolution(node)) is not None)
        changes = [change for short in found if (change := _rewritten(gm, short)) is not None]
        if changes:
            gm.graph.eliminate_dead_code(must_be_kept)
        state.changes += changes
        changed += len(changes)
    return f"{changed} short convolutions made sums"


def _rewritten(gm: GraphModule, short: ShortConvolution) -> Change | None:
    """Replace a convolution, or the parts that are taken of it; None where it stays."""
    value = value_of(short.node)
    if value.device.type not in DEVICES or first_refusal(short, WHOLE_CHECKS) is not None:
        return None
    parts = _parts_of(short)
    if not parts and _is_seen(short.node, value.new_empty(value.shape)):
        return None
    change = Change(
        site_name(short.node) + place_of(gm.graph),
        f"a depthwise convolution of {short.taps} taps is a sum of {short.taps} products, which is fused with what is "
        "beside it",
    )
    for part in parts or (Part(short, short.node, 0, shape_of(short.node)[-2], ()),):
        _replace(gm.graph, part)
    return change


def _is_seen(output: Node, lowered: Tensor) -> bool:
    """Whether a program would notice that a result does not lie in memory as it did, but for the order of its dims."""
    same = str(lowered.stride()) == str(value_of(output).stride())
    return not same and (sharing_is_seen(output) or sharing_leaves(output))


def _replace(graph: Graph, part: Part) -> None:
    output = part.output
    with graph.inserting_before(output):
        result = _sum_of(graph, part)
        for view in part.views:
            target: Any = view.target
            result = graph.call_function(target, (result, *view.args[1:]), view.kwargs)
        # cuDNN's layout may follow its input's; long convolutions read the positions of a sequence side by side.
        result = graph.call_function(aten.clone.default, (result,), {"memory_format": torch.contiguous_format})
        lowered = value_of(output).new_empty(shape_of(output))
        if strides_are_seen(output, lowered, in_body=enclosing(graph) is not None):
            result = with_strides_of(graph, result, output)
    replace_by(output, result, result)


def _sum_of(graph: Graph, part: Part) -> Node:
    """The part's channels, of the whole length.

    Products and sums are float32 at least, and are rounded once. Zeros are put around the products: a weight that is
    not finite makes no NaN where the input has no points.
    """
    short = part.short
    rounded = dtype_of(short.node)
    wide = torch.float64 if rounded is torch.float64 else torch.float32

    def call(target: Any, *args: Any) -> Node:
        node: Node = graph.call_function(target, args)
        return node

    def taken(node: Node, dim: int) -> Node:
        """The part's channels of a tensor, as autocast rounds them, widened."""
        dtype = dtype_of(node)
        if (part.start, part.stop) != (0, shape_of(node)[dim]):
            node = call(aten.slice.Tensor, node, dim, part.start, part.stop)
        for wanted in (rounded, wide):
            node, dtype = (node if dtype is wanted else call(aten.to.dtype, node, wanted)), wanted
        return node

    x, weight = taken(short.x, len(shape_of(short.x)) - 2), taken(short.weight, 0)
    total: Node | None = None
    for tap in range(short.taps):
        product = call(aten.mul.Tensor, x, call(aten.select.int, weight, 2, tap))
        sides = short.padding(tap)
        shifted = product if sides == (0, 0) else call(aten.constant_pad_nd.default, product, [*sides])
        total = shifted if total is None else call(aten.add.Tensor, total, shifted)
    assert total is not None
    if short.bias is not None:
        total = call(aten.add.Tensor, total, call(aten.unsqueeze.default, taken(short.bias, 0), -1))
    return total if rounded is wide else call(aten.to.dtype, total, rounded)


# ---- channels that are taken apart -----------------------------------------------------------------------------------


def _parts_of(short: ShortConvolution) -> tuple[Part, ...]:
    """The channels that the graph takes of a result, such as gates; empty where it reads all of them together.

    Each is a sum of its own then, fused with its own readers, and nothing of the whole result is stored.
    """
    views: list[Node] = []
    node = short.node
    while len(node.users) == 1 and _keeps_channels(reader := next(iter(node.users))):
        node = reader
        views.append(node)
    taken = [tuple(_taken_by(short, reader, tuple(views))) for reader in node.users]
    found = tuple(part for parts in taken for part in parts)
    return found if all(taken) and _may_be_apart(short, found) else ()


def _keeps_channels(node: Node) -> bool:
    """Whether a node takes all channels of its input, and perhaps a part of its length."""
    if node.target is aten.alias.default:
        return True
    return node.target in (aten.slice.Tensor, aten.narrow.default) and _dim_of(node) == len(shape_of(node)) - 1


def _dim_of(node: Node) -> int:
    return normal_dim(arg(node, DIMS[node.target], "dim", 0), len(shape_of(inputs(node)[0])))


DIMS: dict[Any, int] = {
    aten.slice.Tensor: 1,
    aten.narrow.default: 1,
    aten.chunk.default: 2,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
}
"""Ops that take channels apart, and where their arguments have the dim."""


def _taken_by(short: ShortConvolution, reader: Node, views: tuple[Node, ...]) -> Iterator[Part]:
    """The parts that a reader takes along the dim of channels; none where it does something else."""
    if reader.target not in DIMS or _dim_of(reader) != len(shape_of(short.node)) - 2:
        return
    channels = len(shape_of(short.node)) - 2
    if reader.target in (aten.slice.Tensor, aten.narrow.default):
        start = arg(reader, 2, "start", 0) or 0
        if arg(reader, 4, "step", 1) == 1 and isinstance(start, int):
            start = start if start >= 0 else max(0, start + shape_of(short.node)[channels])
            yield Part(short, reader, start, start + shape_of(reader)[channels], views)
        return
    ends = [*accumulate((value.shape[channels] for value in value_of(reader)), initial=0)]
    if all(user.target is operator.getitem for user in reader.users):
        places = ((user, inputs(user)[1] % (len(ends) - 1)) for user in reader.users)
        yield from (Part(short, user, ends[place], ends[place + 1], views) for user, place in places)


def _may_be_apart(short: ShortConvolution, parts: Iterable[Part]) -> bool:
    """Whether nobody would notice that the parts no longer share memory, and each may be computed where it is taken."""
    own = storages_of(short.node)
    returned = next(iter(short.node.graph.find_nodes(op="output"))).all_input_nodes
    if is_written(short.node) or any(own & storages_of(node) for node in returned):
        return False
    channels = sum(part.stop - part.start for part in parts)
    if channels > shape_of(short.node)[-2]:  # some would be computed twice
        return False
    for part in parts:
        lowered = value_of(part.output).new_empty(shape_of(part.output))
        in_body = enclosing(short.node.graph) is not None
        if strides_are_seen(part.output, lowered, in_body=in_body) or _is_seen(part.output, lowered):
            return False
        if first_refusal(part, PART_CHECKS) is not None:
            return False
    return True
