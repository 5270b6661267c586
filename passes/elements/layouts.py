"""The layouts of a graph's tensors: what each of their dims is made of, found from the arguments down."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from monarch_compile.passes.capture.enclosed import place_of
from monarch_compile.passes.elements.axes import (
    Factor,
    Kind,
    Layout,
    agreed,
    axis_of,
    free,
    is_one,
    is_placed,
    other,
    same_size,
)
from monarch_compile.passes.elements.axis_images import IMAGE_PARTS, IMAGES
from monarch_compile.passes.elements.axis_moves import CATS, MOVES, PARTS, Rule
from monarch_compile.passes.elements.axis_sums import SUM_PARTS, SUMS, of_elementwise
from monarch_compile.passes.graph import FLOATS, ancestors_of, arg, aten, dtype_of, inputs, normal_dim, shape_of
from monarch_compile.passes.memory import Write, is_mutating, storages_of, writes_of
from monarch_compile.passes.weights import is_computed

RULES: dict[object, Rule] = {**MOVES, **SUMS, **IMAGES}
PART_RULES = {**PARTS, **SUM_PARTS, **IMAGE_PARTS}

MADE_BY_SHAPE = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_empty.default,
        aten.new_full.default,
        aten.empty.memory_format,
        aten.zeros.default,
    }
)
"""Ops that read nothing of a tensor but its shape."""
IMAGE_RANKS = (4, 5)


class Layouts:
    """Layouts of the nodes of graphs, each found once. Holds for as long as the graphs do not change."""

    def __init__(self) -> None:
        self._known: dict[Node, Layout] = {}
        self._computed: dict[Node, bool] = {}
        self._places: dict[Factor, tuple[Node, int]] = {}
        self._writes: dict[Graph, tuple[Write, ...]] = {}
        self._checked: set[Node] = set()

    def layout(self, node: Node) -> Layout:
        """What each dim of a tensor is made of."""
        for found in self._in_order(node):
            if found not in self._known:
                self._known[found] = self._find(found)
                self._note_places(found)
        return self._known[node]

    def place(self, factor: Factor) -> tuple[Node, int] | None:
        """A dim, of a node whose layout was found, that is this factor alone: where its size can be read."""
        return self._places.get(factor)

    def unknown(self, node: Node, why: str) -> Layout:
        """The layout of a tensor of which nothing is known but why."""
        return tuple(other(node, dim, size, why) for dim, size in enumerate(shape_of(node)))

    def _in_order(self, node: Node) -> Iterable[Node]:
        """What a layout follows from and is not known yet, each after what it follows from itself; `node` last."""
        order, pending = dict[Node, None](), [(node, False)]
        entered: set[Node] = set()
        while pending:
            current, is_done = pending.pop()
            if is_done:
                order[current] = None
            elif current not in entered and current not in self._known:
                entered.add(current)
                pending.append((current, True))
                pending += [(x, False) for x in self._above(current)]
        return order

    def _find(self, node: Node) -> Layout:
        if not self._is_computed(node):
            return tuple(free(node, dim, size) for dim, size in enumerate(shape_of(node)))
        if not shape_of(node):
            return ()
        if node.op == "placeholder":
            return _of_argument(node)
        fillings = self._fillings(node)
        if fillings:
            return _of_filled(self, node, fillings)
        found = self._by_rule(node)
        op = inputs(node)[0] if node.target is operator.getitem else node
        name = getattr(op.target, "_overloadpacket", op.target)
        return found if found is not None else self.unknown(node, f"{name} is not followed")

    def _by_rule(self, node: Node) -> Layout | None:
        rule = RULES.get(node.target)
        if rule is not None:
            return rule(self, node)
        if node.target is operator.getitem:
            op, place = inputs(node)[:2]
            part = PART_RULES.get(op.target)
            return part(self, op, place, node) if part is not None else None
        return of_elementwise(self, node) if is_pointwise(node) else None

    def _above(self, node: Node) -> list[Node]:
        """What a node's elements follow from: not what is read for its shape, but what is copied to it."""
        if node.target not in MADE_BY_SHAPE:
            return node.all_input_nodes
        return [inputs(write.node)[1] for write in self._fillings(node)]

    def _fillings(self, node: Node) -> list[Write]:
        """The copies that fill the memory that a node makes, where that is all that is written there."""
        own = storages_of(node) if node.target in MADE_BY_SHAPE else frozenset()
        found = [write for write in self._writes_of(node.graph) if write.storages & own]
        return found if all(_is_filling(write, node) for write in found) else []

    def _writes_of(self, graph: Graph) -> tuple[Write, ...]:
        if graph not in self._writes:
            self._writes[graph] = writes_of(graph)
        return self._writes[graph]

    def _is_computed(self, node: Node) -> bool:
        """Whether a node's elements follow from the arguments of a call; sizes alone are no elements."""
        if node not in self._computed:
            if node.op == "placeholder":
                self._computed[node] = is_computed(node)
            else:
                self._computed[node] = any(self._computed[x] for x in self._above(node))
        return self._computed[node]

    def _note_places(self, node: Node) -> None:
        for dim, axis in enumerate(self._known[node]):
            if axis.single is not None and axis.single.kind is Kind.SPATIAL:
                self._places.setdefault(axis.single, (node, dim))

    # ---- writes ------------------------------------------------------------------------------------------------------

    def harmful_write(self, node: Node) -> Node | None:
        """A write, to memory that a node is computed from, that may put elements elsewhere than layouts say."""
        writes = self._writes_of(node.graph)
        pending = [node] if writes else []
        while pending:
            current = pending.pop()
            if current in self._checked:
                continue
            own = storages_of(current)
            for write in (w for w in writes if w.storages & own):
                if not self._keeps_places(write):
                    return write.node
                pending += write.node.all_input_nodes
            self._checked.add(current)
            pending += self._placed_parts(current) or current.all_input_nodes
        return None

    def _placed_parts(self, node: Node) -> list[Node]:
        """What a cat takes its grid from, where tokens stand beside one: nothing is claimed of where these lie."""
        if node.target not in CATS:
            return []
        at, placed = normal_dim(arg(node, 1, "dim", 0), len(shape_of(node))), map(is_placed, self.layout(node))
        if [dim for dim, is_known in enumerate(placed) if is_known] != [at]:
            return []
        return [x for x in inputs(node)[0] if is_placed(self.layout(x)[at])]

    def _keeps_places(self, write: Write) -> bool:
        """Whether what is written, element by element, lies as what is written to does.

        Where nothing is known of a dim, nothing is lost, unless it is seen through a view: more may be known of what
        lies below.
        """
        node, base = write.node, write.base
        if not is_pointwise(node) or str(shape_of(node)) != str(shape_of(base)):
            return False
        whole = base
        while whole.target is aten.slice.Tensor or (is_mutating(whole) and is_pointwise(whole)):
            whole = inputs(whole)[0]
        is_view = any(storages_of(x) & storages_of(whole) for x in whole.all_input_nodes)
        before, below = self.layout(base), self.layout(whole)
        self.layout(node)
        after = of_elementwise(self, node)
        nothing = [not is_view and bool(x.factors) and all(f.kind is Kind.OTHER for f in x.factors) for x in below]
        return all(x == y or none for x, y, none in zip(before, after, nothing, strict=True))


def is_pointwise(node: Node) -> bool:
    """Whether each element of the output follows from those at its place in the inputs."""
    return isinstance(node.target, OpOverload) and (
        torch.Tag.pointwise in node.target.tags or node.target is aten.copy_.default
    )


def _of_argument(node: Node) -> Layout:
    """An argument of the graph: perhaps an image; a mask, or other whole numbers, says nothing of order."""
    sizes = [*enumerate(shape_of(node))]
    why = f"it comes from an argument of the graph{place_of(node.graph)}"
    if len(sizes) in IMAGE_RANKS and dtype_of(node) is not torch.bool:
        return tuple(axis_of(Factor((node, dim), Kind.IMAGE, size, dim)) for dim, size in sizes)
    says = other if dtype_of(node) in FLOATS else free
    return tuple(says(node, dim, size, why) for dim, size in sizes)


def _is_filling(write: Write, made: Node) -> bool:
    """Whether a write copies, to memory that a node makes or to a part of it, what does not follow from that memory."""
    base = write.base
    while base.target is aten.slice.Tensor:
        base = inputs(base)[0]
    if base is not made or write.node.target is not aten.copy_.default:
        return False
    source = inputs(write.node)[1]
    return made not in set(ancestors_of([source], lambda node: not node < made))


def _of_filled(seen: Layouts, node: Node, fillings: Sequence[Write]) -> Layout:
    """What is copied, along dims that every copy fills whole."""
    sizes, found = shape_of(node), []
    copies = [(shape_of(write.base), inputs(write.node)[1]) for write in fillings]
    for dim, size in enumerate(sizes):
        place, axes = dim - len(sizes), []
        for _, source in copies:
            own = len(shape_of(source)) + place
            if own >= 0 and not (is_one(shape_of(source)[own]) and not is_one(size)):
                axes.append(seen.layout(source)[own])
        is_whole = all(same_size(base[dim], size) for base, _ in copies)
        found.append(agreed(axes, node, dim, size) if is_whole else other(node, dim, size, "it is filled part by part"))
    return tuple(found)
