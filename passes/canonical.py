"""Spellings folded before matching, so that the matcher sees fewer of them."""

from __future__ import annotations

import itertools

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from monarch_compile.passes.constants import constant_of
from monarch_compile.passes.graph import FLOATS, arg, aten, dtype_of, inputs, same_shape, shape_of
from monarch_compile.passes.memory import must_be_kept, storages_of

ALIASES: dict[OpOverload, OpOverload] = {
    aten.divide.Tensor: aten.div.Tensor,
    aten.divide.Scalar: aten.div.Scalar,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.true_divide.Scalar: aten.div.Scalar,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.multiply.Scalar: aten.mul.Scalar,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.special_softmax.default: aten.softmax.int,
    aten.special_log_softmax.default: aten.log_softmax.int,
    aten.special_logsumexp.default: aten.logsumexp.default,
    aten.special_exp2.default: aten.exp2.default,
    aten.linalg_matmul.default: aten.matmul.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view.default: aten.reshape.default,
    aten.logical_and.default: aten.bitwise_and.Tensor,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
}
"""Op -> the spelling used from here on. `view` becomes `reshape`: a lowered site may have other strides than it had."""

FUNCTIONAL: dict[OpOverload, OpOverload] = {
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.masked_fill_.Tensor: aten.masked_fill.Tensor,
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.logical_not_.default: aten.logical_not.default,
    aten.exp_.default: aten.exp.default,
    aten.exp2_.default: aten.exp2.default,
    aten.neg_.default: aten.neg.default,
    aten.relu_.default: aten.relu.default,
    aten.silu_.default: aten.silu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.tanh_.default: aten.tanh.default,
    aten.index_put_.default: aten.index_put.default,
}
"""In-place op -> its functional form, used where the written memory is private to the graph."""


def fold_aliases(gm: GraphModule) -> int:
    """Rename ops to one spelling each; returns how many changed."""
    changed = 0
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in ALIASES:
            both_bool = dtype_of(node) is torch.bool and all(dtype_of(n) is torch.bool for n in node.all_input_nodes)
            if node.target is aten.logical_and.default and not both_bool:
                continue
            node.target = ALIASES[node.target]
            changed += 1
    return changed


def drop_inactive_dropout(gm: GraphModule) -> int:
    """Remove dropout that does nothing (eval, or p = 0)."""
    changed = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in DROPOUTS:
            continue
        source = inputs(node)[0]
        if (arg(node, 2, "train") and arg(node, 1, "p") != 0) or not isinstance(source, Node):
            continue
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        changed += 1
    return changed


DROPOUTS = frozenset({aten.dropout.default, aten.dropout_.default})
"""Dropout, also in place: where it does nothing, it writes nothing."""


def fill_by_shape(gm: GraphModule) -> int:
    """Give `zeros_like(x)` and its kind their shape outright, so that they no longer hold on to x."""
    changed = 0
    for node in list(gm.graph.nodes):
        shape = shape_of(node)
        if node.op != "call_function" or node.target not in LIKE_FILLS or not all(isinstance(n, int) for n in shape):
            continue
        fill = arg(node, 1, "fill_value") if LIKE_FILLS[node.target] is None else LIKE_FILLS[node.target]
        value = node.meta["val"]
        node.target, node.args = aten.full.default, (list(shape), fill)
        node.kwargs = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        changed += 1
    return changed


LIKE_FILLS: dict[object, int | None] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
}
"""Fills that take their shape from a tensor, and what they fill with (None: their second input)."""


def fold_puts(gm: GraphModule) -> int:
    """`scores[mask] = number`, the mask of the scores' own shape, is a masked fill."""
    changed = 0
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target is not aten.index_put.default or arg(node, 3, "accumulate", False):
            continue
        base, indices, value = inputs(node)[:3]
        single = isinstance(indices, (list, tuple)) and len(indices) == 1 and isinstance(indices[0], Node)
        if not single or dtype_of(indices[0]) != torch.bool or not same_shape(indices[0], base):
            continue
        number = constant_of(value)
        if number is not None and dtype_of(base) in FLOATS:
            node.target, node.args, node.kwargs = aten.masked_fill.Scalar, (base, indices[0], number), {}
            changed += 1
    return changed


def functionalize_private_writes(gm: GraphModule) -> int:
    """Make an in-place op functional where only the graph can see the memory it writes.

    The memory must have been made by an op of the graph, and be known at the write by one name alone (or by views
    that nothing else reads); later readers of the old value are pointed at the new one, which is dropped if there are
    none. Anything else stays in place, and sites it touches are refused.
    """
    names = _Names(gm)
    changed = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in FUNCTIONAL:
            continue
        base = inputs(node)[0]
        if not names.is_private(base, node) or dtype_of(base) != _promoted(node) or not same_shape(base, node):
            continue
        node.target = FUNCTIONAL[node.target]
        for user in [u for u in base.users if names.order[u] > names.order[node]]:
            user.replace_input_with(base, node)
        names.move(base, node)
        changed += 1
    if changed:
        gm.graph.eliminate_dead_code(must_be_kept)
    return changed


class _Names:
    """The nodes by which each piece of memory is known, in graph order."""

    def __init__(self, gm: GraphModule) -> None:
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self._sharing: dict[int, list[Node]] = {}
        for node in gm.graph.nodes:
            for storage in storages_of(node):
                self._sharing.setdefault(storage, []).append(node)

    def is_private(self, base: object, write: Node) -> bool:
        """Whether, when `write` runs, its memory is the graph's own and `base` the only name left for it."""
        if not isinstance(base, Node):
            return False
        before = [n for n in self._all(base) if self.order[n] < self.order[write]]
        if not before or before[-1] is not base or not all(_makes_memory(n) for n in before):
            return False
        return all(inputs(n)[:1] == (p,) and len(p.users) == 1 for p, n in itertools.pairwise(before))

    def move(self, base: Node, write: Node) -> None:
        """The functional write has memory of its own, which all later names are names of."""
        for storage in storages_of(base):
            self._sharing[storage] = [n for n in self._sharing[storage] if self.order[n] >= self.order[write]]

    def _all(self, base: Node) -> list[Node]:
        return [n for storage in storages_of(base) for n in self._sharing[storage]]


def _makes_memory(node: Node) -> bool:
    """An ATen op: its fake tensors share memory exactly where its real ones do."""
    return node.op == "call_function" and getattr(node.target, "namespace", None) == "aten"


def _promoted(node: Node) -> torch.dtype | None:
    """The dtype the functional form would give; in-place ops keep the written tensor's."""
    base, other = inputs(node)[0], inputs(node)[1] if len(inputs(node)) > 1 else None
    keeps_dtype = any(name in str(node.target) for name in ("masked_fill", "index_put"))
    if not isinstance(base, Node) or keeps_dtype or other is None:
        return dtype_of(base) if isinstance(base, Node) else None
    tensors = [n for n in (base, other) if isinstance(n, Node)]
    result: torch.dtype | None = torch.result_type(
        torch.empty(_ones_of_rank(tensors[0]), dtype=dtype_of(tensors[0]), device="meta"),
        torch.empty(_ones_of_rank(other), dtype=dtype_of(other), device="meta") if isinstance(other, Node) else other,
    )
    return result


def _ones_of_rank(node: Node) -> tuple[int, ...]:
    """A shape of ones with the node's rank: promotion treats 0-d tensors differently."""
    return (1,) * len(shape_of(node))
