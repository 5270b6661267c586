"""Small questions asked of FX nodes by every pass."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from monarch_compile.ir import Dim

aten = torch.ops.aten

SITE_NAME = "monarch_compile_site"
"""Where the node of a lowered site notes the name of its decision."""

WEIGHT = "monarch_compile_weight"
"""Where an input of an exported program's graph notes that it is a parameter, a buffer or a constant."""

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The dtypes attention is computed in; a cast to another (int, bool, float8) changes what is computed."""


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


def same_shape(x: Node, y: Node) -> bool:
    """Whether two nodes have the same sizes, asked without guarding on symbolic ones."""
    return str(shape_of(x)) == str(shape_of(y))


def ancestors_of(nodes: Iterable[Node], follows: Callable[[Node], bool] = lambda node: True) -> Iterator[Node]:
    """Some nodes, and all of their graph that they are computed from, as far as `follows` goes."""
    pending, seen = [*nodes], set()
    while pending:
        node = pending.pop()
        if node not in seen and follows(node):
            seen.add(node)
            pending += node.all_input_nodes
            yield node


def fake_value(node: Node, fake_mode: FakeTensorMode) -> Any:
    """A node's fake value, computed where lowering made the node."""
    if "val" not in node.meta:
        target: Any = node.target
        args: Any = map_arg(node.args, lambda n: fake_value(n, fake_mode))
        kwargs: Any = map_arg(node.kwargs, lambda n: fake_value(n, fake_mode))
        with fake_mode, enable_python_dispatcher():  # without it some ops refuse symbolic sizes
            node.meta["val"] = target(*args, **kwargs)
    return node.meta["val"]


def values_from(values: Mapping[Node, Any], after: Iterable[Node]) -> dict[Node, Any]:
    """`values`, fake, and those of the nodes `after`, in their order, computed from them instead of what was traced.

    Nothing is guarded on, and no node's own value changes.
    """
    found: dict[Node, Any] = dict(values)
    fake_mode = detect_fake_mode([*values.values()])
    assert fake_mode is not None
    shapes = fake_mode.shape_env
    with contextlib.nullcontext() if shapes is None else shapes.suppress_guards(), torch.no_grad():
        for node in after:
            target: Any = node.target
            args, kwargs = map_arg(
                (node.args, node.kwargs), lambda n: found[n] if n in found else fake_value(n, fake_mode)
            )
            with fake_mode, enable_python_dispatcher():
                found[node] = target(*args, **kwargs)
    return found


def call_like(like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
    """A new node where the graph inserts now: its fake value computed, its origin (source line, module) `like`'s."""
    node: Node = like.graph.call_function(target, args, kwargs or {})
    node.meta = {key: like.meta[key] for key in ORIGIN if key in like.meta}
    node.meta["val"] = target(*map_arg(args, value_of), **map_arg(kwargs or {}, value_of))
    return node


REGION = ("recompute", "ac_graph_id")
"""AOTAutograd's marks on the nodes of an activation checkpoint: whether to compute anew, and whose they are."""
ORIGIN = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "seq_nr", *REGION)
"""Metadata that says where a node comes from."""


def dim_of(size: Any) -> Dim:
    """An IR dimension: an int, or the printed form of a symbolic size."""
    return size if isinstance(size, int) else str(size)


def normal_dim(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


SWITCHES = ("set_grad_enabled", "_autocast", "inference_mode")
"""Parts of the names of the functions that switch grad mode and autocast."""


def switches_mode(node: Node) -> bool:
    """Whether a node turns grad mode or autocast on or off for those after it."""
    if node.op != "call_function" or isinstance(node.target, OpOverload):
        return False
    name = str(node.target)
    return any(part in name for part in SWITCHES)


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


def modules_of(node: Node) -> dict[str, GraphModule]:
    """The bodies of a higher-order op by their names, in its order; none for any other node."""
    if not isinstance(node.target, HigherOrderOperator):
        return {}
    names = [str(x.target) for x in node.args if isinstance(x, Node) and x.op == "get_attr"]
    found = {name: getattr(node.graph.owning_module, name, None) for name in names}
    return {name: body for name, body in found.items() if isinstance(body, GraphModule)}


def placeholders(gm: GraphModule) -> list[Node]:
    """The graph's inputs, in order."""
    return list(gm.graph.find_nodes(op="placeholder"))
