"""The operator of block linears: its meaning against a dense product, its gradients, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monarch_compile.errors import InputError, IRError
from monarch_compile.linear.ir import ACTIVATIONS, BLAST, INTERLEAVED, KINDS, MONARCH, ORDERS, BlockLinear
from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.linear.reference import ACTIVATE, expanded, reference


def tensors(
    kind: str,
    tokens: tuple[int, ...] = (5,),
    sizes: tuple[int, int, int, int, int] = (2, 3, 4, 5, 2),
    dtype: torch.dtype = torch.float64,
) -> list[Tensor | None]:
    """x, first, second, coupling and bias; sizes: in_blocks, out_blocks, P, Q, rank."""
    generator = torch.Generator().manual_seed(0)
    in_blocks, out_blocks, p, q, rank = sizes
    shapes: list[tuple[int, ...] | None] = [(*tokens, in_blocks * p)]
    if kind == MONARCH:
        shapes += [(in_blocks, out_blocks, rank, p), (out_blocks, q, in_blocks, rank), None]
    else:
        shapes += [(in_blocks, rank, p), (out_blocks, q, rank), (out_blocks, in_blocks, rank)]
    shapes.append((out_blocks * q,))
    return [None if s is None else torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def by_elements(given: list[Tensor | None], output_order: str) -> Tensor:
    """The weight, written block by block."""
    _, first, second, coupling, _ = given
    assert first is not None
    assert second is not None
    width, rows = first.shape[-1], second.shape[1]
    weight = torch.zeros(second.shape[0] * rows, first.shape[0] * width, dtype=first.dtype)
    for b in range(first.shape[0]):
        for out in range(second.shape[0]):
            if coupling is None:
                block = second[out, :, b] @ first[b, out]
            else:
                block = second[out] @ torch.diag(coupling[out, b]) @ first[b]
            where = torch.arange(rows) + out * rows
            if output_order == INTERLEAVED:
                where = torch.arange(rows) * second.shape[0] + out
            weight[where, b * width : (b + 1) * width] = block
    return weight


SIZES = st.tuples(*[st.integers(1, 4)] * 5)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), SIZES, st.lists(st.integers(0, 3), max_size=2), st.sampled_from(ORDERS), st.booleans())
def test_it_is_the_dense_product(
    kind: str, sizes: tuple[int, ...], tokens: list[int], output_order: str, has_bias: bool
) -> None:
    given_tensors = tensors(kind, tuple(tokens), sizes)  # type: ignore[arg-type]
    x, first, second, coupling, bias = given_tensors
    bias = bias if has_bias else None
    weight = by_elements(given_tensors, output_order)
    torch.testing.assert_close(expanded(first, second, coupling, output_order), weight)
    y = LINEAR_OP(x, first, second, coupling, bias, output_order, "none")
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_stay_near_float64(kind: str, dtype: torch.dtype) -> None:
    x, first, second, coupling, bias = tensors(kind, (7,), (2, 2, 8, 8, 3), dtype)
    y = reference(x, first, second, coupling, bias)
    assert y.dtype is dtype
    exact = reference(*(None if t is None else t.double() for t in (x, first, second, coupling, bias)))
    bound = 8 * torch.finfo(dtype).eps
    assert float((y.double() - exact).norm() / exact.norm()) <= bound


@pytest.mark.parametrize("output_order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_first_and_second_order(kind: str, activation: str, output_order: str) -> None:
    given_tensors = [None if t is None else t.requires_grad_() for t in tensors(kind, (3,), (2, 2, 2, 3, 2))]
    used = [t for t in given_tensors if t is not None]

    def run(*some: Tensor) -> Tensor:
        rest = iter(some)
        return LINEAR_OP(*(None if t is None else next(rest) for t in given_tensors), output_order, activation)

    assert torch.autograd.gradcheck(run, used)
    assert torch.autograd.gradgradcheck(run, used)


@pytest.mark.parametrize("needed", range(5))
def test_only_what_is_needed_gets_a_gradient(needed: int) -> None:
    given_tensors = tensors(BLAST)
    given_tensors[needed].requires_grad_()  # type: ignore[union-attr]
    LINEAR_OP(*given_tensors, "blocked", "silu").sum().backward()
    assert [t is not None and t.grad is not None for t in given_tensors] == [place == needed for place in range(5)]


def test_autocast_changes_nothing_inside() -> None:
    given_tensors = tensors(MONARCH, dtype=torch.float32)
    expected = LINEAR_OP(*given_tensors, "blocked", "none")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LINEAR_OP(*given_tensors, "blocked", "none"), expected)


def test_torch_finds_nothing_wrong_with_the_operator() -> None:
    for kind in KINDS:
        given_tensors = [None if t is None else t.requires_grad_() for t in tensors(kind, (2, 3))]
        torch.library.opcheck(LINEAR_OP, (*given_tensors, INTERLEAVED, "gelu"))


def _bad(place: int, value: Any, kind: str = MONARCH) -> tuple[Any, ...]:
    given_tensors: list[Any] = [*tensors(kind), "blocked", "none"]
    given_tensors[place] = value
    return tuple(given_tensors)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (_bad(0, torch.ones(5, 7, dtype=torch.float64)), "x must have 8 features"),
        (_bad(1, torch.ones(2, 3, 2, dtype=torch.float64)), "must have 4 dims; found 3"),
        (_bad(2, torch.ones(3, 5, 2, 3, dtype=torch.float64)), "second must be"),
        (_bad(3, torch.ones(3, 2, 3, dtype=torch.float64), BLAST), "coupling must be"),
        (_bad(4, torch.ones(14, dtype=torch.float64)), "bias must be"),
        (_bad(0, torch.ones(5, 8)), "must have one dtype"),
        (_bad(5, "sideways"), "output_order must be one of blocked"),
        (_bad(6, "tanh"), "activation must be one of none"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        LINEAR_OP(*arguments)


def test_every_activation_has_a_meaning() -> None:
    assert tuple(ACTIVATE) == ACTIVATIONS


IR = {
    "kind": MONARCH,
    "tokens": "s0",
    "in_features": 8,
    "out_features": 12,
    "in_blocks": 2,
    "out_blocks": 4,
    "rank": 3,
    "dtype": torch.bfloat16,
}


def test_an_ir_prints_on_one_line() -> None:
    ir = BlockLinear(**IR, bias=True, output_order=INTERLEAVED, activation="gelu")  # type: ignore[arg-type]
    text = "monarch.block_linear<bf16> monarch [s0,8] blocks 2x4 rank 3 bias interleaved gelu -> [s0,12]"
    assert str(ir) == text
    assert ir == BlockLinear(**IR, bias=True, output_order=INTERLEAVED, activation="gelu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "butterfly"}, "the kind is one of monarch, blast"),
        ({"rank": 0}, "at least 1"),
        ({"tokens": 0}, "at least 1 token"),
        ({"in_blocks": 3}, "in_blocks divides in_features"),
        ({"out_blocks": 5}, "out_blocks divides out_features"),
        ({"dtype": torch.int8}, "the dtype is one of"),
        ({"output_order": "sideways"}, "the output order is one of"),
        ({"activation": "tanh"}, "the activation is one of"),
    ],
)
def test_an_ir_keeps_its_rules(change: dict[str, Any], says: str) -> None:
    with pytest.raises(IRError, match=says):
        BlockLinear(**{**IR, **change})  # type: ignore[arg-type]
