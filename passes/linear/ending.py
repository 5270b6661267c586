"""What follows the last product: moves to (tokens, out_features), a bias, an activation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from monarch_compile.linear.ir import BLOCKED, INTERLEAVED
from monarch_compile.passes.graph import arg, aten, dtype_of, inputs, shape_of, value_of
from monarch_compile.passes.linear.elements import MOVES, Elements, evaluated, grid_of
from monarch_compile.passes.linear.orders import is_the_same_order, symbols_of
from monarch_compile.passes.linear.products import Roles
from monarch_compile.passes.linear.region import Ending


def ending_of(
    last: Roles, symbols: Sequence[Any], tokens: Sequence[Any], token_sizes: Sequence[Any], taken: frozenset[Node]
) -> Ending | None:
    """The furthest node that the operator can give; None where tokens come out in an order that no permutation gives.

    symbols: of the last product's labels. tokens: indices into the input's token dims, in these symbols; token_sizes:
    of these dims. taken: nodes that belong to other regions.
    """
    best = _as_product(last, symbols, tokens, token_sizes)
    elements, node, passed = Elements(), last.product.node, list[Node]()
    while (user := _only_user(node)) is not None and user not in taken:
        if user.target not in MOVES or inputs(user)[0] is not node or not _is_alike(user, node):
            break
        passed.append(node)
        node = user
        found = _as_features(node, elements, last, symbols, tokens, token_sizes)
        if found is not None:
            best = Ending(node, *found, inside=tuple(passed))
    return best if best is None or best.order is None else _with_activation(_with_bias(best, taken), taken)


def _is_alike(one: Node, other: Node) -> bool:
    """Whether two tensors are of one dtype and on one device."""
    return dtype_of(one) is dtype_of(other) and value_of(one).device == value_of(other).device


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _as_product(
    last: Roles, symbols: Sequence[Any], tokens: Sequence[Any], token_sizes: Sequence[Any]
) -> Ending | None:
    own = [symbols[label] for label in last.tokens]
    known, order = _token_order(tokens, token_sizes, own, last.sizes(last.tokens))
    return Ending(last.product.node, None, order) if known else None


def _as_features(
    node: Node,
    elements: Elements,
    last: Roles,
    symbols: Sequence[Any],
    tokens: Sequence[Any],
    token_sizes: Sequence[Any],
) -> tuple[str, tuple[int, ...] | None] | None:
    """The order of features in the last dim of a node, and of tokens in the others."""
    shape = shape_of(node)
    out_features = math.prod(last.sizes((*last.batch, *last.columns)))
    if not shape or not isinstance(shape[-1], int) or shape[-1] != out_features:  # nothing symbolic is guarded on
        return None
    places = symbols_of("e", len(shape))
    read = elements.read(node, tuple(places))
    if read is None or read[0] is not last.product.node:
        return None
    at = dict(zip(last.product.out, read[1], strict=True))
    try:
        grid = grid_of(places[-1:], [out_features])
        block, row = (_counted(labels, at, last, grid) for labels in (last.batch, last.columns))
    except ValueError:
        return None
    number = np.arange(out_features)
    blocks, rows = (math.prod(last.sizes(labels)) for labels in (last.batch, last.columns))
    orders = {BLOCKED: (number // rows, number % rows), INTERLEAVED: (number % blocks, number // blocks)}
    order = next((name for name, own in orders.items() if (block == own[0]).all() and (row == own[1]).all()), None)
    if order is None:
        return None
    moved = {symbols[label]: at[label] for label in last.tokens}
    inner = [index.subs(moved, simultaneous=True) for index in tokens]
    if any(expr.has(places[-1]) for expr in inner):
        return None
    known, permutation = _token_order(inner, token_sizes, places[:-1], shape[:-1])
    return (order, permutation) if known else None


def _counted(labels: Sequence[int], at: dict[int, Any], last: Roles, grid: dict[Any, Any]) -> Any:
    total: Any = 0
    for label, size in zip(labels, last.sizes(labels), strict=True):
        total = total * size + evaluated(at[label], grid)
    return total


def _token_order(
    indices: Sequence[Any], sizes: Sequence[Any], symbols: Sequence[Any], own: Sequence[Any]
) -> tuple[bool, tuple[int, ...] | None]:
    """Whether the order of tokens is known; for each own dim, which of the input's it is; None: they are merged."""
    if len(indices) == len(symbols) and {*indices} == {*symbols}:
        return True, tuple([*indices].index(symbol) for symbol in symbols)
    return is_the_same_order(indices, sizes, symbols, own), None


def _with_bias(ending: Ending, taken: frozenset[Node]) -> Ending:
    node = ending.output
    user = _only_user(node)
    if user is None or user in taken or user.target is not aten.add.Tensor or user.kwargs.get("alpha", 1) != 1:
        return ending
    one, other = inputs(user)
    bias = other if one is node else one
    features = shape_of(node)[-1]
    if not isinstance(bias, Node) or dtype_of(bias) is not dtype_of(node) or dtype_of(user) is not dtype_of(node):
        return ending
    sizes = shape_of(bias)
    is_row = str(sizes[-1:]) == str((features,)) and all(isinstance(n, int) and n == 1 for n in sizes[:-1])
    if not is_row or len(sizes) > len(shape_of(node)):
        return ending
    inside = (*ending.inside, node)
    return Ending(user, ending.order, ending.tokens, inside, bias)


def _with_activation(ending: Ending, taken: frozenset[Node]) -> Ending:
    user = _only_user(ending.output)
    read = ACTIVATIONS.get(user.target) if user is not None and user not in taken else None
    name = read(user) if read is not None and user is not None else None
    if name is None or user is None:
        return ending
    inside = (*ending.inside, ending.output)
    return Ending(user, ending.order, ending.tokens, inside, ending.bias, name)


ACTIVATIONS: dict[Any, Callable[[Node], str | None]] = {
    aten.relu.default: lambda node: "relu",
    aten.silu.default: lambda node: "silu",
    aten.gelu.default: lambda node: {"none": "gelu", "tanh": "gelu_tanh"}.get(arg(node, 1, "approximate", "none")),
}
"""Names of activations that become part of the operator; None where an argument makes it another one."""
