"""A mask's numbers on their way from dtype to dtype: none is followed that an earlier dtype has changed already."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from support.capture import run_passes
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from monarch_compile.passes.attention.masks import K, Q
from monarch_compile.passes.elements.holding import is_carried, is_held, overflowed, rounded
from monarch_compile.passes.elements.rules import Evaluator

OPTIONS = {"policy": "always", "causal": True, "block_size": 64, "window": 0, "chosen": 1024}
Mask = Callable[[Tensor, Tensor], Tensor]
"""Of unknown floats and unknown integers, one for each key."""

HALF, BRIEF, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
LONG, BYTE = torch.int64, torch.uint8
N = 24
KEYS = torch.arange(N)
QUERIES = KEYS[:, None]
FLOATS = torch.tensor([1e-60, 0.0, 1.0, -1.0, 2.0, 1e-30, 3.0, -5.0] * 3, dtype=DOUBLE)
INTEGERS = torch.tensor([5, 7, 2, 2**24 + 1, 256, 257, 300, 0] * 3)


def triangle() -> Tensor:
    return torch.arange(N)[:, None] >= torch.arange(N)


def later() -> Tensor:
    return torch.arange(N)[:, None] < torch.arange(N)


def row(dtype: torch.dtype = LONG, count: int = N) -> Tensor:
    return torch.arange(count, dtype=dtype)[:, None]


def at(dtype: torch.dtype = LONG, count: int = N) -> Tensor:
    return torch.arange(count, dtype=dtype)


def one(value: float, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.full((1,), value, dtype=dtype)


def both_ways(floats: Tensor, integers: Tensor) -> Tensor:
    above = floats[:, None] > floats
    return torch.bitwise_or(above, ~above.transpose(0, 1))


def neighbours(floats: Tensor, integers: Tensor) -> Tensor:
    above = torch.cat([floats, floats[:1]]) > 0
    return triangle() & (above[:-1] | ~above[1:])


def rows(floats: Tensor, integers: Tensor) -> Tensor:
    above = floats[:, None] > floats
    return triangle() & (above[1] | ~above[2])


def cases(floats: Tensor, integers: Tensor) -> Tensor:
    first, query = at() < 12, row(SINGLE)
    taken = torch.where(first, query + 1e8, query) - torch.where(first, 1e8, -1e8)
    return torch.where(first, taken, query) >= at(SINGLE)


OTHERS: dict[str, Mask] = {
    "float32 widened by a cast": lambda f, u: (row(SINGLE) + 1e8).double() >= at(DOUBLE) + 1e8,
    "float32 widened by a sum": lambda f, u: (row(SINGLE) + 1e8) + one(0.0) >= at(DOUBLE) + 1e8,
    "float32 widened by where": lambda f, u: torch.where(at() >= 0, row(SINGLE) + 1e8, one(0.0)) >= at(DOUBLE) + 1e8,
    "float32 compared in float64": lambda f, u: row(SINGLE) + 2.0**24 >= at(DOUBLE) + 2.0**24,
    "float64 by way of float32": lambda f, u: (row(DOUBLE) + 1e8).float().double() >= at(DOUBLE) + 1e8,
    "numbers widened": lambda f, u: (later().float() + 1e8).double() - 1e8 <= 0,
    "float32 places from 2**24 on": lambda f, u: torch.arange(2**24, 2**24 + N, dtype=SINGLE)[:, None].double()
    >= at(DOUBLE) + 2.0**24,
    "bfloat16 by where": lambda f, u: torch.where(at(count=300) >= 0, row(count=300), torch.zeros((), dtype=BRIEF))
    .float() >= at(count=300),
    "the magnitude of the least integer": lambda f, u: torch.where(later(), -(2**63), 0).abs() >= 0,
    "integers beyond 2**53": lambda f, u: row() + 2**53 >= at() + (2**53 + 1),
    "a tensor beyond 2**53": lambda f, u: row() + one(2**53, LONG) >= at() + one(2**53 + 1, LONG),
    "a choice beyond 2**53": lambda f, u: torch.where(later(), 2**53 + 1, 2**53) <= 2**53,
    "beyond 2**53 in float64": lambda f, u: torch.where(triangle(), 1, 0).add(2**53).double() - 2.0**53 > 0,
    "a 49th in float64": lambda f, u: triangle().double() / 49 * 49 == 1,
    "a 255th of a number": lambda f, u: triangle().float() / (1 / 255) * 1.0 == 255.0,
    "bool of a small product": lambda f, u: ~(later().float() * 1e-60).bool(),
    "bool of a small quotient": lambda f, u: torch.logical_not(later().float() / 1e60),
    "bool of less than float64 holds": lambda f, u: ~(later().double() * 1e-200 * 1e-200).bool(),
    "rounded hidden scores taken back": lambda f, u: ~((later().to(BRIEF) * -1e9).float() + 1e9 > 0),
    "infinity in float16 times 0": lambda f, u: (later().half() * -70000.0) * 0 == 0,
    "rounded in one of two cases": cases,
    "an unknown order, both ways": both_ways,
}  # fmt: skip
"""Triangles, or nothing hidden, in numbers. As it is computed, each has other elements."""

EXACT: dict[str, Mask] = {
    "pieces of a magnitude": lambda f, u: torch.where(later(), 2**40 + 1, 2**40).abs().float() - 2.0**40 <= 0,
    "pieces rounded down": lambda f, u: (torch.where(later(), 2**41 + 2, 2**41) // 2).float() - 2.0**40 <= 0,
    "unknown integers plus and minus 1": lambda f, u: triangle() & (u.float() + 1 - 1 == u),
    "unknown integers as floats": lambda f, u: triangle() & ((u == 2**24) | (u.float() != 2**24)),
    "unknown integers beside floats": lambda f, u: triangle() & ((u == 256) | (u != torch.tensor(256.0, dtype=BRIEF))),
    "unknown floats narrowed": lambda f, u: triangle() & (~f.bool() | f.float().bool()),
    "an unknown condition of neighbours": neighbours,
    "an unknown order in two rows": rows,
}
"""Masks that are lowered as what they are: all keys, or a triangle and some of the keys. In numbers, they differ."""

SAME: dict[str, Mask] = {
    "halves widened": lambda f, u: (row(SINGLE) + 0.5).double() >= at(DOUBLE) + 0.5,
    "float32 beside float64": lambda f, u: row(SINGLE) >= at(DOUBLE),
    "integers at 2**53": lambda f, u: row() + (2**53 + 1) >= at() + (2**53 + 1),
    "an infinity widened": lambda f, u: ~(later().half() * -1e9).float().bool(),
    "unknown padding twice": lambda f, u: triangle() & ((u > 3) | ~(u > 3)),
}


def outcome(mask: Mask) -> list[tuple[str, str]]:
    """The code of a site under the mask, and what the mask is read as; every block is chosen, so it is exact."""
    count = mask(FLOATS, INTEGERS).shape[-1]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, count, 2, generator=generator, dtype=DOUBLE) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor, floats: Tensor, integers: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(floats, integers))

    given = (q, k, v, FLOATS, INTEGERS)
    found, (result,) = run_passes(attend, *given, **OPTIONS)
    seen = mask(FLOATS, INTEGERS).any(-1)  # a row that sees no key is 0 here and NaN there
    torch.testing.assert_close(found[..., seen, :], attend(*given)[..., seen, :], rtol=1e-9, atol=1e-9)
    return [(decision.code, decision.mask) for decision in result.decisions]


@pytest.mark.parametrize("name", OTHERS)
def test_what_an_earlier_dtype_changed_is_not_followed(name: str) -> None:
    ((code, _),) = outcome(OTHERS[name])
    assert code != "lowered"


@pytest.mark.parametrize("name", EXACT)
def test_masks_that_are_lowered_are_those_of_the_program(name: str) -> None:
    ((code, _),) = outcome(EXACT[name])
    assert code == "lowered"


@pytest.mark.parametrize("name", SAME)
def test_what_each_dtype_holds_is_followed(name: str) -> None:
    assert outcome(SAME[name]) == [("lowered", "causal")]


@pytest.mark.parametrize("sign", [-1, 1])
def test_a_large_product_that_is_added_and_taken_away_is_not_followed(sign: int) -> None:
    def mask() -> Tensor:
        query, key = row(SINGLE), at(SINGLE)
        return (query * key + (query - key) * sign) - query * key >= 0

    traced = make_fx(mask, pre_dispatch=True)()
    (node,) = next(iter(traced.graph.find_nodes(op="output"))).all_input_nodes
    assert sympy.sympify(Evaluator().value(node, (Q, K))).has(AppliedUndef)
    query, key = torch.tensor(4500.0), torch.tensor(4501.0)
    assert (query * key + (query - key)) - query * key == 0  # right below 4,096 places, wrong beyond


def test_what_is_carried_from_dtype_to_dtype() -> None:
    unknown, token = sympy.Function("x", real=True)(K), sympy.Function("u", integer=True)(K)
    assert is_carried(Q + 2**23, LONG, SINGLE)
    assert not is_carried(Q + 2**24, SINGLE, DOUBLE)
    assert not is_carried(sympy.Integer(-(10**9)), BRIEF, SINGLE)
    assert is_carried(sympy.Integer(-(10**9)), BRIEF, torch.bool)
    assert not is_carried(unknown, DOUBLE, SINGLE)
    assert is_carried(unknown, SINGLE, DOUBLE)
    assert is_carried(token, LONG, torch.int32)
    assert not is_carried(token, LONG, BRIEF)
    assert is_held(token, LONG)
    assert not is_held(token, SINGLE)


def test_numbers_are_compared_exactly() -> None:
    assert not is_held(sympy.Integer(2**53 + 1), DOUBLE)
    assert is_held(sympy.Integer(2**53 + 1), LONG)
    assert not is_held(sympy.Integer(2**63), LONG)
    assert not is_held(sympy.Rational(1, 49), DOUBLE)
    assert not is_held(sympy.Float(1e-200) ** 2, DOUBLE)
    assert rounded(sympy.Integer(2**53 + 1), SINGLE) is None
    assert not is_held(sympy.floor(Q * 2**30 / 3), SINGLE)
    assert overflowed(sympy.Integer(-70000), HALF) == -sympy.oo
    assert overflowed(sympy.Integer(65519), HALF) == 65519
    assert overflowed(sympy.Integer(300), BYTE) == 300
