"""Spellings folded before matching, so that the matcher sees fewer of them."""

from __future__ import annotations

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from monarch_compile.passes.graph import VIEW_OPS, arg, aten, dtype_of, inputs, mutated_inputs, shape_of

ALIASES: dict[OpOverload, OpOverload] = {
    aten.divide.Tensor: aten.div.Tensor,
    aten.divide.Scalar: aten.div.Scalar,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.true_divide.Scalar: aten.div.Scalar,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.multiply.Scalar: aten.mul.Scalar,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.special_softmax.default: aten.softmax.int,
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
}
"""In-place op -> its functional form, used where the written memory is private to the graph."""

FRESH_OPS = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.softmax.int,
        aten.linear.default,
        aten.logical_not.default,
    }
)
"""Ops that always return memory of their own."""


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
        if node.op != "call_function" or node.target is not aten.dropout.default:
            continue
        source = inputs(node)[0]
        if (arg(node, 2, "train") and arg(node, 1, "p") != 0) or not isinstance(source, Node):
            continue
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        changed += 1
    return changed


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


def functionalize_private_writes(gm: GraphModule) -> int:
    """Make an in-place op functional where only the graph can see the memory it writes.

    The written value must come from an op that owns its memory, through views that nothing else reads, and no other
    view of it may exist before the write; later readers of the old value are pointed at the new one. Anything else
    stays in place, and sites it touches are refused.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    changed = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in FUNCTIONAL:
            continue
        base = inputs(node)[0]
        if not _is_private(base, node, order) or dtype_of(base) != _promoted(node) or shape_of(base) != shape_of(node):
            continue
        node.target = FUNCTIONAL[node.target]
        later = [user for user in base.users if order[user] > order[node]]
        for user in later:
            user.replace_input_with(base, node)
        changed += 1
    return changed


def _is_private(base: object, write: Node, order: dict[Node, int]) -> bool:
    if not isinstance(base, Node):
        return False
    owner = base
    while owner.target in VIEW_OPS and isinstance(parent := inputs(owner)[0], Node) and len(parent.users) == 1:
        owner = parent
    if owner.op != "call_function" or not _owns_memory(owner):
        return False
    before = [user for user in base.users if order[user] < order[write]]
    return not any(user.target in VIEW_OPS or base in mutated_inputs(user) for user in before)


def _owns_memory(node: Node) -> bool:
    """Whether an op always returns memory of its own; einsum does where it multiplies two tensors."""
    return node.target in FRESH_OPS or (node.target is aten.einsum.default and len(inputs(node)[1]) == 2)


def _promoted(node: Node) -> torch.dtype | None:
    """The dtype the functional form would give; in-place ops keep the written tensor's."""
    base, other = inputs(node)[0], inputs(node)[1] if len(inputs(node)) > 1 else None
    if not isinstance(base, Node) or "masked_fill" in str(node.target) or other is None:
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
