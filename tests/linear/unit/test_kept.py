"""What a program says beside its numbers stays: gradients that stop, devices, strides, and sites of other families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.block_linears import (
    RANK,
    WIDTH,
    Factors,
    assert_same_gradients,
    blast_einsum,
    blocked,
    bmm_blocked,
    bmm_interleaved,
    einsum_dots,
    given,
    matmul_broadcast,
    shuffled,
    tokens_swapped,
)
from support.capture import run_passes
from torch import Tensor

Program = Callable[[Factors, Tensor], Any]


def first(m: Factors, x: Tensor) -> Tensor:
    """(K, tokens, L * rank)."""
    return torch.bmm(blocked(m, x), m.w1.mT)


def second(m: Factors, z: Tensor) -> Tensor:
    """Of (L, tokens, K * rank)."""
    return torch.bmm(z, m.w2.mT).transpose(0, 1).flatten(1)


def detached_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x).detach()))


def detached_reordered(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x)).detach())


def detached_before_the_coupling(m: Factors, x: Tensor) -> Tensor:
    z = torch.einsum("bmr,lbr->lmr", torch.bmm(blocked(m, x), m.v.mT).detach(), m.s)
    return torch.bmm(z, m.u.mT).transpose(0, 1).flatten(1)


def detached_behind(m: Factors, x: Tensor) -> Tensor:
    return bmm_blocked(m, x).detach() * m.bias


def detached_before_the_bias(m: Factors, x: Tensor) -> Tensor:
    return F.relu(bmm_blocked(m, x).detach() + m.bias)


def detached_weight(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, torch.bmm(blocked(m, x), m.w1.detach().mT)))


def hooked_between(m: Factors, x: Tensor) -> Tensor:
    z = first(m, x)
    z.register_hook(lambda grad: 2 * grad)
    return second(m, shuffled(m, z))


def hooked_behind(m: Factors, x: Tensor) -> Tensor:
    y = bmm_blocked(m, x)
    y.register_hook(lambda grad: grad.clamp(-0.1, 0.1))
    return F.relu(y + m.bias)


GRADIENTS: dict[Program, list[str]] = {
    detached_between: ["block_step"],
    detached_reordered: ["block_step"],
    detached_before_the_coupling: ["lowered"],  # the coupling and the last factor by themselves
    detached_behind: ["lowered"],
    detached_before_the_bias: ["lowered"],
    detached_weight: ["lowered"],
    hooked_between: [],
    hooked_behind: ["lowered"],
}


@pytest.mark.parametrize("program", GRADIENTS, ids=lambda program: program.__name__)
def test_gradients_go_where_they_went(program: Program) -> None:
    model, x = Factors(program), given(7)
    output, (result,) = run_passes(model, x)
    assert [d.code for d in result.decisions] == GRADIENTS[program]
    expected = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    assert_same_gradients(model, x, output, expected, rtol=1e-10, atol=1e-10)


def test_a_result_that_is_detached_asks_for_no_gradient() -> None:
    output, _ = run_passes(Factors(lambda m, x: bmm_blocked(m, x).detach()), given(7))
    assert not output.requires_grad


def test_a_result_goes_to_the_device_that_the_program_says() -> None:
    with torch.no_grad():
        output, (result,) = run_passes(Factors(lambda m, x: bmm_blocked(m, x).to("meta")), given(7))
    assert [d.code for d in result.decisions] == ["lowered"]
    assert output.device.type == "meta"


def wide(m: Factors, x: Tensor) -> Tensor:
    """(Q, tokens, L), in the memory order of (L, tokens, Q)."""
    z = torch.einsum("mbp,blrp->mlbr", x.reshape(-1, m.blocks, WIDTH), m.wide1)
    return torch.einsum("mlbr,lqbr->qml", z, m.wide2)


def einsum_without_a_sum(m: Factors, x: Tensor) -> Tensor:
    return torch.einsum("qml,l->qml", wide(m, x), m.bias[:2])


def einsum_that_sums_one_operand(m: Factors, x: Tensor) -> Tensor:
    return torch.einsum("qml,qr->qml", wide(m, x), m.u[0])


@pytest.mark.parametrize("program", [einsum_without_a_sum, einsum_that_sums_one_operand])
def test_strides_that_a_later_product_inherits_stay(program: Program) -> None:
    model, x = Factors(program).requires_grad_(False), given(7).detach()
    output, (result,) = run_passes(model, x)
    assert [d.code for d in result.decisions] == ["lowered"]
    expected = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    assert output.stride() == expected.stride()


def test_what_ends_at_a_product_that_a_refused_one_reads_is_lowered() -> None:
    """Of three products the last two are no block linear, as their middle is returned; the first two are."""

    def program(m: Factors, x: Tensor) -> Any:
        y = torch.bmm(shuffled(m, first(m, x)), m.w1[:, :, : m.blocks * RANK].mT)
        return second(m, shuffled(m, y)), y.sum()

    model, x = Factors(program), given(7)
    output, (result,) = run_passes(model, x)
    assert [d.code for d in result.decisions] == ["lowered", "block_reused"]
    for own, wanted in zip(output, model(x), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("program", [einsum_dots, matmul_broadcast, blast_einsum, tokens_swapped])
def test_one_sequence_of_any_length(program: Program) -> None:
    model, x = Factors(program), given(1, 4)
    torch._dynamo.mark_dynamic(x, 1)
    output, (result,) = run_passes(model, x)
    assert [d.code for d in result.decisions] == ["lowered"]
    torch.testing.assert_close(output, model(x), rtol=1e-11, atol=1e-11)


def test_activations_in_place() -> None:
    def behind(m: Factors, x: Tensor) -> Tensor:
        return F.relu(bmm_interleaved(m, x) + m.bias, inplace=True)

    def between(m: Factors, x: Tensor) -> Tensor:
        return second(m, shuffled(m, F.silu(first(m, x), inplace=True)))

    for program, code, activation in ((behind, "lowered", "relu"), (between, "block_step", None)):
        model, x = Factors(program), given(7)
        output, (result,) = run_passes(model, x)
        (decision,) = result.decisions
        assert decision.code == code
        assert activation is None or decision.ir.activation == activation
        torch.testing.assert_close(output, model(x), rtol=1e-11, atol=1e-11)


def one_einsum(m: Factors, x: Tensor) -> Tensor:
    return torch.einsum("mbp,blrp,lqbr->mlq", x.reshape(-1, m.blocks, WIDTH), m.wide1, m.wide2).flatten(1)


def one_einsum_of_blast(m: Factors, x: Tensor) -> Tensor:
    return torch.einsum("...bp,brp,lbr,lqr->...lq", x.reshape(-1, m.blocks, WIDTH), m.v, m.s, m.u).flatten(1)


def bias_added_in_blocks(m: Factors, x: Tensor) -> Tensor:
    bias = m.bias.view(m.blocks, 1, -1)
    return torch.baddbmm(bias, shuffled(m, first(m, x)), m.w2.mT).transpose(0, 1).flatten(1)


def einsum_of_experts(m: Factors, x: Tensor) -> Tensor:
    """Blocks of the input are blocks of the output."""
    return torch.einsum("mbp,brp,bqr->mbq", x.reshape(-1, m.blocks, WIDTH), m.v, m.u)


def einsum_of_low_rank(m: Factors, x: Tensor) -> Tensor:
    return torch.einsum("mp,rp,qr->mq", x[:, :WIDTH], m.v[0], m.u[0])


def experts_with_a_bias(m: Factors, x: Tensor) -> Tensor:
    return torch.baddbmm(m.bias.view(m.blocks, 1, -1), first(m, x), m.w2.mT)


@pytest.mark.parametrize(
    ("program", "codes"),
    [
        (one_einsum, ["block_step"]), (one_einsum_of_blast, ["block_step"]), (bias_added_in_blocks, ["block_step"]),
        (einsum_of_experts, []), (einsum_of_low_rank, []), (experts_with_a_bias, []),
    ],
)  # fmt: skip
def test_products_that_are_not_read_are_told(program: Program, codes: list[str]) -> None:
    model, x = Factors(program), given(7)
    output, (result,) = run_passes(model, x)
    assert [d.code for d in result.decisions if d.family == "linear"] == codes
    torch.testing.assert_close(output, model(x), rtol=1e-11, atol=1e-11)


def test_attention_along_two_axes_is_claimed_once() -> None:
    """Its weights, which are computed, are two block-diagonal matrices with a transpose between."""

    def axial(x: Tensor) -> Tensor:
        rows = (x @ x.mT).softmax(-1) @ x
        columns = x.transpose(0, 1)
        return (columns @ columns.mT).softmax(-1) @ rows.transpose(0, 1)

    x = torch.randn(4, 4, 6, dtype=torch.float64, requires_grad=True)
    output, (result,) = run_passes(axial, x)
    assert sum(d.status == "lowered" for d in result.decisions) < len(result.decisions)
    torch.testing.assert_close(output, axial(x), rtol=1e-11, atol=1e-11)
