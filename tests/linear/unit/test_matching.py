"""What guards a block linear that was found, how its result lies in memory, and what is found around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.block_linears import Factors, bmm_blocked, bmm_interleaved, einsum_dots, einsum_four_dims, given
from support.capture import decisions_of, run_passes
from torch import Tensor

from monarch_compile.linear.op import LINEAR_OP


def codes(program: Any, x: Tensor, **options: Any) -> list[str]:
    return [d.code for d in decisions_of(Factors(program), x, **options)]


def _same(program: Any, x: Tensor, count: int = 1) -> Any:
    """Lowered as often as `count`, with the numbers and strides of eager."""
    model = Factors(program)
    output, (result,) = run_passes(model, x)
    assert [node.target for node in result.after.graph.nodes].count(LINEAR_OP) == count
    expected = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    assert output.stride() == expected.stride()
    return result


def test_two_layers_in_a_row() -> None:
    def program(m: Factors, x: Tensor) -> Tensor:
        return bmm_blocked(m, F.pad(bmm_interleaved(m, x), (0, 2)))

    result = _same(program, given(7), 2)
    assert len({d.name for d in result.decisions}) == 2


def test_the_strides_of_a_result_that_leaves_the_graph_stay() -> None:
    def product_itself(m: Factors, x: Tensor) -> Tensor:
        z = torch.einsum("mbp,blrp->mlbr", x.reshape(-1, m.blocks, 6), m.wide1)
        return torch.einsum("mlbr,lqbr->lqm", z, m.wide2)

    _same(product_itself, given(7))
    _same(lambda m, x: bmm_interleaved(m, x).T, given(7))


def test_a_bias_or_activation_that_does_not_fit_stays_outside() -> None:
    def token_bias(m: Factors, x: Tensor) -> Tensor:
        return bmm_blocked(m, x) + x[:, :1]

    def residual(m: Factors, x: Tensor) -> Tensor:
        return bmm_blocked(m, x) + x[:, :10]

    def scaled_bias(m: Factors, x: Tensor) -> Tensor:
        return torch.add(bmm_blocked(m, x), m.bias, alpha=2)

    def bias_read_twice(m: Factors, x: Tensor) -> Tensor:
        y = bmm_blocked(m, x)
        return (y + m.bias) * y

    def number(m: Factors, x: Tensor) -> Tensor:
        return bmm_blocked(m, x) + 1

    def activation_before_the_bias(m: Factors, x: Tensor) -> Tensor:
        return F.relu(bmm_blocked(m, x)) + m.bias

    for program in (token_bias, residual, scaled_bias, bias_read_twice, number):
        (decision,) = _same(program, given(7)).decisions
        assert (decision.ir.bias, decision.ir.activation) == (False, "none")
    (decision,) = _same(activation_before_the_bias, given(7)).decisions
    assert (decision.ir.bias, decision.ir.activation) == (False, "relu")


def test_another_activation_stays_outside() -> None:
    (decision,) = _same(lambda m, x: torch.tanh(bmm_blocked(m, x) + m.bias), given(7)).decisions
    assert (decision.ir.bias, decision.ir.activation) == (True, "none")


def test_writes_after_the_result_keep_it_where_sharing_could_be_seen() -> None:
    def written(m: Factors, x: Tensor) -> Tensor:
        y = bmm_blocked(m, x)
        y.view(-1)[0] = 0
        return y * 2

    model, x = Factors(written), given(7).detach()
    with torch.no_grad():
        output, _ = run_passes(model, x)
        torch.testing.assert_close(output, model(x))


def test_symbolic_sizes_are_not_guarded_on() -> None:
    def last_dim_is_symbolic(m: Factors, x: Tensor) -> Tensor:
        return einsum_four_dims(m, x).T.contiguous() + x[:, 0]

    x = given(10).detach()  # as many tokens as features
    torch._dynamo.mark_dynamic(x, 0)
    model = Factors(last_dim_is_symbolic)
    output, (result,) = run_passes(model, x)
    assert [d.code for d in result.decisions] == ["lowered"]
    torch.testing.assert_close(output, model(x))


def test_weights_that_are_inputs_or_computed() -> None:
    def program(m: Factors, x: Tensor) -> Tensor:
        z = torch.einsum("mbp,blrp->mlbr", x.reshape(-1, m.blocks, 6), m.wide1 * 2)
        return torch.einsum("mlbr,lqbr->mlq", z, torch.tanh(m.wide2)).flatten(1)

    _same(program, given(7))
    model = Factors(einsum_four_dims)

    def by_arguments(x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        z = torch.einsum("mbp,blrp->mlbr", x.reshape(-1, 2, 6), one)
        return torch.einsum("mlbr,lqbr->mlq", z, two).flatten(1)

    arguments = (given(7), model.wide1.detach(), model.wide2.detach())
    output, (result,) = run_passes(by_arguments, *arguments)
    assert [d.code for d in result.decisions] == ["lowered"]
    torch.testing.assert_close(output, by_arguments(*arguments))


def test_blocks_of_two_numbers() -> None:
    """Two input and three output blocks."""

    def program(x: Tensor, one: Tensor, two: Tensor) -> Tensor:
        z = torch.einsum("mbp,blrp->mlbr", x.reshape(-1, 2, 6), one)
        return torch.einsum("mlbr,lqbr->mlq", z, two).flatten(1)

    one, two = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(3, 5, 2, 4, dtype=torch.float64)
    output, (result,) = run_passes(program, given(7), one, two)
    (decision,) = result.decisions
    assert (decision.ir.in_blocks, decision.ir.out_blocks, decision.ir.rank) == (2, 3, 4)
    torch.testing.assert_close(output, program(given(7), one, two))


def test_in_the_body_of_cond() -> None:
    model = Factors(einsum_dots)

    def program(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: einsum_dots(model, x), lambda x: -einsum_dots(model, x), (x,))

    x = given(7).detach()
    with torch.no_grad():
        output, (result,) = run_passes(program, x)
        assert [d.code for d in result.decisions] == ["lowered", "lowered"]
        torch.testing.assert_close(output, program(x))


def test_in_the_body_of_an_operator_that_is_kept() -> None:
    model = Factors(einsum_dots)

    def program(x: Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: einsum_dots(model, x), lambda x: -einsum_dots(model, x), (x,))

    _, (result,) = run_passes(program, given(7))  # in training
    assert {d.code for d in result.decisions} == {"in_body"}


def test_einops() -> None:
    einops = pytest.importorskip("einops")

    def program(m: Factors, x: Tensor) -> Tensor:
        z = einops.einsum(einops.rearrange(x, "m (k p) -> m k p", k=m.blocks), m.w1, "m k p, k q p -> m k q")
        z = einops.rearrange(z, "m k (r l) -> m l (k r)", l=m.blocks)
        y = einops.einsum(z, m.w2, "m l s, l q s -> m l q")
        return einops.rearrange(y, "m l q -> m (q l)")

    _same(program, given(7))


def test_the_ops_that_einops_runs() -> None:
    """`rearrange` is a reshape, a permute and a reshape."""

    def program(m: Factors, x: Tensor) -> Tensor:
        z = torch.einsum("abc,bdc->abd", x.reshape(7, 2, 6), m.w1)
        z = z.reshape(7, 2, 3, 2).permute(0, 3, 1, 2).reshape(7, 2, 6)
        y = torch.einsum("abc,bdc->abd", z, m.w2)
        return y.permute(0, 2, 1).reshape(7, 10)

    (decision,) = _same(program, given(7)).decisions
    assert decision.ir.output_order == "interleaved"


def test_a_subclass_of_tensors_stays() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x = given(7).detach()
    assert codes(einsum_dots, TwoTensor(x, x.clone())) == ["tensor_subclass"]
