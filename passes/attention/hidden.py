"""Attention inside one op: fused layers, kernels called by their own names, a user's own operators.

None of it is looked into, and none of it is passed over in silence.
"""

from __future__ import annotations

import re

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from monarch_compile.attention.op import ATTENTION_BACKWARD_OP, ATTENTION_OP, ATTENTION_WITH_LSE_OP
from monarch_compile.passes.graph import FLOATS, aten, value_of
from monarch_compile.passes.memory import is_mutating
from monarch_compile.refusal import Refusal

LAYERS = frozenset({aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default})
"""torch.nn's inference fast paths."""

OURS = frozenset({ATTENTION_OP, ATTENTION_WITH_LSE_OP, ATTENTION_BACKWARD_OP})
SEEN = frozenset({aten.scaled_dot_product_attention.default, *OURS})
"""Attention that is no secret: what is matched, and what it is lowered to."""

NAME = re.compile(r"attention|attn|sdpa")
"""What the name of an op that computes attention has in it."""

PACKED = re.compile(r"qkv|kv_?packed")
"""What is in the name of an op, or of its arguments, that takes queries, keys and values as one tensor."""


def hidden_attention(node: Node) -> Refusal | None:
    """Why an op's attention stays exact; None for an op that computes none, as far as its name and inputs tell."""
    target = node.target
    if target in LAYERS:
        return Refusal("fused_layer", f"{target} hides its attention inside one op", node)
    if target in SEEN or not _computes_attention(node):
        return None
    if not isinstance(target, OpOverload):
        return Refusal("tensor_subclass", "it is called on a tensor subclass that answers calls by itself", node)
    if target.namespace == "aten":
        why = f"{target} is called by its own name"
        return Refusal("attention_kernel", why, node)
    return Refusal("custom_op", f"{target} is an operator of its own, whose attention cannot be seen", node)


def _computes_attention(node: Node) -> bool:
    """Whether an op is named after attention, and makes a tensor of at least three.

    Three, since much that serves attention is named after it: masks, biases, rotations. An op that takes queries, keys
    and values as one tensor says so.
    """
    schema = getattr(node.target, "_schema", None)
    name = str(getattr(node.target, "__name__", "") if schema is None else schema.name).lower()
    if not NAME.search(name):
        return False
    arguments = () if schema is None else schema.arguments
    given = [
        n for n in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(n, Node) and _is_operand(value_of(n))
    ]
    is_packed = any(PACKED.search(text.lower()) for text in (name, *(a.name for a in arguments)))
    makes = is_mutating(node) or any(map(_is_operand, pytree.tree_leaves(value_of(node))))
    return makes and len(given) >= (1 if is_packed else 3)


def _is_operand(value: object) -> bool:
    """Whether a value may be queries, keys or values, or what attention makes of them."""
    return isinstance(value, torch.Tensor) and value.dtype in FLOATS and value.dim() >= 3
