"""Small questions asked of FX nodes by every pass."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.fx import GraphModule, Node

from monarch_compile.ir import Dim

aten = torch.ops.aten

VIEW_OPS = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.squeeze.default,
        aten.expand.default,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.mT.default,
        aten.adjoint.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.narrow.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.alias.default,
        aten.detach.default,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
        aten.contiguous.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.as_strided.default,
    }
)
"""Ops whose output may share memory with their first input (`contiguous` and `to` may return their input)."""


def inputs(node: Node) -> tuple[Any, ...]:
    """A node's positional arguments, untyped: which hold nodes is known from the op."""
    return node.args


def arg(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def value_of(node: Node) -> Any:
    """The fake value a node was traced with, or None."""
    return node.meta.get("val")


def shape_of(node: Node) -> tuple[Any, ...]:
    """Sizes (ints or SymInts); () when the node is no tensor."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def dtype_of(node: Node) -> torch.dtype | None:
    """The dtype of a tensor node."""
    value = value_of(node)
    return value.dtype if isinstance(value, torch.Tensor) else None


def dim_of(size: Any) -> Dim:
    """An IR dimension: an int, or the printed form of a symbolic size."""
    return size if isinstance(size, int) else str(size)


def normal_dim(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def is_mutating(node: Node) -> bool:
    """Whether an op writes to one of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def mutated_inputs(node: Node) -> list[Node]:
    """The nodes whose memory an op writes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = arg(node, index, argument.name)
            found += [n for n in (given if isinstance(given, (list, tuple)) else [given]) if isinstance(n, Node)]
    return found


def storage_root(node: Node) -> Node:
    """The node whose memory `node` may share, found through views and in-place ops."""
    while node.op == "call_function":
        if node.target in VIEW_OPS or is_mutating(node) or getattr(node.target, "__name__", "") == "getitem":
            parent = node.args[0]
            if not isinstance(parent, Node):
                break
            node = parent
        else:
            break
    return node


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')


def source_of(node: Node) -> str:
    """`file.py:12` of the innermost user frame, or ''."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def module_path(node: Node) -> str:
    """Dotted path of the innermost module that ran the node, or ''."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return ""
    path = str(entries[-1][0])
    path = re.sub(r"^L\['(\w+)'\]\.?", "", path)
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path).replace("._modules", "").strip(".")


def site_name(node: Node) -> str:
    """A person's name for a site: module path and source line."""
    path, source = module_path(node), source_of(node)
    if path and source:
        return f"{path} ({source})"
    return path or source or node.name


def placeholders(gm: GraphModule) -> list[Node]:
    """The graph's inputs, in order."""
    return list(gm.graph.find_nodes(op="placeholder"))
