"""What leads from weights to the tensors of a lowered site: found in its graph, and run again with other weights.

From each tensor the graph is followed up through ops that keep the features of a token together (views, norms, scales,
rotations) to a product with a parameter of the model. Whatever else is read on the way is a leaf.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg

from monarch_compile.distillation.unlearned import Unlearned
from monarch_compile.distillation.widened import HALF
from monarch_compile.passes.graph import aten, dtype_of, inputs
from monarch_compile.passes.views import CASTS, PARTS, TRANSPOSES, VIEWS

MOVES = frozenset(
    {
        *VIEWS,
        *CASTS,
        *TRANSPOSES,
        *PARTS,
        aten._unsafe_view.default,
        aten.alias.default,
        aten.chunk.default,
        aten.expand_as.default,
        aten.flatten.using_ints,
        aten.reshape_as.default,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dims,
        aten.tensor_split.indices,
        aten.tensor_split.sections,
        aten.unbind.int,
        aten.unflatten.int,
        aten.view_as.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
        operator.getitem,
    }
)
"""Ops that move, cast or take a part of their first input."""

CARRIERS = MOVES | {
    aten.add.Scalar,
    aten.add.Tensor,
    aten.cat.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.div.Scalar,
    aten.div.Tensor,
    aten.flip.default,
    aten.layer_norm.default,
    aten.linalg_vector_norm.default,
    aten.maximum.default,
    aten.mean.dim,
    aten.mul.Scalar,
    aten.mul.Tensor,
    aten.native_layer_norm.default,
    aten.neg.default,
    aten.norm.ScalarOpt_dim,
    aten.pad.default,
    aten.pow.Tensor_Scalar,
    aten.reciprocal.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.rms_norm.default,
    aten.roll.default,
    aten.rsqrt.default,
    aten.rsub.Scalar,
    aten.sqrt.default,
    aten.square.default,
    aten.stack.default,
    aten.sub.Scalar,
    aten.sub.Tensor,
    aten.sum.dim_IntList,
    aten.var.correction,
}
"""Ops that are looked through between a site and the product with its weight."""

SIDE_BY_SIDE = frozenset({aten.cat.default, aten.stack.default})
"""Ops that keep what they are given apart: the tokens of an image and of a text, or parts of the features."""

PRODUCTS: dict[object, tuple[tuple[int, ...], int | None]] = {
    aten.linear.default: ((1,), 2),
    aten.addmm.default: ((2, 1), 0),
    aten.mm.default: ((1, 0), None),
    aten.matmul.default: ((1, 0), None),
}
"""Products with a weight: the places where it may be given, and the place of the bias."""


@dataclass(frozen=True, eq=False)
class Feed:
    """What leads from weights to the tensors of one lowered site that learn.

    op: the site's operator. places: which of its arguments learn. weights: the nodes of the parameters, with these.
    path: the nodes to run again, in the order of the graph: views of the weights, products, and what follows these.
    leaves: what else the path reads. tokens: those of the leaves that are multiplied by a weight.
    """

    site: str
    op: Node
    places: tuple[int, ...]
    weights: Mapping[Node, nn.Parameter]
    path: tuple[Node, ...]
    leaves: tuple[Node, ...]
    tokens: tuple[Node, ...]

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The nodes of the arguments that learn, in the order of `places`."""
        return tuple(inputs(self.op)[place] for place in self.places)

    @property
    def is_rounded(self) -> bool:
        """Whether the model rounds to 16 bits anywhere on the path."""
        return any(dtype_of(node) in HALF for node in (*self.weights, *self.path))


@dataclass(frozen=True, eq=False)
class _Product:
    """`views` lead from the nodes of parameters to a product, which multiplies `tokens`."""

    weights: tuple[Node, ...]
    views: tuple[Node, ...]
    tokens: tuple[Node, ...]


def feed_of(
    site: str, op: Node, learned: Mapping[int, str], parameters: Mapping[Node, nn.Parameter]
) -> Feed | Unlearned:
    """What leads to the arguments of `op` at the places `learned`, which has a word for each of them.

    parameters: the model's own, by the nodes of the graph that stand for them.
    """
    walk = _Walk(parameters)
    for place, word in learned.items():
        target = inputs(op)[place]
        found = walk.products_above(target)
        if not found:
            stop = walk.stop_above(target)
            what = f"{stop.op} {stop.name}" if stop.op != "call_function" else f"{stop.target} ({stop.name})"
            return Unlearned("no_projection", f"no product with a weight leads to the {word}; {what} is in front")
        meeting = walk.meeting_above(target)
        if meeting is not None:
            names = ", ".join(sorted(node.name for node in walk.products_above(meeting)))
            why = f"several products with weights lead to the {word}: {names} meet in {meeting.target} ({meeting.name})"
            return Unlearned("several_projections", why)
    return walk.feed(site, op, tuple(learned))


class _Walk:
    """Looks for products with parameters above nodes; what was found is remembered."""

    def __init__(self, parameters: Mapping[Node, nn.Parameter]) -> None:
        self._parameters = parameters
        self._above: dict[Node, frozenset[Node]] = {}
        self._meetings: dict[Node, Node] = {}
        self._products: dict[Node, _Product] = {}

    def products_above(self, node: Node) -> frozenset[Node]:
        """The products that a node is made of, as far as `CARRIERS` lead; itself, if it is one."""
        if node not in self._above:
            product = self._product(node)
            if product is not None:
                self._products[node] = product
                found = frozenset({node})
            elif node.op == "call_function" and node.target in CARRIERS:
                found = self._joined(node)
            else:
                found = frozenset()
            self._above[node] = found
        return self._above[node]

    def _joined(self, node: Node) -> frozenset[Node]:
        """The products above a node's inputs; noted is where different ones are not only put side by side."""
        given = [found for found in map(self.products_above, node.all_input_nodes) if found]
        earlier = [self._meetings[x] for x in node.all_input_nodes if x in self._meetings]
        if earlier:
            self._meetings[node] = earlier[0]
        elif len({*given}) > 1 and node.target not in SIDE_BY_SIDE:
            self._meetings[node] = node
        return frozenset[Node]().union(*given)

    def meeting_above(self, node: Node) -> Node | None:
        """An op above a node, or itself, that mixes what different products give; None where there is none."""
        self.products_above(node)
        return self._meetings.get(node)

    def stop_above(self, node: Node) -> Node:
        """Where the way up from a node ends without a product, taking the first input of each op."""
        while node.op == "call_function" and node.target in CARRIERS and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def feed(self, site: str, op: Node, places: tuple[int, ...]) -> Feed:
        """The feed of an op whose places are known to have products above."""
        path: set[Node] = set()
        weights: dict[Node, nn.Parameter] = {}
        tokens: set[Node] = set()
        pending = [inputs(op)[place] for place in places]
        while pending:
            node = pending.pop()
            if node in path or not self.products_above(node):
                continue
            path.add(node)
            product = self._products.get(node)
            if product is None:
                pending += node.all_input_nodes
            else:
                path.update(product.views)
                weights |= {weight: self._parameters[weight] for weight in product.weights}
                tokens.update(product.tokens)
        ordered = tuple(node for node in op.graph.nodes if node in path)
        read = dict.fromkeys(x for node in ordered for x in node.all_input_nodes)
        leaves = tuple(node for node in read if node not in path and node not in weights)
        return Feed(site, op, places, weights, ordered, leaves, tuple(x for x in leaves if x in tokens))

    def _product(self, node: Node) -> _Product | None:
        if node.op != "call_function" or node.target not in PRODUCTS:
            return None
        weight_places, bias_place = PRODUCTS[node.target]
        args = inputs(node)
        for place in weight_places:
            weight = self._parameter_above(args[place])
            if weight is None or self._parameters[weight[0]].dim() < 2:
                continue
            bias = (
                self._parameter_above(args[bias_place]) if bias_place is not None and bias_place < len(args) else None
            )
            given = [weight] if bias is None else [weight, bias]
            tokens = tuple(x for i, x in enumerate(args) if isinstance(x, Node) and i not in (place, bias_place))
            views = tuple(view for _, between in given for view in between)
            return _Product(tuple(dict.fromkeys(head for head, _ in given)), views, tokens)
        return None

    def _parameter_above(self, node: Any) -> tuple[Node, tuple[Node, ...]] | None:
        """The parameter that a node is a view, a part or a cast of, and the nodes from there to it."""
        between = []
        while isinstance(node, Node) and node.op == "call_function" and node.target in MOVES:
            between.append(node)
            node = inputs(node)[0]
        return (node, tuple(between)) if isinstance(node, Node) and node in self._parameters else None


def other_uses(
    graph: Graph, feeds: Iterable[Feed], weights: Iterable[Node]
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """What a graph does with some weights beside what `feeds` (of the same graph) tell.

    Returns the paths of the feeds with all views of them and of the weights, in the order of the graph, and those of
    these nodes (or of the weights) that something else reads: what a feed has for a leaf does not learn for it.
    """
    feeds, weights = list(feeds), set(weights)
    given = {leaf for feed in feeds for leaf in feed.leaves}
    own = weights.union(*(feed.path for feed in feeds))
    for node in graph.nodes:
        if node.op == "call_function" and node.target in MOVES and inputs(node)[0] in own:
            own.add(node)
    sites = {feed.op: feed for feed in feeds}

    def is_foreign(user: Node, node: Node) -> bool:
        feed = sites.get(user)
        if feed is None:
            return user not in own
        return any(x is node for place, x in enumerate(inputs(user)) if place not in feed.places)

    ordered = [node for node in graph.nodes if node in own]
    read = tuple(node for node in ordered if node in given or any(is_foreign(user, node) for user in node.users))
    return tuple(node for node in ordered if node not in weights), read


def replay(path: Iterable[Node], values: Mapping[Node, Any]) -> dict[Node, Any]:
    """`values`, and those of the nodes of a path that follow from them. Nothing is rounded to 16 bits on the way."""
    found = dict(values)
    for node in path:
        target: Any = node.target
        args, kwargs = map_arg((node.args, node.kwargs), found.__getitem__)
        found[node] = target(*_wide(args), **_wide(kwargs))
    return found


def _wide(arguments: Any) -> Any:
    return map_aggregate(arguments, lambda x: torch.float32 if isinstance(x, torch.dtype) and x in HALF else x)
