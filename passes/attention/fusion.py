"""Exact sites that Inductor's own fusion of attention would misread are changed so that it leaves them alone.

Inductor replaces what looks like one of its patterns (torch/_inductor/fx_passes/fuse_attention.py) by fused attention,
and looks at ops alone: not at the dim of a softmax, the order of a permutation, the number that a mask is compared with
or that hidden scores are filled with, nor at whether a scale is a number. What is none of these is left to it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from monarch_compile.passes.attention.products import MIXED, SCALES, SCORES
from monarch_compile.passes.attention.scores import keeps_matrix, spans
from monarch_compile.passes.attention.softmaxes import Softmax
from monarch_compile.passes.constants import DROPPED, constant_of, held_by
from monarch_compile.passes.graph import (
    FLOATS,
    ancestors_of,
    aten,
    call_like,
    dtype_of,
    inputs,
    shape_of,
    value_of,
)
from monarch_compile.passes.memory import is_mutating, is_written
from monarch_compile.passes.views import CASTS, PARTS, TRANSPOSES, VIEWS, source_dims, swaps_matrix

STEPS = 12
"""No pattern has as many ops between a product and softmax."""

BY_HEADS = [0, 2, 1, 3]
"""The one permutation in the patterns, beside that of a matrix: (batch, seq_len, heads, dim) by heads."""


def may_be_misread(anchor: Node, softmax: Softmax | None) -> bool:
    """Whether Inductor's fusion may take the site of an anchor, the softmax if it is one, for what it is not."""
    if anchor.target is aten.scaled_dot_product_attention.default:
        return any(_is_turned(x, always=True) for x in inputs(anchor)[:3])
    if softmax is None or softmax.late is not None:  # no pattern normalises late
        return False
    is_bare = softmax.dim is None  # no softmax over the keys, though it may have every op of one
    return is_bare or _is_misread(softmax)


def keep_from_fusion(anchor: Node) -> None:
    """Put views that change nothing where the patterns have none: on the probabilities, or on the queries of SDPA.

    Of probabilities that are written in place no view is taken, since a write by strides through one is refused: their
    scores get the views.
    """
    is_written_later = is_written(anchor) and not is_mutating(anchor)
    if anchor.target is aten.scaled_dot_product_attention.default or is_written_later:
        _put_views(anchor.all_input_nodes[0], anchor, lambda user: user is anchor)
    else:
        _put_views(anchor, anchor.next, lambda user: True)


def _put_views(node: Node, before: Node, is_moved: Callable[[Node], bool]) -> None:
    with node.graph.inserting_before(before):
        wider = call_like(node, aten.unsqueeze.default, (node, 0))
        same = call_like(node, aten.squeeze.dim, (wider, 0))
    node.replace_all_uses_with(same, delete_user_cb=lambda user: user is not wider and is_moved(user))


@dataclass(frozen=True)
class Chain:
    """A softmax with the nodes that hold its scores, from the products on, and those that hold its probabilities."""

    softmax: Softmax
    scores: tuple[Node, ...]
    products: tuple[Node, ...]
    probs: tuple[Node, ...]
    mixes: tuple[Node, ...]


def _is_misread(softmax: Softmax) -> bool:
    scores, products = _walk([softmax.scores, *softmax.masks], lambda node: list(node.all_input_nodes), SCORES)
    probs, mixes = _walk([*softmax.node.users], lambda node: list(node.users), MIXED)
    chain = Chain(softmax, _leading_to(scores, products), products, probs, mixes)
    return any(misreads(chain) for misreads in MISREAD)


def _walk(
    found: list[Node], following: Callable[[Node], list[Node]], ends: Any
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """The nodes within reach, from those found first, and the products that they end in."""
    passed, ended = dict[Node, None](), dict[Node, None]()
    for _ in range(STEPS):
        found = [x for x in dict.fromkeys(found) if x.op == "call_function" and x not in passed]
        ended.update((x, None) for x in found if x.target in ends)
        found = [x for x in found if x.target not in ends]
        passed.update(dict.fromkeys(found))
        found = [x for at in found for x in following(at)]
    return tuple(passed), tuple(ended)


def _leading_to(nodes: tuple[Node, ...], products: tuple[Node, ...]) -> tuple[Node, ...]:
    """Of nodes above a softmax, those that a product leads to: the others are what masks and biases are made of."""
    led, before = {*products}, 0
    while len(led) > before:
        before = len(led)
        for node in reversed(nodes):  # the nearest to the softmax come first
            if not led.isdisjoint(node.all_input_nodes):
                led.add(node)
    return tuple(node for node in nodes if node in led)


# ---- what may be misread ---------------------------------------------------------------------------------------------


def _runs_elsewhere(chain: Chain) -> bool:
    return chain.softmax.dim != chain.softmax.rank - 1


def _is_scaled_by_tensor(chain: Chain) -> bool:
    """Whether a scale is known at run time only, or may be another for each head or feature."""
    scales = [x for node in chain.scores if node.target in SCALES for x in _others(node, chain)]
    divisors = [x for query in _queries(chain) for x in _divisors(query)]
    return any(isinstance(x, Node) and constant_of(x) is None for x in (*scales, *divisors))


def _is_divided_by_constant_tensor(chain: Chain) -> bool:
    """Whether SDPA would be handed a tensor for its scale, and refuse it; the patterns with where look for a number."""
    scores = [] if _is_filled_by_where(chain) else _divisors_of_scores(chain)
    divisors = (*scores, *(x for query in _queries(chain) for x in _divisors(query)))
    return any(isinstance(x, Node) for x in divisors) and not _patterns_fix_the_scale()


def _others(node: Node, chain: Chain) -> list[Any]:
    """What the scores meet in a node."""
    own = {*chain.scores, *chain.products}
    return [x for x in inputs(node) if not (isinstance(x, Node) and x in own)]


def _is_turned_oddly(chain: Chain) -> bool:
    """Whether operands, or keys as they are multiplied, are permuted in another way than a pattern's."""
    for product in chain.products:
        left, right = _factors(product)
        is_swapped = _is_transposed(right) and swaps_matrix(right)
        if _is_turned(left) or (_is_transposed(right) and not is_swapped):
            return True
        if is_swapped and _is_turned(inputs(right)[0]):
            return True
    return any(_is_turned(x) for mix in chain.mixes for x in _factors(mix)[1:])


def _factors(product: Node) -> tuple[Any, Any]:
    if product.target in (aten.matmul.default, aten.mm.default, aten.bmm.default):
        return inputs(product)[0], inputs(product)[1]
    return None, None


def _is_transposed(node: Any) -> bool:
    return isinstance(node, Node) and node.target in TRANSPOSES


def _is_turned(node: Any, *, always: bool = False) -> bool:
    """Whether a permutation that is not by heads gives an operand of four dims, which is copied to be multiplied.

    The patterns do not look at where an operand comes from if it is not copied (always: look at it all the same).
    """
    if not _is_transposed(node) or len(shape_of(node)) != len(BY_HEADS) or source_dims(node) == BY_HEADS:
        return False
    value = value_of(node)
    return always or str(value.stride(0)) != str(value.stride(1) * value.shape[1])


def _is_filled_oddly(chain: Chain) -> bool:
    """Whether a fill leaves what it hides to be seen, or hides by another mask than `(batch, seq_len) == 0`, by key."""
    for node in chain.scores:
        if node.target in FILLS:
            fill = constant_of(inputs(node)[2])
            if fill is None or fill > DROPPED:
                return True
            mask = inputs(node)[1]
            if "masked_fill" in str(node.target) and isinstance(mask, Node) and not _hides_zeros_of_keys(mask):
                return True
    return False


def _is_added_oddly(chain: Chain) -> bool:
    """Whether a mask is added times a number, which the patterns drop, or has one dim, which SDPA refuses."""
    if any(node.kwargs.get("alpha", 1) != 1 for node in chain.scores):
        return True
    masks = [x for node in chain.scores if node.target not in SCALES for x in _others(node, chain)]
    return any(isinstance(x, Node) and len(shape_of(x)) == 1 for x in masks)


def _is_shifted_by_key(chain: Chain) -> bool:
    """Whether what differs by key is subtracted: the patterns take a maximum over any dim for that of the rows."""
    subtracted = [inputs(node)[1] for node in chain.scores if node.target is aten.sub.Tensor]
    return any(isinstance(x, Node) and spans(x, 1) for x in subtracted)


FILLS = frozenset(
    {
        aten.masked_fill.Scalar,
        aten.masked_fill.Tensor,
        aten.where.self,
        aten.where.ScalarOther,
        aten.where.ScalarSelf,
        aten.where.Scalar,
    }
)


def _hides_zeros_of_keys(mask: Node) -> bool:
    """False where a mask is a comparison with a number, seen by key or not, that is not `== 0` seen by key."""
    shapes = [shape_of(mask)]
    while mask.target in VIEWS or mask.target is aten.expand_as.default:
        mask = inputs(mask)[0]
        shapes.append(shape_of(mask))
    if mask.target is not aten.eq.Scalar:
        return True
    by_key = all(len(shape) != 4 or str(shape[2]) == "1" for shape in shapes[1:-1])
    return inputs(mask)[1] == 0 and by_key


def _is_viewed_across(chain: Chain) -> bool:
    """Whether the scores or the probabilities are viewed in other matrices."""
    return any(node.target in VIEWS and not keeps_matrix(node) for node in (*chain.scores, *chain.probs))


def _changes_dtype(chain: Chain) -> bool:
    """Whether products differ in dtype, or a cast to a dtype that attention is not computed in lies between them."""
    between = {dtype_of(node) for node in (*chain.scores, *chain.probs)} - {None}  # None: sizes
    return len({dtype_of(node) for node in (*chain.products, *chain.mixes)}) > 1 or not between <= FLOATS


def _is_divided_by_another_number(chain: Chain) -> bool:
    """Whether older patterns may take a divisor for the sqrt(head_dim) that it is not."""
    return _may_be_rescaled(chain) and _patterns_fix_the_scale()  # last: it may import Inductor


def _may_be_rescaled(chain: Chain) -> bool:
    """Whether another divisor is where a pattern may fix it.

    That is on queries that are copied; or on scores, if these are filled by where (of the values' head_dim then), if
    they are cast and no more, as softmax casts those of 16 bits, and the queries copied, or if these are not copied and
    there is more, such as a mask.
    """
    queries = _queries(chain)
    head_dims = [shape_of(query)[-1] for query in queries]
    if any(_is_odd_divisor(x, head_dims) for query in queries for x in _divisors(query)):
        return True
    if _is_filled_by_where(chain):
        head_dims += [shape_of(mix)[-1] for mix in chain.mixes]
    if not any(_is_odd_divisor(x, head_dims) for x in _divisors_of_scores(chain)):
        return False
    changed = [node for node in chain.scores if node.target not in {*SCALES, *VIEWS, *CASTS}]
    dtypes = {dtype_of(x) for x in (chain.softmax.node, *chain.scores, *chain.products, *chain.mixes)} - {None}
    is_masked = any(node.target in FILLS or _adds_data(node, chain) for node in changed)
    copies = {_is_copied(node) for query in queries for node in _steps_to(query)}
    return (
        _is_filled_by_where(chain)
        or (dtypes not in ONE_DTYPE and not is_masked and copies != {False})
        or (bool(changed) and copies != {True})
    )


def _adds_data(node: Node, chain: Chain) -> bool:
    """Whether scores are added to what Inductor cannot fold to zeros, and drop."""
    return node.target is aten.add.Tensor and any(isinstance(x, Node) and _is_data(x) for x in _others(node, chain))


def _is_data(node: Node) -> bool:
    """Whether a tensor surely holds what is known at run time only."""
    return any(x.op == "placeholder" for x in ancestors_of([node], follows=_keeps_data))


def _keeps_data(node: Node) -> bool:
    return MAKER.match(str(node.target)) is None and not (node.target in SCALES and 0 in node.args)


MAKER = re.compile(r"aten\.(zeros|ones|full|fill|new_|empty|scalar_tensor)")
"""The names of ops whose output may be one number throughout, whatever its inputs are."""

ONE_DTYPE = ({torch.float32}, {torch.float64})
"""Of attention in which nothing is cast."""


def _queries(chain: Chain) -> list[Node]:
    return [query for query in (_factors(product)[0] for product in chain.products) if isinstance(query, Node)]


def _divisors_of_scores(chain: Chain) -> list[Any]:
    return [x for node in chain.scores if SCALES.get(node.target) for x in _others(node, chain)]


def _divisors(query: Node) -> list[Any]:
    """What queries are divided by, if a product may copy them: no pattern has that where it does not."""
    steps = _steps_to(query)
    if all(_is_copied(node) is False for node in steps):
        return []
    return [inputs(node)[1] for node in steps if SCALES.get(node.target)]


def _steps_to(query: Node) -> list[Node]:
    """The nodes that hold queries on their way to a product, back to where they were permuted or computed."""
    steps = [query]
    while steps[-1].target in {*SCALES, *VIEWS, *CASTS, *PARTS} and isinstance(inputs(steps[-1])[0], Node):
        steps.append(inputs(steps[-1])[0])
    return steps


def _is_copied(node: Node) -> bool | None:
    """Whether a product copies an operand to make one dim of its batch and its heads; None if that is not known."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() != len(BY_HEADS):
        return None
    batch, heads = value.shape[:2]
    if statically_known_true(batch == 1) or statically_known_true(heads == 1):
        return False
    whole = value.stride(1) * heads
    if statically_known_true(value.stride(0) == whole):
        return False
    return True if statically_known_true(value.stride(0) != whole) else None


def _is_filled_by_where(chain: Chain) -> bool:
    return any(node.target in FILLS and "where" in str(node.target) for node in chain.scores)


def _is_odd_divisor(divisor: Any, head_dims: list[Any]) -> bool:
    """Whether a divisor is not known to be the sqrt() of all the head_dims, up to its own rounding or float32's."""
    number = constant_of(divisor)
    if number is None or not all(isinstance(dim, int) for dim in head_dims):
        return True
    usual = [math.sqrt(dim) for dim in head_dims]
    if isinstance(divisor, Node):
        return any(number != held_by(x, dtype_of(divisor)) for x in usual)
    return not all(math.isclose(number, x, rel_tol=2.0**-24) for x in usual)


@cache
def _patterns_fix_the_scale() -> bool:
    """True of torch 2.11: a divisor in some of its patterns is any number, and sqrt(head_dim) in what replaces them."""
    from torch._inductor.fx_passes import fuse_attention

    pattern = getattr(fuse_attention, "_sfdp_pattern_5", None)
    return pattern is not None and "inv_scale" not in inspect.signature(pattern).parameters


MISREAD: tuple[Callable[[Chain], bool], ...] = (
    _runs_elsewhere,
    _is_scaled_by_tensor,
    _is_divided_by_constant_tensor,
    _is_turned_oddly,
    _is_filled_oddly,
    _is_added_oddly,
    _is_shifted_by_key,
    _is_viewed_across,
    _changes_dtype,
    _is_divided_by_another_number,
)
