"""Who shares memory with whom, and who writes it: read off the fake tensors that the graph was traced with.

Their storages are shared exactly as eager execution shares memory, whatever the op that made a view is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.graph import (
    arg,
    aten,
    inputs,
    modules_of,
    placeholders,
    shape_of,
    switches_mode,
    value_of,
    values_from,
)

WRITES_NOTHING = frozenset({aten.detach_.default})
"""Ops whose schema claims a write although no element and no shape changes."""
MUTATING_HOPS = frozenset({"triton_kernel_wrapper_mutation"})
"""Higher-order ops (they have no schema) that write to the tensors they are given."""


def is_mutating(node: Node) -> bool:
    """Whether an op writes to one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        named = getattr(node.target, "__name__", "") in MUTATING_HOPS
        return named or any(map(writes_to_inputs, modules_of(node).values()))
    return bool(schema.is_mutable) and node.target not in WRITES_NOTHING


def writes_to_inputs(body: GraphModule) -> bool:
    """Whether the body of a higher-order op, or a body in it, writes to what it is given."""
    given = {storage for node in placeholders(body) for storage in storages_of(node)}
    return any(given & write.storages for write in writes_of(body.graph))


def must_be_kept(node: Node) -> bool:
    """What dead-code elimination must keep: FX itself overlooks mode switches and the higher-order ops that write."""
    return bool(node.is_impure()) or switches_mode(node) or is_mutating(node)


def mutated_inputs(node: Node) -> list[Node]:
    """The nodes whose memory an op writes."""
    if not is_mutating(node):
        return []
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return list(node.all_input_nodes)
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = arg(node, index, argument.name)
            found += [n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, Node)]
    return found


def storages_of(node: Node) -> frozenset[int]:
    """Identities of the memory that a node's tensors lie in."""
    value = value_of(node)
    values = value if isinstance(value, (list, tuple)) else [value]
    return frozenset(inner.untyped_storage()._cdata for x in values for inner in _inner_tensors(x))


def _inner_tensors(x: object) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a tensor's elements: a wrapper subclass has no memory of its own."""
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            yield from _inner_tensors(getattr(x, name))
    elif isinstance(x, torch.Tensor):  # a subclass may hold other things, such as a DTensor's mesh
        yield x


def is_written(node: Node) -> bool:
    """Whether anything in the graph writes to a node's memory."""
    own = storages_of(node)
    return any(own & storages_of(base) for n in node.graph.nodes if is_mutating(n) for base in mutated_inputs(n))


@dataclass(frozen=True)
class Write:
    """`node`, the `place`-th of its graph, writes to `base`, which lies in `storages`."""

    place: int
    node: Node
    base: Node
    storages: frozenset[int]


def writes_of(graph: Graph) -> tuple[Write, ...]:
    """Every write of a graph, in order."""
    nodes = enumerate(graph.nodes)
    return tuple(Write(i, n, base, storages_of(base)) for i, n in nodes for base in mutated_inputs(n))


# ---- does anyone see how the result of a site lies in memory? --------------------------------------------------------

SETS_STRIDES = frozenset(
    {
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.einsum.default,
        aten.layer_norm.default,
    }
)
"""Ops whose output lies in memory in the same way however their inputs lie, `sets_strides` permitting."""
GIVES_STRIDES = frozenset({aten.as_strided.default, aten.as_strided_.default})
"""Ops that read a tensor by strides of their own."""
NEEDS_STRIDES = frozenset({aten.view_as.default, aten.view.dtype})
"""Ops that fail on some strides."""
MAY_COPY = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.contiguous.default,
        aten.flatten.using_ints,
        aten.ravel.default,
        aten.reshape_as.default,
    }
)
"""Ops whose output shares its input's memory or not, depending on strides."""


def sets_strides(node: Node) -> bool:
    """Whether an op's output lies in memory in the same way however its inputs lie."""
    if node.target is aten.einsum.default:  # an elementwise product where nothing is summed over by both operands
        named, out = einsum_letters(node)
        return len(named) == 2 and any(map(_is_many, _sums_of(named, out)))
    return node.target in SETS_STRIDES


def _sums_of(named: Sequence[tuple[Node, str]], out: str) -> Iterator[tuple[object, object]]:
    """The two sizes of each letter that an einsum of two operands sums over as a product of matrices."""
    (one, first), (other, second) = named
    for letter in {*first} & {*second} - {*out}:
        yield shape_of(one)[first.index(letter)], shape_of(other)[second.index(letter)]


def _is_many(sizes: Iterable[object]) -> bool:
    return not any(isinstance(size, int) and size == 1 for size in sizes)


def strided_reader(output: Node) -> Node | None:
    """An op that reads `output`, or what inherits its strides, by strides of its own."""
    return next((n for n in _downstream(output) if n.target in GIVES_STRIDES), None)


def strides_are_seen(output: Node, lowered: torch.Tensor, *, in_body: bool = False) -> bool:
    """Whether the graph would notice if `output` had the strides of `lowered`, a fake tensor.

    It does if an op needs its strides, if a write reaches memory that a view may or may not share, or if `output`, a
    view of it or what inherits its strides leaves the graph and may be viewed by eager code. What leaves the body of a
    higher-order op must have the strides that the op expects: those of the other branch, or of the carry that came in.
    """
    if _layout(lowered) == _layout(value_of(output)):
        return False
    reached = list(_downstream(output))
    if any(n.target in NEEDS_STRIDES for n in reached):
        return True
    returned = {*next(iter(output.graph.find_nodes(op="output"))).all_input_nodes}
    own = storages_of(output)
    if any(storages_of(n) & own for n in returned):
        return True
    left = returned.intersection(reached)
    if left and (in_body or _change_strides(left, output, reached, lowered)):
        return True
    return _writes_to_maybe_copies(reached)


def sharing_is_seen(output: Node) -> bool:
    """Whether a write reaches memory that a view of `output` may or may not share, depending on strides."""
    return _writes_to_maybe_copies([*_downstream(output)])


def sharing_leaves(output: Node) -> bool:
    """Whether two results of the graph lie apart that might be views of one tensor if `output` had no gaps."""
    joined: dict[int, int] = {}

    def family(storage: int) -> int:
        while storage in joined:
            storage = joined[storage]
        return storage

    for copy in (node for node in _downstream(output) if node.target in MAY_COPY):
        for own, source in product(storages_of(copy), storages_of(inputs(copy)[0])):
            if family(own) != family(source):
                joined[family(own)] = family(source)
    returned = next(iter(output.graph.find_nodes(op="output"))).all_input_nodes
    left = {storage for node in returned for storage in storages_of(node)}
    return len({family(storage) for storage in left}) < len(left)


def _writes_to_maybe_copies(reached: Sequence[Node]) -> bool:
    may_copy = {s for n in reached if n.target in MAY_COPY for m in (n, inputs(n)[0]) for s in storages_of(m)}
    return any(storages_of(base) & may_copy for n in reached for base in mutated_inputs(n))


def _change_strides(left: Iterable[Node], output: Node, reached: Sequence[Node], lowered: torch.Tensor) -> bool:
    """Whether one of the nodes `left`, computed from `output` by nodes `reached`, would have other strides than it has.

    True, which costs a copy, where that cannot be told.
    """
    if any(map(is_mutating, reached)):
        return True
    after = [node for node in output.graph.nodes if node in {*reached} and node is not output]
    try:
        values = values_from({output: lowered}, after)
    except Exception:  # an op may refuse the layout, or be no function of tensors alone
        return True
    return any(_layout(values[node]) != _layout(value_of(node)) for node in left)


def _layout(value: object) -> list[str]:
    """Strides, except those of dims of size 1, to compare without guarding on symbolic ones."""
    if not isinstance(value, torch.Tensor):
        return []
    sizes = zip(value.shape, value.stride(), strict=True)
    return [str(stride) for size, stride in sizes if not (isinstance(size, int) and size == 1)]


def _downstream(node: Node) -> Iterator[Node]:
    """`node` and what is computed from it, up to ops that set strides of their own."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        yield current
        users = (u for u in current.users if u not in seen and not sets_strides(u) and u.op != "output")
        for user in users:
            seen.add(user)
            pending.append(user)
