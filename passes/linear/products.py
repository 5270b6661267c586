"""Products of two tensors, however they are spelled, as sums over labelled dims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from monarch_compile.passes.einsum import einsum_letters
from monarch_compile.passes.graph import arg, aten, inputs, normal_dim, shape_of

Labels = tuple[int | None, ...]
"""For each dim of a tensor the label that it has in a product; None: it has size 1 and is repeated."""


@dataclass(frozen=True)
class Product:
    """out[o] = sum over labels that are not in `out` of first * second.

    operands, labels: the two factors and what their dims are. out: labels of the result's dims. sizes: of each label.
    inside: the nodes that compute it, `node` last.
    """

    node: Node
    operands: tuple[Node, Node]
    labels: tuple[Labels, Labels]
    out: tuple[int, ...]
    sizes: tuple[Any, ...]
    inside: tuple[Node, ...]

    @property
    def is_elementwise(self) -> bool:
        """Whether it is spelled as an elementwise product and a sum."""
        return len(self.inside) > 1

    def roles(self, weight: int) -> Roles | None:
        """What the labels are where the operand `weight` is the weight; None where one is summed over alone."""
        own, other = ({x for x in self.labels[place] if x is not None} for place in (weight, 1 - weight))
        out = {*self.out}
        if (own ^ other) - out:
            return None
        listed = [x for x in self.labels[weight] if x is not None]
        both = {x for x in own & other if not _is_one(self.sizes[x])}  # a token alone may look like a block
        return Roles(
            self,
            weight,
            batch=tuple(x for x in self.out if x in both),
            columns=tuple(x for x in self.out if x in own - other),
            tokens=tuple(x for x in self.out if x in other - both),
            sums=tuple(x for x in listed if x in other and x not in out),
        )


@dataclass(frozen=True)
class Roles:
    """Labels of a product of a weight with something else.

    batch: of both operands and the result: blocks of a block-diagonal matrix. columns: of the weight and the result.
    tokens: of the other operand and the result. sums: what is summed over.
    """

    product: Product
    weight: int
    batch: tuple[int, ...]
    columns: tuple[int, ...]
    tokens: tuple[int, ...]
    sums: tuple[int, ...]

    @property
    def weight_node(self) -> Node:
        return self.product.operands[self.weight]

    @property
    def other_node(self) -> Node:
        return self.product.operands[1 - self.weight]

    @property
    def other_labels(self) -> Labels:
        return self.product.labels[1 - self.weight]

    @property
    def weight_labels(self) -> Labels:
        return self.product.labels[self.weight]

    def sizes(self, labels: Sequence[int]) -> list[Any]:
        """Of some labels."""
        return [self.product.sizes[label] for label in labels]


def product_of(node: Node) -> Product | None:
    """A node as a product of two tensors; None where it is none, or of a kind that is not read."""
    reader = PRODUCTS.get(node.target) if node.op == "call_function" else None
    return None if reader is None else reader(node)


def _made(node: Node, operands: Sequence[Node], labels: Sequence[Sequence[int]], out: Sequence[int],
          inside: tuple[Node, ...]) -> Product:  # fmt: skip
    """The product of some labels; dims of size 1 where the other operand has more are repeated.

    Sizes of one label are equal, or the node could not have been traced: of a number and a symbol, the number is taken.
    """
    sizes: dict[int, Any] = {}
    for operand, own in zip(operands, labels, strict=True):
        for label, size in zip(own, shape_of(operand), strict=True):
            if label not in sizes or _is_one(sizes[label]) or (isinstance(size, int) and not _is_one(size)):
                sizes[label] = size
    found: list[Labels] = []
    for operand, own in zip(operands, labels, strict=True):
        pairs = zip(own, shape_of(operand), strict=True)
        found.append(tuple(None if _is_one(size) and not _is_one(sizes[label]) else label for label, size in pairs))
    listed = tuple(sizes[label] for label in range(len(sizes)))
    return Product(node, (operands[0], operands[1]), (found[0], found[1]), tuple(out), listed, inside)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def batched(node: Node, x: Node, y: Node) -> Product:
    """A node as the product of x (b, n, m) with y (b, m, p)."""
    return _made(node, (x, y), ((0, 1, 2), (0, 2, 3)), (0, 1, 3), (node,))


def _bmm(node: Node) -> Product | None:
    return batched(node, *inputs(node)[:2])


def _matmul(node: Node) -> Product | None:
    x, y = inputs(node)[:2]
    ranks = [len(shape_of(x)), len(shape_of(y))]
    if min(ranks) < 2:
        return None
    batch = max(ranks) - 2
    row, term, column = batch, batch + 1, batch + 2
    lead = [[*range(batch - (rank - 2), batch)] for rank in ranks]
    return _made(node, (x, y), ((*lead[0], row, term), (*lead[1], term, column)), (*range(batch), row, column), (node,))


def _einsum(node: Node) -> Product | None:
    named, out = einsum_letters(node)
    if len(named) != 2:
        return None
    letters = list(dict.fromkeys("".join(term for _, term in named)))
    if any(letter not in letters for letter in out) or len({*out}) != len(out):
        return None
    labels = [[letters.index(letter) for letter in term] for _, term in named]
    return _made(node, [n for n, _ in named], labels, [letters.index(letter) for letter in out], (node,))


def _sum(node: Node) -> Product | None:
    """The sum, over some dims, of two tensors multiplied element by element."""
    product, dims = inputs(node)[:2]
    if product.target is not aten.mul.Tensor or arg(node, 2, "keepdim", False) or node.kwargs.get("dtype") is not None:
        return None
    operands = inputs(product)
    if len(operands) != 2 or not all(isinstance(x, Node) for x in operands) or not dims:
        return None
    rank = len(shape_of(product))
    summed = {normal_dim(dim, rank) for dim in dims}
    labels = [[*range(rank - len(shape_of(x)), rank)] for x in operands]
    if {*labels[0], *labels[1]} != {*range(rank)}:
        return None
    return _made(node, operands, labels, [dim for dim in range(rank) if dim not in summed], (product, node))


PRODUCTS: dict[Any, Callable[[Node], Product | None]] = {
    aten.bmm.default: _bmm,
    aten.matmul.default: _matmul,
    aten.einsum.default: _einsum,
    aten.sum.dim_IntList: _sum,
}
