"""Masks of values that only the data determines: whatever they are, what is proved of a mask holds."""

from __future__ import annotations

import math
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
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from monarch_compile.passes.attention.masks import K, Q
from monarch_compile.passes.elements.holding import is_held
from monarch_compile.passes.elements.rules import Evaluator

OPTIONS = {"policy": "always", "causal": True, "block_size": 64, "window": 0, "chosen": 1024}
Mask = Callable[[Tensor, Tensor], Tensor]
"""Of unknown integers and unknown floats, one for each key."""

HALF, BRIEF, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LONG, INT, BYTE = torch.int64, torch.int32, torch.uint8
N = 8
INTEGERS = torch.tensor([0, 2**63 - 1, -(2**63), 2**53 + 1, 2**31, 5, 2**62, -1])
FLOATS = torch.tensor([0.5, 0.0, math.nan, math.inf, -math.inf, 1e-310, 1e300, -1.0], dtype=DOUBLE)


def triangle() -> Tensor:
    return torch.arange(N)[:, None] >= torch.arange(N)


def later() -> Tensor:
    return torch.arange(N)[:, None] < torch.arange(N)


def first_is_set(integers: Tensor) -> Tensor:
    """A condition on one element, which is at no place of the scores."""
    return torch.where(integers[1:2].bool(), 1, 2) == 1


BY_KEY: dict[str, Mask] = {
    "one more": lambda u, f: (u + 1 > u)[None],
    "one more under a triangle": lambda u, f: triangle() & (u + 1 > u),
    "a magnitude": lambda u, f: (u.abs() >= 0)[None],
    "narrowed": lambda u, f: (u.int() == u)[None],
    "one more as floats": lambda u, f: (u.double() + 1 > u.double())[None],
    "one more than a float": lambda u, f: (u.double() < (u + 1).double())[None],
    "negated": lambda u, f: ((-u < 1) | (u < 0))[None],
    "negated under a triangle": lambda u, f: triangle() & ((-u > 0) | (u >= 0)),
    "twice": lambda u, f: triangle() & ((u * 2 > u) | (u <= 0)),
    "a condition on one element": lambda u, f: triangle() & first_is_set(u).long().bool(),
    "the same, added": lambda u, f: ((~first_is_set(u)).long().double() * -1e9).expand(N, N),
}
"""Masks that depend on the key alone, and perhaps a triangle: lowered, by what the data says."""


def outcome(mask: Mask) -> str:
    """The code of a site under the mask; every block is chosen, so that what is lowered is exact."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, N, 2, generator=generator, dtype=DOUBLE) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor, integers: Tensor, floats: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(integers, floats).expand(N, N))

    given = (q, k, v, INTEGERS, FLOATS)
    found, (result,) = run_passes(attend, *given, **OPTIONS)
    expected = attend(*given)
    seen = ~expected.isnan()  # a row that sees no key is 0 here and NaN there
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-9, atol=1e-9)
    return str(result.decisions[0].code)


@pytest.mark.parametrize("name", BY_KEY)
def test_masks_of_any_values_are_those_of_the_program(name: str) -> None:
    assert outcome(BY_KEY[name]) == "lowered"


def test_sizes_are_not_bounded_like_places() -> None:
    size = sympy.Symbol("s0", integer=True, positive=True)
    assert is_held(size + Q, LONG)
    assert is_held(size * K + Q, LONG)
    assert is_held(size + Q, DOUBLE)
    assert not is_held(size + Q, SINGLE)


# ---- any program -----------------------------------------------------------------------------------------------------

NUMBERS = (0, 1, -1, 2, 0.5, 1e-9, -1e9, 2**24, 2**31, 2**53)
STEPS: dict[str, Callable[[Tensor, Tensor, Any], Tensor]] = {
    "add": lambda x, y, c: x + y,
    "add a number": lambda x, y, c: x + c,
    "take away": lambda x, y, c: x - y.to(x.dtype),
    "multiply": lambda x, y, c: x * y,
    "multiply by a number": lambda x, y, c: x * c,
    "negate": lambda x, y, c: ~x if x.dtype == torch.bool else -x,
    "compare": lambda x, y, c: x >= y,
    "compare with a number": lambda x, y, c: x > c,
    "choose": lambda x, y, c: torch.where(y.bool(), x, c),
    "choose one": lambda x, y, c: torch.where(triangle(), x, y.to(x.dtype)),
    "logarithm": lambda x, y, c: x.log(),
    "magnitude": lambda x, y, c: x.long().abs(),
    "turn": lambda x, y, c: x.expand(N, N).transpose(0, 1),
    "cut": lambda x, y, c: x.expand(N, N)[:, :1],
    **{
        f"cast to {dtype}": lambda x, y, c, dtype=dtype: x.to(dtype)
        for dtype in (HALF, BRIEF, SINGLE, DOUBLE, BYTE, INT, LONG, torch.bool)
    },
}
STARTS: dict[str, Mask] = {
    "integers": lambda u, f: u,
    "integers by query": lambda u, f: u[:, None],
    "floats": lambda u, f: f,
    "floats by query": lambda u, f: f[:, None],
    "keys": lambda u, f: torch.arange(N),
    "queries": lambda u, f: torch.arange(N)[:, None],
    "triangle": lambda u, f: triangle(),
}
start = st.sampled_from(sorted(STARTS))
steps = st.lists(st.tuples(st.sampled_from(sorted(STEPS)), start, st.sampled_from(NUMBERS)), min_size=1, max_size=5)


class Recorded(Interpreter):
    """Runs a graph and keeps what each node gives."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Any) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


def as_sympy(value: Tensor) -> Any:
    number = value.item()
    if isinstance(number, float) and not math.isfinite(number):
        return sympy.nan if math.isnan(number) else sympy.oo * int(math.copysign(1, number))
    return sympy.Rational(number)


def evaluated(element: Any, values: dict[str, Tensor], query: int, key: int) -> Any:
    """An element where its unknown functions are what the nodes of their names gave; comparisons with NaN as IEEE."""
    if element in (Q, K):
        return sympy.Integer(query if element == Q else key)
    if isinstance(element, sympy.Piecewise):
        cases = ((x, evaluated(c, values, query, key)) for x, c in element.args)
        return evaluated(next(x for x, holds in cases if holds == sympy.true), values, query, key)
    parts = [evaluated(part, values, query, key) for part in element.args]
    if isinstance(element, AppliedUndef):
        return as_sympy(values[element.func.__name__[:-1]][tuple(map(int, parts))])
    if element.is_Relational and sympy.nan in parts:
        return sympy.sympify(isinstance(element, sympy.Ne))
    return element.func(*parts) if parts else element


def compare(mask: Mask, elements: Tensor) -> None:
    """Whether what is known of a mask's elements agrees with them."""
    traced = make_fx(mask, pre_dispatch=True)(INTEGERS, FLOATS)
    (node,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes
    element, recorded = sympy.sympify(Evaluator().value(node, (Q, K))), Recorded(traced)
    recorded.run(INTEGERS, FLOATS)
    for query, key in ((0, 0), (1, 3), (3, 1), (2, 5), (7, 2), (4, 4), (0, 6), (6, 7)):
        found = evaluated(element, recorded.values, query, key)
        assert bool(found) == bool(elements[query, key]), (element, query, key)


NO_NUMBERS: dict[str, Mask] = {
    "0 times an infinity": lambda u, f: torch.logical_not(later() * f),
    "0 times a logarithm": lambda u, f: (torch.arange(N).bool() * torch.arange(N).log()).bool().expand(N, N),
    "an infinity less an infinity": lambda u, f: (torch.where(later(), 0.0, math.inf) - f).bool(),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_hides_nothing(name: str) -> None:
    compare(NO_NUMBERS[name], NO_NUMBERS[name](INTEGERS, FLOATS))


@settings(max_examples=80, deadline=None)
@given(first=start, program=steps)
def test_elements_of_unknown_values_are_those_of_the_program(first: str, program: Any) -> None:
    def mask(integers: Tensor, floats: Tensor) -> Tensor:
        x = STARTS[first](integers, floats)
        for name, other, number in program:
            x = STEPS[name](x, STARTS[other](integers, floats), number)
        return x.bool().expand(N, N)

    try:
        elements = mask(INTEGERS, FLOATS)
    except (RuntimeError, TypeError):
        return  # torch has no such operator
    compare(mask, elements)
