"""Sequences packed into a row: those of one length that the graph proves are lowered as a batch, others stay exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.capture import run_passes
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

import monarch_compile
from monarch_compile.attention.op import ATTENTION_OP
from monarch_compile.passes.pipeline import Rewrite

INF = float("inf")


def tensors(batch: int = 2, heads: int = 3, seq_len: int = 24, dim: int = 8) -> tuple[Tensor, ...]:
    """As models have them: heads split off rows of features."""
    generator = torch.Generator().manual_seed(seq_len)
    rows = torch.randn(batch, seq_len, 3, heads, dim, generator=generator)
    q, k, v = rows.permute(2, 0, 3, 1, 4)
    return 2 * q, k, v


def alone(x: Tensor, length: int) -> Tensor:
    return x.unflatten(2, (-1, length)).transpose(1, 2).flatten(0, 1)


def packed(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)


def same(ids: Tensor) -> Tensor:
    return ids[:, None] == ids[None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT * 8**-0.5).masked_fill(~mask, -INF), -1) @ v


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return sdpa(q, k, v, torch.zeros(mask.shape).masked_fill(~mask, -INF))


def keys_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (k @ q.mT * 8**-0.5).masked_fill(~mask, -INF).softmax(-2).mT @ v


MASKS: dict[str, Callable[[], Tensor]] = {
    "divided": lambda: same(torch.arange(24) // 6),
    "div_floor": lambda: same(torch.div(torch.arange(24), 6, rounding_mode="floor")),
    "repeated": lambda: same(torch.arange(4).repeat_interleave(6)),
    "expanded": lambda: same(torch.arange(4)[:, None].expand(4, 6).reshape(24)),
    "not_unequal": lambda: ~((torch.arange(24) // 6)[:, None] != torch.arange(24) // 6),
    "of_a_batch": lambda: same(torch.arange(24) // 6)[None, None].expand(2, 1, 24, 24),
}


@pytest.mark.parametrize("spelled", [sdpa, by_hand, added, keys_first], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MASKS)
def test_one_length_is_lowered(name: str, spelled: Callable[..., Tensor]) -> None:
    given, length = tensors(), 6
    for block_size in (1, 4, 64):
        output, result = _lowered(lambda q, k, v: spelled(q, k, v, MASKS[name]()), given, block_size=block_size)
        ir = result.decisions[0].ir
        assert (ir.batch, ir.seq_len_q, ir.seq_len_k, ir.mask.value) == (8, 6, 6, "none")
        separate = [alone(x, length) for x in given]
        expected = monarch_compile.monarch_attention(*separate, block_size=block_size)
        torch.testing.assert_close(output, packed(expected, 2), rtol=1e-5, atol=1e-5)
        if block_size != 4:
            torch.testing.assert_close(output, sdpa(*given, MASKS["divided"]()), rtol=1e-5, atol=1e-5)


def _lowered(fn: Callable[..., Tensor], given: tuple[Tensor, ...], **options: object) -> tuple[Tensor, Rewrite]:
    output, (result,) = run_passes(fn, *given, **options)
    assert [d.code for d in result.decisions] == ["lowered"]
    return output, result


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    group=st.sampled_from([1, 2]),
    length=st.integers(2, 9),
    count=st.integers(2, 4),
    block_size=st.integers(1, 10),
    window=st.sampled_from([None, 0, 1]),
    prefix=st.sampled_from([0, 1]),
)
def test_any_sizes(
    batch: int, group: int, length: int, count: int, block_size: int, window: int | None, prefix: int
) -> None:
    q, k, v = tensors(batch, 2 * group, length * count)
    k, v = k[:, :2], v[:, :2]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = same(torch.arange(length * count) // length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    form = {"block_size": block_size, "window": window, "prefix": prefix}
    output, _ = _lowered(fn, (q, k, v), **form)
    expected = monarch_compile.monarch_attention(*(alone(x, length) for x in (q, k, v)), **form)
    torch.testing.assert_close(output, packed(expected, batch), rtol=1e-4, atol=1e-5)
    if block_size in (1, length):
        torch.testing.assert_close(output, fn(q, k, v), rtol=1e-4, atol=1e-5)


def test_nothing_is_copied() -> None:
    """Operands are views of what the model had, and the result is one of what the op gave."""
    given = tensors()
    _, result = _lowered(
        lambda q, k, v: sdpa(q, k, v, MASKS["divided"]()).transpose(1, 2).flatten(2).sum(2), given, block_size=3
    )
    (site,) = result.after.graph.find_nodes(op="call_function", target=ATTENTION_OP)
    (reader,) = result.after.graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    memory = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            made = super().run_node(n)
            memory[n] = made.untyped_storage().data_ptr() if isinstance(made, Tensor) else None
            return made

    Watch(result.after).run(*given)
    heads = result.after.graph.find_nodes(op="placeholder")
    assert {memory[x] for x in site.args[:3]} == {memory[x] for x in heads}
    assert memory[reader.args[0]] == memory[site]


def _one_off(value: bool) -> Tensor:
    mask = same(torch.arange(24) // 6)
    return torch.where((torch.arange(24)[:, None] == 3) & (torch.arange(24) == 20 - 18 * (not value)), value, mask)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "unequal": lambda ids: same((torch.arange(24) > 10).long()),
    "last_is_shorter": lambda ids: same(torch.arange(24) // 7),
    "shifted": lambda ids: same((torch.arange(24) + 3) // 6),
    "negated": lambda ids: same(-torch.arange(24) // 6),
    "given_ids": lambda ids: same(ids),
    "given_mask": lambda ids: ids[None] > 3 + ids[:, None] * 0,
    "one_more": lambda ids: _one_off(True),
    "one_less": lambda ids: _one_off(False),
    "written": lambda ids: same(torch.arange(24) // 6).index_put(
        (torch.tensor(3), torch.tensor(20)), torch.tensor(True)
    ),
    "and_causal": lambda ids: same(torch.arange(24) // 6) & (torch.arange(24)[:, None] >= torch.arange(24)),
    "and_keys": lambda ids: same(torch.arange(24) // 6) & (ids > 0),
    "either": lambda ids: same(torch.arange(24) // 6) | same(torch.arange(24) // 8),
    "others": lambda ids: ~same(torch.arange(24) // 6),
    "two_lengths": lambda ids: (torch.arange(24) // 6)[:, None] == torch.arange(24) // 8,
    "by_head": lambda ids: torch.arange(3)[:, None, None] * same(torch.arange(24) // 6) != 1,
    "strided": lambda ids: same(torch.arange(24) % 6),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_proved_stays_exact(name: str) -> None:
    """Each is no block diagonal of one length, or one that only the inputs tell."""
    ids = torch.arange(24) // 6

    def fn(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return sdpa(q, k, v, REFUSED[name](ids))

    output, (result,) = run_passes(fn, *tensors(), ids)
    (decision,) = result.decisions
    if name != "given_mask":  # which depends on the key alone
        assert decision.status == "exact"
        assert decision.code.startswith("mask_")
    torch.testing.assert_close(output, fn(*tensors(), ids), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_reason_names_what_suits() -> None:
    _, (result,) = run_passes(lambda q, k, v, ids: sdpa(q, k, v, same(ids)), *tensors(), torch.arange(24) // 6)
    (decision,) = result.decisions
    assert decision.code == "mask_packed"
    assert "FlexAttention" in decision.reason
    assert "varlen" in decision.reason


def test_other_masks_beside_it_stay_exact() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~same(torch.arange(24) // 6), -1e9).masked_fill(~m, -1e9)
        return torch.softmax(scores, -1) @ v

    visible = torch.arange(24) % 6 != 2
    output, (result,) = run_passes(fn, *tensors(), visible)
    assert [d.code for d in result.decisions] == ["mask_packed"]
    torch.testing.assert_close(output, fn(*tensors(), visible), rtol=1e-5, atol=1e-5)


def test_symbolic_lengths_stay_exact() -> None:
    def fn(x: Tensor) -> Tensor:
        return sdpa(x, 2 * x, x, same(torch.arange(x.shape[2]) // 6))

    x = torch.randn(2, 3, 24, 8)
    torch._dynamo.mark_dynamic(x, 2)
    output, (result,) = run_passes(fn, x)
    assert [d.code for d in result.decisions] == ["mask_packed"]
    torch.testing.assert_close(output, fn(x), rtol=1e-5, atol=1e-5)


def test_what_counts_is_the_length_of_a_sequence() -> None:
    """min_seq_len and the cost model look at a sequence, not at the row of them."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, same(torch.arange(4096) // 64))

    given = tuple(torch.randn(1, 1, 4096, 8) for _ in range(3))
    for options, code in (
        ({"min_seq_len": 65}, "min_seq_len"),
        ({"policy": "auto", "block_size": "auto"}, "cost_exact_wins"),
    ):
        _, (result,) = run_passes(fn, *given, **options)
        assert [d.code for d in result.decisions] == [code]
        assert result.decisions[0].q_shape == (1, 1, 4096, 8)


def test_unequal_numbers_of_queries_and_keys_stay_exact() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q[:, :, :12], k, v, (torch.arange(12) // 6)[:, None] == torch.arange(24) // 6)

    output, (result,) = run_passes(fn, *tensors(), cross_attention=True)
    assert [d.code for d in result.decisions] == ["mask_packed"]
    torch.testing.assert_close(output, fn(*tensors()), rtol=1e-5, atol=1e-5)


def test_a_program_with_gradients_and_merged_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    torch._dynamo.reset()
    counters.clear()

    def fn(x: Tensor) -> Tensor:
        q, k, v = x.view(2, 24, 3, 4, 8).permute(2, 0, 3, 1, 4).flatten(1, 2)  # heads in the batch
        scores = (q @ k.mT * 0.3).masked_fill(~same(torch.arange(24) // 6), -INF)
        return (torch.softmax(scores, -1) @ v).view(2, 4, 24, 8).transpose(1, 2).reshape(2, 24, 32)

    start = torch.randn(2, 24, 96, generator=torch.Generator().manual_seed(0))
    found = []
    for call in (torch.compile(fn, backend="monarch", options={"policy": "always", "block_size": 6}), fn):
        x = start.clone().requires_grad_()
        y = call(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    assert counters["monarch"]["lowered"] == 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_through_inductor() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, same(torch.arange(24) // 6)) * 2

    torch._dynamo.reset()
    counters.clear()
    call = torch.compile(fn, backend="monarch", options={"policy": "always", "block_size": 6})
    torch.testing.assert_close(call(*tensors()), fn(*tensors()), rtol=1e-5, atol=1e-5)
    assert counters["monarch"]["lowered"] == 1


def causal(length: int = 6) -> Tensor:
    return same(torch.arange(24) // length) & (torch.arange(24)[:, None] >= torch.arange(24))


def triangle_apart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    later = torch.arange(24)[:, None] < torch.arange(24)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~same(torch.arange(24) // 6), -INF)
    return torch.softmax(scores.masked_fill(later, -INF), -1) @ v


@pytest.mark.parametrize("spelled", [sdpa, by_hand, added, keys_first, triangle_apart], ids=lambda f: f.__name__)
def test_causal_sequences_of_one_length_are_lowered(spelled: Callable[..., Tensor]) -> None:
    given, swapped = tensors(), spelled is keys_first
    form = {"block_size": 2, "window": 0, "chosen": 1}

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if swapped:
            mask = same(torch.arange(24) // 6) & (torch.arange(24) >= torch.arange(24)[:, None])
        return spelled(q, k, v, mask if swapped else causal())

    output, result = _lowered(fn, given, causal=True, **form)
    ir = result.decisions[0].ir
    assert (ir.batch, ir.seq_len_q, ir.is_causal, ir.mask.value) == (8, 6, True, "none")
    expected = monarch_compile.monarch_attention(*(alone(x, 6) for x in given), causal=True, **form)
    torch.testing.assert_close(output, packed(expected, 2), rtol=1e-5, atol=1e-5)
    output, _ = _lowered(fn, given, causal=True, **{**form, "chosen": 24})
    torch.testing.assert_close(output, fn(*given), rtol=1e-5, atol=1e-5)
    _, (result,) = run_passes(fn, *given, **form)
    assert [d.code for d in result.decisions] in (["mask_packed"], ["mask_causal"])
    assert "option causal is False" in result.decisions[0].reason or spelled is triangle_apart


@pytest.mark.parametrize(
    "mask",
    [
        lambda: causal(7),  # the last one is cut short
        lambda: causal() & (torch.arange(24) != 3),
        lambda: causal() & (torch.arange(24)[:, None] - torch.arange(24) < 3),
        lambda: same(torch.arange(24) // 6) & (torch.arange(24)[:, None] + 1 >= torch.arange(24)),
        lambda: same(torch.arange(24) // 6) & (torch.arange(24)[:, None] <= torch.arange(24)),
        lambda: (
            same(torch.tensor([5, 9, 10]).repeat_interleave(torch.tensor([5, 9, 10])))
            & (torch.arange(24)[:, None] >= torch.arange(24))
        ),
    ],
)
def test_other_causal_packings_stay_exact(mask: Callable[[], Tensor]) -> None:
    given = tensors()
    options = {"causal": True, "block_size": 2, "chosen": 24}
    output, results = run_passes(lambda q, k, v: sdpa(q, k, v, mask()), *given, **options)
    assert [d.status for result in results for d in result.decisions] == ["exact"]
    torch.testing.assert_close(output, sdpa(*given, mask()), rtol=1e-5, atol=1e-5)
