"""Equal sites call one body, so that Inductor compiles what is behind the op once, not once a site."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from monarch_compile.passes.frontends import Frontend, frontends
from monarch_compile.passes.graph import ORIGIN, SITE_NAME, fake_value, inputs, values_from

BODY = "monarch_{}_{}"
"""Names of bodies: the family, and a number."""

Ops = Mapping[Any, Frontend]
"""The families that a graph may hold sites of, by their operators."""


def share_bodies(gm: GraphModule) -> int:
    """Replace calls of a family's op that compute the same by calls of one body; how many bodies there are.

    The same are the options and the tensors' sizes, strides, dtypes and devices. Sites on a GPU are left alone: there
    an op stands for kernels that are not Inductor's; so is a site without an equal, and one of symbolic sizes
    that its tensors' dims do not give (`_gives_symbols`). `gm` is changed in place.
    """
    share = _invoke_subgraph()
    fake_mode = detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes])
    if share is None or fake_mode is None:
        return 0
    ops = {frontend.op: frontend for frontend in frontends(gm)}
    found = [node for node in gm.graph.nodes if node.target in ops]
    sites = [n for n in found if fake_value(n, fake_mode).device.type == "cpu" and not _is_wrapped(n, ops, fake_mode)]
    if len(sites) < 2:
        return 0
    alike: dict[str, list[Node]] = defaultdict(list)
    restrided = _restrided(gm.graph, ops, fake_mode)
    for node in sites:
        given, options = _split(node, ops)
        tensors = [None if x is None else restrided.get(x, fake_value(x, fake_mode)) for x in given]
        if _gives_symbols(tensors) and not any(isinstance(x, Node) for x in pytree.tree_leaves(options)):
            alike[_key(node, tensors, options)].append(node)
    groups = [(key, nodes) for key, nodes in alike.items() if len(nodes) > 1]
    for number, (key, nodes) in enumerate(groups):
        name = BODY.format(ops[nodes[0].target].family, number)
        gm.add_submodule(name, _body(nodes[0], *_split(nodes[0], ops)))
        for node in nodes:
            _call(node, _split(node, ops)[0], share, name, key)
    if groups:
        gm.graph.lint()
        gm.recompile()
    return len(groups)


def _split(site: Node, ops: Ops) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """A site's tensors, some of which may be None, and its options."""
    given, count = inputs(site), ops[site.target].num_tensors
    return given[:count], given[count:]


def _invoke_subgraph() -> Any:
    """The higher-order op that calls a body, or None where torch has none."""
    return getattr(torch.ops.higher_order, "invoke_subgraph", None)


def _is_wrapped(node: Node, ops: Ops, fake_mode: FakeTensorMode) -> bool:
    """Whether a site is given tensors of a subclass: those have no rule for calls of bodies."""
    values = [fake_value(x, fake_mode) for x in _split(node, ops)[0] if x is not None]
    return any(map(is_traceable_wrapper_subclass, values))


def _strides(value: Any) -> list[str]:
    return [str(x.stride()) for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]


def _restrided(graph: Graph, ops: Ops, fake_mode: FakeTensorMode) -> dict[Node, Any]:
    """Fake values of the nodes whose strides lowering changed: results of sites, and what is computed from them.

    A later site may read them, and its body has to be traced for the strides that it is given.
    """
    changed = dict[Node, Any]()
    for node in graph.nodes:
        read = {x: changed[x] for x in node.all_input_nodes if x in changed}
        if node.target in ops:
            value: Any = ops[node.target].laid_out(fake_value(node, fake_mode))
        elif read and node.op == "call_function" and not isinstance(node.target, HigherOrderOperator):
            value = values_from(read, [node])[node]
        else:
            continue
        if _strides(value) != _strides(fake_value(node, fake_mode)):
            changed[node] = value
    return changed


def _gives_symbols(tensors: Sequence[Any]) -> bool:
    """Whether every symbol in the sizes and strides of a body's tensors is one of these: Inductor looks it up there."""
    numbers = [n for x in tensors if x is not None for n in (*x.shape, *x.stride()) if isinstance(n, torch.SymInt)]
    exprs = [n.node.expr for n in numbers]
    free = {symbol for expr in exprs for symbol in expr.free_symbols}
    return free <= set(exprs)


def _key(node: Node, tensors: Sequence[Any], options: tuple[Any, ...]) -> str:
    """All that the body of a site depends on: it also names the body in the keys of compile caches."""
    facts = [None if x is None else (tuple(x.shape), x.stride(), x.dtype, x.device) for x in tensors]
    return f"{node.target} {facts} {options}"


def _body(site: Node, given: tuple[Any, ...], options: tuple[Any, ...]) -> GraphModule:
    """The op with a site's options, as a graph of its tensors."""
    graph = Graph()
    tensors: list[Node | None] = []
    for place, tensor in enumerate(given):
        tensors.append(None if tensor is None else graph.placeholder(f"tensor_{place}"))
        if tensors[-1] is not None:
            tensors[-1].meta["val"] = tensor.meta["val"]
    op: Any = site.target
    graph.output((graph.call_function(op, (*tensors, *options)),))
    return GraphModule({}, graph)


def _call(site: Node, tensors: tuple[Any, ...], share: Any, name: str, key: str) -> None:
    """Put a call of the body `name` in the place of a site."""
    graph = site.graph
    with graph.inserting_before(site):
        body = graph.get_attr(name)
        call = graph.call_function(share, (body, key, *(x for x in tensors if x is not None)))
        result = graph.call_function(operator.getitem, (call, 0))
    for node in (call, result):
        node.meta = {key: site.meta[key] for key in (*ORIGIN, SITE_NAME) if key in site.meta}
    result.meta["val"] = site.meta["val"]
    site.replace_all_uses_with(result)
    graph.erase_node(site)
