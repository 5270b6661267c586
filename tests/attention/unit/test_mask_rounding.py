"""Masks are proved in numbers and computed in dtypes: a mask is followed only as far as both give the same elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.capture import run_passes
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from monarch_compile.passes.attention.masks import K, Q
from monarch_compile.passes.elements.holding import is_held, rounded
from monarch_compile.passes.elements.rules import Evaluator

OPTIONS = {"policy": "always", "causal": True, "block_size": 64, "window": 0, "chosen": 1024}
Mask = Callable[[], Tensor]

HALF, BRIEF, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LONG, INT, BYTE, OCTET = torch.int64, torch.int32, torch.uint8, torch.int8
N = 24


def places(count: int = N, dtype: torch.dtype = LONG) -> tuple[Tensor, Tensor]:
    """Of the queries, as a column, and of the keys."""
    return torch.arange(count, dtype=dtype)[:, None], torch.arange(count, dtype=dtype)


def ordered(of_query: Callable[[Tensor], Tensor], of_key: Callable[[Tensor], Tensor], count: int = N) -> Mask:
    def mask() -> Tensor:
        query, key = places(count)
        return of_query(query) >= of_key(key)

    return mask


def alike(change: Callable[[Tensor], Tensor], count: int = N) -> Mask:
    return ordered(change, change, count)


def unless(change: Callable[[Tensor], Tensor]) -> Mask:
    """What a change of 0 and 1, of which the later keys have 1, leaves 0."""

    def mask() -> Tensor:
        query, key = places()
        return ~change(query < key).bool()

    return mask


def filled(value: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda later: torch.zeros(N, N, dtype=dtype).masked_fill(later, value)


NO_TRIANGLES: dict[str, Mask] = {
    "places in bfloat16": lambda: torch.ge(*places(300, BRIEF)),
    "queries in int64, keys in bfloat16": lambda: places(300)[0] >= places(300, BRIEF)[1],
    "places in float16": lambda: torch.ge(*places(2100, HALF)),
    "places in int8": lambda: torch.ge(*places(200, OCTET)),
    "queries in uint8, keys in int64": lambda: places(300, BYTE)[0] >= places(300)[1],
    "queries cast to bfloat16": ordered(lambda q: q.to(BRIEF), lambda k: k, 300),
    "an offset beyond float32": alike(lambda x: x.float() + 1e8),
    "an offset at the edge of float32": alike(lambda x: x.float() + 2.0**24),
    "an offset beyond float64": alike(lambda x: x.double() + 1e17),
    "integers beyond float32": alike(lambda x: (x + 2**24).float()),
    "integers beyond float32 beside floats": ordered(lambda q: (q + 2**24).float(), lambda k: k.float() + 2**24),
    "beyond float32 and back": ordered(lambda q: (q + 2**25).float() - 2**25, lambda k: k),
    "a tenth added and taken away": ordered(lambda q: q.float() + 0.1 - 0.1, lambda k: k.float()),
    "divided and multiplied": ordered(lambda q: q.float() / 300 * 300, lambda k: k.float(), 300),
    "keys divided and multiplied": ordered(lambda q: q.float(), lambda k: k.float() / 300 * 300, 300),
    "several factors": ordered(lambda q: q.float() * 3 / 7 * 7 / 3, lambda k: k.float(), 600),
    "beyond int32": alike(lambda x: (x + 2**30 + 2**30 - 1).to(INT)),
    "a large sum less its query": lambda: (
        (((places()[0].float() + 2.0**30) - places()[0].float() - 2.0**30 == 0) & torch.ge(*places()))
        | (places()[1] == 0)
    ),
    "less than float16 holds": unless(filled(1e-9, HALF)),
    "less than float32 holds": unless(lambda later: torch.where(later, 1e-60, torch.zeros(N, N))),
    "less than a cast holds": unless(lambda later: filled(1e-60, DOUBLE)(later).float()),
    "a product of small numbers": unless(lambda later: later.float() * 1e-30 * 1e-30),
    "one beside -1e9": unless(lambda later: later.float() - 1e9 + 1e9),
    "one beside 1e8": unless(lambda later: later.float() + 1e8 - 1e8),
    "one beside 2**24": unless(lambda later: later.float() + 2.0**24 - 2.0**24),
    "one beside -1e4 in bfloat16": unless(lambda later: later.to(BRIEF) - 1e4 + 1e4),
    "wrapped in uint8": unless(lambda later: later.to(BYTE) * 128 * 2),
    "wrapped in int32": unless(lambda later: (later.long() * 2**32).to(INT)),
    "filled and wrapped": unless(lambda later: filled(2**32, LONG)(later).to(INT)),
    "wrapped in int8": unless(lambda later: (later.long() * 256).to(OCTET)),
    "cut to an integer": unless(lambda later: (later.float() * 0.5).long()),
    "summed by query and by key": unless(lambda later: later.long().cumsum(0).cumsum(1)),
    "summed by key and by query": unless(lambda later: later.long().cumsum(1).cumsum(0)),
}
"""Triangles in numbers. Each has other elements as it is computed, or, cast back, those of a triangle by chance."""

TRIANGLES: dict[str, Mask] = {
    "in float32": alike(lambda x: x.float()),
    "in int32": lambda: torch.ge(*places(N, INT)),
    "halves added": alike(lambda x: x.float() + 0.5),
    "halves taken away": ordered(lambda q: q.double() + 1.5 - 1.5, lambda k: k),
    "halved and doubled": alike(lambda x: x.float() / 2 * 2),
    "large integers": alike(lambda x: x + 2**30),
    "filled in float16": unless(filled(1e-3, HALF)),
    "products in bfloat16": unless(lambda later: (1 - (~later).to(BRIEF)) * -1e9),
    "products of -1e4 in bfloat16": unless(lambda later: (1 - (~later).to(BRIEF)) * -10000.0),
    "counted in int64": lambda: torch.ones(300, dtype=BYTE).cumsum(0)[:, None] > places(300)[1],
}


def outcome(mask: Mask) -> list[tuple[str, str]]:
    """The code of a site under the mask, and what the mask is read as.

    Its numbers are those of eager attention: every block is chosen.
    """
    count = mask().shape[-1]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, count, 2, generator=generator, dtype=DOUBLE) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask())

    found, (result,) = run_passes(attend, q, k, v, **OPTIONS)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-9, atol=1e-9)
    return [(decision.code, decision.mask) for decision in result.decisions]


@pytest.mark.parametrize("name", NO_TRIANGLES)
def test_what_the_dtype_does_not_hold_is_no_triangle(name: str) -> None:
    ((_, mask),) = outcome(NO_TRIANGLES[name])
    assert mask != "causal"


@pytest.mark.parametrize("name", TRIANGLES)
def test_what_the_dtype_holds_is_a_triangle(name: str) -> None:
    assert outcome(TRIANGLES[name]) == [("lowered", "causal")]


def holds(dtype: torch.dtype, value: float) -> bool:
    """Whether masked_fill takes the value for such a tensor."""
    return dtype.is_floating_point and value <= torch.finfo(dtype).max


NUMBERS = (0.0, 0.1, 0.5, 1.0, 3.0, 7.0, 256.0, 1e-9, 1e-30, 1e4, 1e9, 2.0**24, 2.0**31)
STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "add": lambda x, c: x + c,
    "take away": lambda x, c: x - c,
    "multiply": lambda x, c: x * c,
    "divide": lambda x, c: x / (c or 1.0),
    "negate": lambda x, c: -x,
    "fill": lambda x, c: x.masked_fill(places()[1] > 5, c) if holds(x.dtype, c) else x,
    "choose": lambda x, c: torch.where(places()[1] < 4, x, c),
    **{f"cast to {dtype}": lambda x, c, dtype=dtype: x.to(dtype) for dtype in (HALF, BRIEF, SINGLE, DOUBLE, INT, LONG)},
}
STARTS: dict[str, Callable[[], Tensor]] = {
    **{f"keys in {dtype}": lambda dtype=dtype: places(N, dtype)[1] for dtype in (LONG, SINGLE, BRIEF, OCTET)},
    "queries": lambda: places()[0],
    "distance": lambda: places()[0] - places()[1],
    "later": lambda: torch.lt(*places()).float(),
}
step = st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from(NUMBERS))
number = st.tuples(st.sampled_from(sorted(STARTS)), st.lists(step, max_size=4))


@settings(max_examples=60, deadline=None)
@given(one=number, other=number, relation=st.sampled_from([torch.ge, torch.gt, torch.eq, torch.ne]))
def test_elements_that_are_known_are_those_of_the_program(one: Any, other: Any, relation: Any) -> None:
    def made(given: Any) -> Tensor:
        x = STARTS[given[0]]()
        for name, value in given[1]:
            x = STEPS[name](x, value)
        return x

    def mask() -> Tensor:
        return relation(made(one), made(other)).expand(N, N)

    traced = make_fx(mask, pre_dispatch=True)()
    (node,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes
    element, elements = sympy.sympify(Evaluator().value(node, (Q, K))), mask()
    if element.has(AppliedUndef):
        return  # unknown, which is always sound
    for query, key in ((0, 0), (3, 5), (5, 3), (6, 5), (7, 7), (11, 4), (22, 23), (23, 1)):
        found = element.subs({Q: query, K: key})
        assert bool(found) == bool(elements[query, key]), (element, query, key)


@pytest.mark.parametrize(
    ("value", "dtype", "is_so"),
    [
        (sympy.Float(0.1), SINGLE, False),
        (sympy.Float(0.5), HALF, True),
        (sympy.Integer(257), BRIEF, False),
        (sympy.Integer(256), OCTET, False),
        (Q, BRIEF, False),
        (Q - K + sympy.Rational(1, 2), SINGLE, True),
        (Q + sympy.Rational(1, 4), SINGLE, False),
        (Q / 3, DOUBLE, False),
        (Q + 2**24, SINGLE, False),
        (Q + 2**24, DOUBLE, True),
        (Q * K, SINGLE, False),
        (Q * K, LONG, True),
        (Q + 2**31 - 1, INT, False),
        (sympy.floor(Q / 6), SINGLE, True),
        (Q**2, LONG, False),
    ],
)
def test_what_a_dtype_holds(value: Any, dtype: torch.dtype, is_so: bool) -> None:
    assert is_held(value, dtype) is is_so


def test_numbers_are_rounded_and_expressions_are_not() -> None:
    assert rounded(sympy.Float(1e-9), HALF) == 0
    assert rounded(sympy.Float(1e9), HALF) == sympy.oo
    assert rounded(sympy.Integer(300), BYTE) is None
    assert rounded(Q + 1, SINGLE) == Q + 1
    pieces = sympy.Piecewise((sympy.Integer(257), Q > K), (sympy.Integer(1), True))
    assert rounded(pieces, BRIEF) == sympy.Piecewise((sympy.Integer(256), Q > K), (sympy.Integer(1), True))
