"""Every spelling of a block linear becomes one operator, which gives eager's numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.block_linears import ENDED, PARTLY, Factors, Forward, given, weights_left
from support.capture import run_passes
from torch import Tensor

from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.passes.graph import aten

PRODUCTS = {aten.bmm.default, aten.matmul.default, aten.einsum.default, aten.sum.dim_IntList}
MOVES = {"reshape", "permute", "transpose", "unflatten", "mT", "unsqueeze", "contiguous", "slice", "sym_size"}


def checked(program: Forward, x: Tensor, blocks: int = 2, tolerance: float = 1e-11, **kwargs: Any) -> Any:
    """Run a program lowered and not, compare all, and return its rewritten graph's nodes and decision."""
    model = Factors(program, blocks, x.dtype)
    output, (result,) = run_passes(model, x, **kwargs)
    assert [(d.family, d.status, d.code) for d in result.decisions] == [("linear", "lowered", "lowered")]
    nodes = [node for node in result.after.graph.nodes if node.op == "call_function"]
    assert [node.target for node in nodes].count(LINEAR_OP) == 1
    assert not [node for node in nodes if node.target in PRODUCTS]
    expected = model(x)
    assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    weight = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).reshape(expected.shape).to(x.dtype)
    leaves = [x, *model.parameters()]
    own = torch.autograd.grad((output * weight).sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    for one, other in zip(own, wanted, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=100 * tolerance)
    return nodes, result.decisions[0]


def dynamic(x: Tensor, *dims: int) -> Tensor:
    """x with some dims of symbolic sizes."""
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    return x.requires_grad_()


def name_of(program: Any) -> str:
    return str(program.__name__)


@pytest.mark.parametrize("tokens", [(7,), (2, 3), (1,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("program", ENDED, ids=name_of)
def test_it_is_one_operator(program: Forward, tokens: tuple[int, ...]) -> None:
    nodes, decision = checked(program, given(*tokens))
    after = nodes[[node.target for node in nodes].index(LINEAR_OP) + 1 :]
    keeps_strides = {"permute", "clone"} if program is weights_left else set()  # which eager code could see
    assert {str(node.target).split(".")[1] for node in after} <= {"reshape", *keeps_strides}
    assert decision.ir.tokens == torch.Size(tokens).numel()
    assert decision.ir.kind == ("blast" if "blast" in program.__name__ or "silu" in program.__name__ else "monarch")


@pytest.mark.parametrize("tokens", [(7,), (2, 3)], ids=str)
@pytest.mark.parametrize("program", PARTLY, ids=name_of)
def test_what_else_follows_stays(program: Forward, tokens: tuple[int, ...]) -> None:
    checked(program, given(*tokens))


@pytest.mark.parametrize("blocks", [3, 4])
@pytest.mark.parametrize("program", [*ENDED, *PARTLY], ids=name_of)
def test_with_more_blocks(program: Forward, blocks: int) -> None:
    checked(program, given(2, 3, blocks=blocks), blocks)


@pytest.mark.parametrize("program", [*ENDED, *PARTLY], ids=name_of)
def test_in_float32(program: Forward) -> None:
    checked(program, given(5, dtype=torch.float32), tolerance=1e-5)


@pytest.mark.parametrize("program", [*ENDED, *PARTLY], ids=name_of)
def test_with_a_symbolic_number_of_tokens(program: Forward) -> None:
    x = given(2, 3) if program.__name__ != "tokens_swapped" else given(7)
    _, decision = checked(program, dynamic(x.detach().flatten(0, -2), 0))
    assert isinstance(decision.ir.tokens, str)


@pytest.mark.parametrize("program", ENDED, ids=name_of)
def test_with_a_symbolic_batch_and_length(program: Forward) -> None:
    _, decision = checked(program, dynamic(given(2, 3), 0, 1))
    assert "*" in str(decision.ir.tokens)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("bmm_interleaved", "monarch [7,12] blocks 2x2 rank 3 interleaved -> [7,10]"),
        ("with_relu", "monarch [7,12] blocks 2x2 rank 3 bias relu -> [7,10]"),
        ("with_gelu_tanh", "monarch [7,12] blocks 2x2 rank 3 interleaved gelu_tanh -> [7,10]"),
        ("with_silu", "blast [7,12] blocks 2x2 rank 3 bias silu -> [7,10]"),
        ("no_merge_at_the_end", "monarch [7,12] blocks 2x2 rank 3 -> [7,10]"),
    ],
)
def test_what_the_ir_says(program: str, says: str) -> None:
    named = {p.__name__: p for p in (*ENDED, *PARTLY)}
    _, decision = checked(named[program], given(7))
    assert str(decision.ir) == f"monarch.block_linear<f64> {says}"
