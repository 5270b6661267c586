"""What is close to a block linear and is none, or none that can be lowered: kept as it is, with its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.block_linears import (
    BLOCKS,
    RANK,
    ROWS,
    WIDTH,
    Factors,
    blocked,
    bmm_blocked,
    bmm_interleaved,
    einsum_dots,
    given,
    shuffled,
)
from support.capture import run_passes
from torch import Tensor

from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.refusal import CODES

INNER = BLOCKS * RANK

Program = Callable[[Factors, Tensor], Any]


def first(m: Factors, x: Tensor) -> Tensor:
    """(K, tokens, L * rank)."""
    return torch.bmm(blocked(m, x), m.w1.mT)


def second(m: Factors, z: Tensor) -> Tensor:
    """Of (L, tokens, K * rank)."""
    return torch.bmm(z, m.w2.mT).transpose(0, 1).flatten(1)


# ---- an op between the products --------------------------------------------------------------------------------------


def relu_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, F.relu(first(m, x))))


def gelu_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, F.gelu(shuffled(m, first(m, x))))


def silu_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, F.silu(shuffled(m, first(m, x))))


def tanh_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, torch.tanh(first(m, x))))


def scaled_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x) * 0.5))


def learned_scale_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x) * m.scale))


def bias_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x) + m.scale))


def norm_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, F.layer_norm(shuffled(m, first(m, x)), (INNER,)))


def softmax_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x)).softmax(-1))


def dropout_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, F.dropout(shuffled(m, first(m, x)), 0.5, training=True))


def gated_between(m: Factors, x: Tensor) -> Tensor:
    z = first(m, x)
    return second(m, shuffled(m, z * torch.sigmoid(z)))


def residual_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x) + x.mean()))


def clamped_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x).clamp(-1, 1)))


def squared_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x) ** 2))


# ---- another order between -------------------------------------------------------------------------------------------


def indexed_by_a_buffer(m: Factors, x: Tensor) -> Tensor:
    z = first(m, x).transpose(0, 1).flatten(1)[:, m.places]
    return second(m, z.reshape(-1, m.blocks, INNER).transpose(0, 1))


def index_select_between(m: Factors, x: Tensor) -> Tensor:
    z = first(m, x).transpose(0, 1).flatten(1).index_select(1, m.places)
    return second(m, z.reshape(-1, m.blocks, INNER).transpose(0, 1))


def flipped_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x).flip(-1)))


def rolled_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x)).roll(1, -1))


def blocks_flipped_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x)).flip(0))


def half_of_the_blocks(m: Factors, x: Tensor) -> Tensor:
    """Each output block reads all of the columns that are even, or all that are odd, but of another split of each."""
    z = first(m, x).reshape(m.blocks, -1, RANK, m.blocks).permute(0, 1, 3, 2)  # (K, tokens, L, rank), c = j * L + l
    z = z.permute(3, 1, 0, 2).reshape(RANK, -1, m.blocks * m.blocks).transpose(0, 1).reshape(-1, m.blocks, INNER)
    return second(m, z.transpose(0, 1))


def tokens_and_columns_mixed(m: Factors, x: Tensor) -> Tensor:
    """A reshape that takes the numbers of one token for those of several."""
    return second(m, first(m, x).reshape(m.blocks, INNER, -1).transpose(1, 2))


# ---- ranks that differ -----------------------------------------------------------------------------------------------


class Uneven(Factors):
    """w1 (2, 6, P) and w2 (L, Q, 12 / L), with another number of blocks."""

    def __init__(self, program: Program, out_blocks: int) -> None:
        super().__init__(program)
        self.w2 = torch.nn.Parameter(torch.randn(out_blocks, ROWS, 2 * INNER // out_blocks, dtype=torch.float64))


def odd_ranks(m: Factors, x: Tensor) -> Tensor:
    """Four output blocks read three numbers each of two input blocks."""
    z = first(m, x).transpose(0, 1).reshape(-1, 3, 4).permute(2, 0, 1)
    return second(m, z)


def uneven_ranks(m: Factors, x: Tensor) -> Tensor:
    """Of three output blocks, the middle one alone reads both input blocks."""
    z = first(m, x).transpose(0, 1).reshape(-1, 3, 4).transpose(0, 1)
    return second(m, z)


def only_some_columns(m: Factors, x: Tensor) -> Tensor:
    """The second factor reads part of what the first gives."""
    z = first(m, x).reshape(m.blocks, -1, RANK, m.blocks)[:, :, :2]
    z = z.permute(3, 1, 0, 2).reshape(m.blocks, -1, 2 * m.blocks)
    return torch.bmm(z, m.w2[..., : 2 * m.blocks].mT).transpose(0, 1).flatten(1)


# ---- read elsewhere --------------------------------------------------------------------------------------------------


def first_product_read(m: Factors, x: Tensor) -> Any:
    z = first(m, x)
    return second(m, shuffled(m, z)), z


def view_of_the_middle_read(m: Factors, x: Tensor) -> Any:
    z = shuffled(m, first(m, x))
    return second(m, z), z.sum()


def two_layers_share_the_first_factor(m: Factors, x: Tensor) -> Any:
    z = shuffled(m, first(m, x))
    return second(m, z) + torch.bmm(z, (2 * m.w2).mT).transpose(0, 1).flatten(1)


def blast_middle_read(m: Factors, x: Tensor) -> Any:
    y = torch.bmm(blocked(m, x), m.v.mT)
    z = (y.unsqueeze(0) * m.s.unsqueeze(2)).sum(1)
    return torch.bmm(z, m.u.mT).transpose(0, 1).flatten(1), y.sum()


# ---- dtypes, writes, modes, layouts ----------------------------------------------------------------------------------


def cast_between(m: Factors, x: Tensor) -> Tensor:
    return second(m, shuffled(m, first(m, x).float()).double())


def narrower_between(m: Factors, x: Tensor) -> Tensor:
    return torch.bmm(shuffled(m, first(m, x).float()), m.w2.float().mT).transpose(0, 1).flatten(1)


def x_written_between(m: Factors, x: Tensor) -> Tensor:
    y = x * 1.0
    z = first(m, y)
    y.add_(1)
    return second(m, shuffled(m, z)) + y.sum()


def weight_written_between(m: Factors, x: Tensor) -> Tensor:
    w = m.w1 * 1.0
    z = torch.bmm(blocked(m, x), w.mT)
    w.zero_()
    return second(m, shuffled(m, z)) + w.sum()


def written_in_the_middle(m: Factors, x: Tensor) -> Tensor:
    z = first(m, x)
    z[0].zero_()
    return second(m, shuffled(m, z))


def grad_mode_switched_between(m: Factors, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = shuffled(m, first(m, x))
    return second(m, z)


def autocast_begins_between(m: Factors, x: Tensor) -> Tensor:
    z = shuffled(m, first(m, x))
    with torch.autocast("cpu", torch.bfloat16):
        return second(m, z)


def strided_read(m: Factors, x: Tensor) -> Tensor:
    return bmm_interleaved(m, x).as_strided((2, 2), (1, 2))


def complex_features(m: Factors, x: Tensor) -> Tensor:
    z = torch.bmm(blocked(m, x).to(torch.complex128), m.w1.mT.to(torch.complex128))
    y = torch.bmm(shuffled(m, z), m.w2.mT.to(torch.complex128))
    return y.real.transpose(0, 1).flatten(1)


def nothing_there(m: Factors, x: Tensor) -> Tensor:
    return einsum_dots(m, x[:0])


def from_data(m: Factors, x: Tensor) -> Tensor:
    return einsum_dots(m, x[x[:, 0] > 0])


NEAR_MISSES: dict[Program, str] = {
    **dict.fromkeys(
        (
            relu_between, gelu_between, silu_between, tanh_between, scaled_between, learned_scale_between,
            bias_between, norm_between, softmax_between, dropout_between, gated_between, residual_between,
            clamped_between, squared_between,
        ),
        "block_step",
    ),
    **dict.fromkeys(
        (
            indexed_by_a_buffer, index_select_between, flipped_between, rolled_between, blocks_flipped_between,
            half_of_the_blocks, uneven_ranks,
        ),
        "block_order",
    ),
    odd_ranks: "block_rank",
    first_product_read: "block_reused",
    view_of_the_middle_read: "block_reused",
    two_layers_share_the_first_factor: "block_reused",
    blast_middle_read: "block_reused",
    cast_between: "dtype",
    narrower_between: "dtype",
    complex_features: "dtype",
    x_written_between: "mutation",
    weight_written_between: "mutation",
    written_in_the_middle: "block_reused",
    grad_mode_switched_between: "context",
    autocast_begins_between: "context",
    strided_read: "as_strided",
    nothing_there: "empty",
}  # fmt: skip
"""Reported, with these codes."""


# ---- other things, which are not reported ----------------------------------------------------------------------------


def experts(m: Factors, x: Tensor) -> Tensor:
    """Each block has products of its own: nothing is mixed."""
    return torch.bmm(F.gelu(first(m, x)), m.w2.mT)


def block_diagonal_twice(m: Factors, x: Tensor) -> Tensor:
    return second(m, first(m, x))


def one_product(m: Factors, x: Tensor) -> Tensor:
    return first(m, x).transpose(0, 1).flatten(1)


def low_rank(m: Factors, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.v.flatten(0, 1)[:, :1].expand(-1, 2 * WIDTH)), m.u.flatten(1)[:, :6])


def low_rank_by_matmul(m: Factors, x: Tensor) -> Tensor:
    return (x @ m.v[0].repeat(1, 2).mT) @ m.u[0].mT


def linear_attention(m: Factors, x: Tensor) -> Tensor:
    q = x.reshape(-1, m.blocks, WIDTH).transpose(0, 1)
    return torch.bmm(torch.bmm(q, q.mT), q)


def attention_scores_by_weights(m: Factors, x: Tensor) -> Tensor:
    q = torch.bmm(blocked(m, x), m.w1.mT)
    return torch.bmm(q, q.mT)


def mlp(m: Factors, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, m.w1.flatten(0, 1).repeat(1, 2))), m.w2.flatten(0, 1).repeat(1, 2))


def per_token_weights(m: Factors, x: Tensor) -> Tensor:
    """The second weight differs from token to token."""
    z = torch.bmm(blocked(m, x), m.w1.mT).transpose(0, 1)
    return torch.bmm(z, x.reshape(-1, INNER, 2))


def summed_over_blocks(m: Factors, x: Tensor) -> Tensor:
    return torch.einsum("mbp,bqp->mq", x.reshape(-1, m.blocks, WIDTH), m.w1)


def coupled_only(m: Factors, x: Tensor) -> Tensor:
    y = torch.bmm(blocked(m, x), m.v.mT)
    return (y.unsqueeze(0) * m.s.unsqueeze(2)).sum(1)


UNREPORTED: tuple[Program, ...] = (
    experts,
    block_diagonal_twice,
    one_product,
    low_rank,
    low_rank_by_matmul,
    linear_attention,
    attention_scores_by_weights,
    mlp,
    per_token_weights,
    summed_over_blocks,
    coupled_only,
    only_some_columns,
    tokens_and_columns_mixed,
)


def name_of(program: Any) -> str:
    return str(program.__name__)


def _model(program: Program) -> Factors:
    out_blocks = {odd_ranks: 4, uneven_ranks: 3}.get(program)
    return Factors(program) if out_blocks is None else Uneven(program, out_blocks)


@pytest.mark.parametrize("program", NEAR_MISSES, ids=name_of)
def test_it_stays_and_is_told(program: Program) -> None:
    model, x = _model(program), given(7)
    torch.manual_seed(0)
    output, (result,) = run_passes(model, x)
    found = [d for d in result.decisions if d.family == "linear"]
    assert [d.code for d in found] == [NEAR_MISSES[program]]
    assert found[0].reason
    assert found[0].remedy == CODES[found[0].code].remedy
    assert LINEAR_OP not in [node.target for node in result.after.graph.nodes]
    torch.manual_seed(0)
    expected = model(x)
    for own, wanted in zip(_leaves(output), _leaves(expected), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-11)


def _leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("program", UNREPORTED, ids=name_of)
def test_it_is_something_else(program: Program) -> None:
    _, (result,) = run_passes(_model(program), given(7))
    assert [d for d in result.decisions if d.family == "linear"] == []


def test_there_are_enough() -> None:
    assert len(NEAR_MISSES) + len(UNREPORTED) >= 40


def test_sizes_that_follow_from_data() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        _, (result,) = run_passes(Factors(from_data), given(7))
    assert [d.code for d in result.decisions] == ["data_dependent"]


def test_three_products_are_one_block_linear_and_one_product() -> None:
    def three(m: Factors, x: Tensor) -> Tensor:
        z = shuffled(m, first(m, x))
        y = torch.bmm(z, m.w1[:, :, :6].mT)
        return second(m, shuffled(m, y))

    model, x = Factors(three), given(7)
    output, (result,) = run_passes(model, x)
    assert [d.code for d in result.decisions] == ["lowered"]
    torch.testing.assert_close(output, model(x))


@pytest.mark.parametrize(("policy", "code"), [("never", "policy_never"), ("auto", "no_gain")])
def test_what_policies_keep(policy: str, code: str) -> None:
    _, (result,) = run_passes(Factors(bmm_blocked), given(7), policy=policy)
    (decision,) = result.decisions
    assert (decision.status, decision.stage, decision.code) == ("exact", "cost", code)
    assert decision.ir is not None
    assert LINEAR_OP not in [node.target for node in result.after.graph.nodes]
