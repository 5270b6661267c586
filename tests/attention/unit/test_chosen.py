"""Chosen blocks and causal attention: the reference against a dense form, what is exact, and what no row may see."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense_chosen import dense_chosen
from torch import Tensor

from monarch_compile.attention import chosen as module
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.errors import InputError, IRError


@dataclass(frozen=True)
class Problem:
    seq_len: int
    block_size: int
    chosen: int
    causal: bool
    window: int | None = 1
    prefix: int = 0
    group: int = 1
    pad: str = "post"
    seed: int = 0
    batch: int = 2
    kv_heads: int = 2

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def random(heads: int, dim: int) -> Tensor:
            return torch.randn(self.batch, heads, self.seq_len, dim, generator=generator).to(dtype)

        return 3 * random(self.kv_heads * self.group, 4), random(self.kv_heads, 4), random(self.kv_heads, 3)

    def padding(self) -> Tensor:
        """True where a key is hidden."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, self.seq_len, generator=generator) < 0.4

    def run(self, q: Tensor, k: Tensor, v: Tensor, **more: object) -> Tensor:
        names = ("block_size", "chosen", "causal", "window", "prefix", "pad")
        return monarch_attention(q, k, v, **{**{name: getattr(self, name) for name in names}, **more})


@st.composite
def problems(draw: st.DrawFn, causal: bool | None = None) -> Problem:
    causal = draw(st.booleans()) if causal is None else causal
    seq_len = draw(st.integers(1, 26))
    return Problem(
        seq_len,
        draw(st.integers(1, seq_len + 2)),
        draw(st.sampled_from([0, 1, 2, 3, 40])) if causal else draw(st.sampled_from([1, 2, 3, 40])),
        causal,
        window=draw(st.sampled_from([None, 0, 1, 2, 30])),
        prefix=draw(st.sampled_from([0, 1, 3, 30])),
        group=draw(st.sampled_from([1, 2])),
        pad=draw(st.sampled_from(["post", "pre"])),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans())
def test_the_reference_is_the_dense_form(p: Problem, masked: bool) -> None:
    p = replace(p, pad="post")
    q, k, v = p.tensors()
    padding = p.padding() if masked else torch.zeros(p.batch, p.seq_len, dtype=torch.bool)
    found = p.run(q, k, v, key_padding_mask=padding if masked else None)
    for entry in range(p.batch):
        for head in range(q.shape[1]):
            own = head // p.group
            options = {n: getattr(p, n) for n in ("block_size", "window", "prefix", "chosen", "causal")}
            choosers = list(q[entry, own * p.group : (own + 1) * p.group])
            matrix = dense_chosen(
                q[entry, head], k[entry, own], ~padding[entry], scale=0.5, choosers=choosers, **options
            )
            torch.testing.assert_close(found[entry, head], matrix @ v[entry, own], rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(causal=True), st.data())
def test_no_output_depends_on_a_later_token(p: Problem, data: st.DataObject) -> None:
    """Bit for bit, whatever the form; the choice of blocks included."""
    q, k, v = p.tensors(torch.float32)
    last = data.draw(st.integers(0, p.seq_len - 1))
    found = p.run(q, k, v)
    for x in (q, k, v):
        x[:, :, last + 1 :] = 7 * torch.randn_like(x[:, :, last + 1 :])
    assert torch.equal(p.run(q, k, v)[:, :, : last + 1], found[:, :, : last + 1])


@settings(max_examples=40, deadline=None)
@given(problems(causal=True), st.data())
def test_queries_that_a_call_lacks_count_as_zeros(p: Problem, data: st.DataObject) -> None:
    """Fewer queries than keys are the last of their sequence, and see what they see in it."""
    q, k, v = p.tensors()
    cached = data.draw(st.integers(1, p.seq_len)) - 1
    q[:, :, :cached] = 0
    padding = p.padding() if data.draw(st.booleans()) else None
    found = p.run(q[:, :, cached:], k, v, key_padding_mask=padding)
    assert found.transpose(1, 2).is_contiguous()
    if not (cached and p.chosen):  # blocks are chosen by queries that the call has
        torch.testing.assert_close(found, p.run(q, k, v, key_padding_mask=padding)[:, :, cached:], rtol=1e-9, atol=1e-9)


def test_the_first_block_after_a_cache_is_chosen_for_by_its_own_first_row() -> None:
    p = Problem(24, 4, 1, causal=True, window=0, batch=1, kv_heads=1)
    q, k, v = p.tensors()
    k[:, :, 4:8] += 3  # the second block is that of the first row, whatever the others want
    q[:, :, 16] = 5 * k[:, :, 5]
    found = p.run(q[:, :, 16:], k, v)
    seen = torch.zeros(4, 24, dtype=torch.bool)
    seen[:, 4:8] = True
    seen[:, 16:20] = torch.ones(4, 4, dtype=torch.bool).tril()
    own = torch.softmax((q[:, :, 16:20] @ k.mT / 2).masked_fill(~seen, float("-inf")), -1)
    q[:, :, 17:20] = q[:, :, 16:17]
    chosen = p.run(q[:, :, 16:], k, v)[:, :, 0]
    torch.testing.assert_close(found[:, :, 0], chosen, rtol=0, atol=0)
    assert (own[:, :, 0, 4:8].sum(-1) > 0.99).all()
    torch.testing.assert_close(found[:, :, 0], (own @ v)[:, :, 0], rtol=1e-2, atol=1e-2)


def test_heads_that_share_keys_share_their_chosen_blocks() -> None:
    p = Problem(40, 4, 2, causal=True, window=0, group=2, kv_heads=1)
    q, k, v = p.tensors()
    both = p.run(q, k, v)
    q[:, 1] = q[:, 0]  # the other head now wants what the first one wants
    assert not torch.allclose(p.run(q, k, v)[:, 0], both[:, 0])
    alone = p.run(q[:, :1], k, v)
    torch.testing.assert_close(p.run(q, k, v)[:, :1], alone)


@settings(max_examples=40, deadline=None)
@given(problems(causal=True), st.data())
def test_after_a_cache_no_output_depends_on_a_later_token(p: Problem, data: st.DataObject) -> None:
    q, k, v = p.tensors(torch.float32)
    cached = data.draw(st.integers(1, p.seq_len)) - 1
    last = data.draw(st.integers(cached, p.seq_len - 1))
    found = p.run(q[:, :, cached:], k, v)
    for x in (q, k, v):
        x[:, :, last + 1 :] = 7 * torch.randn_like(x[:, :, last + 1 :])
    rows = last + 1 - cached
    assert torch.equal(p.run(q[:, :, cached:], k, v)[:, :, :rows], found[:, :, :rows])


@settings(max_examples=30, deadline=None)
@given(problems(causal=True), st.data())
def test_after_a_cache_all_blocks_chosen_is_exact_attention(p: Problem, data: st.DataObject) -> None:
    p = replace(p, chosen=40)
    q, k, v = p.tensors(torch.float32)
    cached = data.draw(st.integers(1, p.seq_len)) - 1
    seen = torch.ones(p.seq_len - cached, p.seq_len, dtype=torch.bool).tril(cached)
    exact = F.scaled_dot_product_attention(q[:, :, cached:], k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(p.run(q[:, :, cached:], k, v), exact, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(problems(), st.booleans())
def test_all_blocks_chosen_is_exact_attention(p: Problem, masked: bool) -> None:
    p = replace(p, chosen=40)
    q, k, v = p.tensors(torch.float32)
    seen = ~p.padding()[:, None, None, :] if masked else torch.ones(1, 1, 1, p.seq_len, dtype=torch.bool)
    seen = seen & torch.ones(p.seq_len, p.seq_len, dtype=torch.bool).tril() if p.causal else seen
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).nan_to_num()
    exact = exact * seen.any(-1, keepdim=True)
    found = p.run(q, k, v, key_padding_mask=p.padding() if masked else None)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_equal_masses_take_the_first_block() -> None:
    p = Problem(24, 4, 2, causal=False, window=0)
    q, k, v = p.tensors()
    k = torch.zeros_like(k)  # every block has the same mass
    found = p.run(q, k, v)
    torch.testing.assert_close(found, p.run(q, k, v, chosen=40))
    masses = torch.tensor([[0.5, -1.0, 0.5, 0.7, 0.5]])
    index, is_block = module._first_blocks(masses, 3)
    assert index.tolist() == [[3, 0, 2]]
    assert is_block.all()
    index, is_block = module._first_blocks(masses[:, :2], 3)
    assert is_block.tolist() == [[True, False, False]]
    assert index.tolist() == [[0, 0, 0]]


def test_parts_of_the_blocks_give_what_all_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    for causal in (True, False):
        p = Problem(45, 4, 2, causal=causal, prefix=2, pad="pre")
        whole = p.run(*p.tensors())
        monkeypatch.setattr(module, "MOST_ELEMENTS", 1)
        torch.testing.assert_close(p.run(*p.tensors()), whole, rtol=1e-12, atol=1e-12)
        monkeypatch.undo()


def test_chosen_blocks_of_tiles() -> None:
    """Tiles of a grid: all chosen is exact, and so is a window beside some."""
    p = Problem(35, 6, 40, causal=False)
    q, k, v = p.tensors()
    tiles = {"grid": (5, 7), "tile": (2, 3), "block_size": None}
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(p.run(q, k, v, **tiles), exact)
    torch.testing.assert_close(p.run(q, k, v, **tiles, window=(1, 0)), exact)
    one, two = (torch.linalg.vector_norm(p.run(q, k, v, **tiles, chosen=n, window=0) - exact) for n in (1, 6))
    assert two < one


def test_a_prefix_at_the_end_gives_what_it_gives_at_the_start() -> None:
    p = Problem(23, 4, 2, causal=False, prefix=3)
    q, k, v = p.tensors()
    moved = [x.roll(-3, 2) for x in (q, k, v)]
    torch.testing.assert_close(p.run(*moved, prefix_at_end=True).roll(3, 2), p.run(q, k, v))
    with pytest.raises(InputError, match="'causal' needs its prefix at the start"):
        p.run(q, k, v, prefix_at_end=True, causal=True)


def test_gradients_of_second_order_exist() -> None:
    p = Problem(9, 3, 1, causal=True, prefix=1, batch=1, kv_heads=1)
    q, k, v = (x.requires_grad_() for x in p.tensors())
    assert torch.autograd.gradcheck(lambda *x: p.run(*x), (q, k, v))


@pytest.mark.parametrize("wrong", [{"num_iters": 2}, {"init": "mean"}])
def test_one_iteration_from_the_identity_start_alone(wrong: dict[str, object]) -> None:
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(IRError, match="'chosen' needs num_iters=1 and init='identity'"):
        Form(4, chosen=1, **wrong)
    with pytest.raises(InputError, match="'causal' needs num_iters=1 and init='identity'"):
        monarch_attention(q, q, q, block_size=4, causal=True, **wrong)


def test_what_causal_and_chosen_refuse() -> None:
    q, k = torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 8, 4)
    with pytest.raises(InputError, match="'causal' needs a key for each query; found 8 queries and 6 keys"):
        monarch_attention(k, q, q, block_size=4, causal=True)
    with pytest.raises(InputError, match="'chosen' needs as many queries as keys"):
        monarch_attention(q, k, k, block_size=4, chosen=1)
    with pytest.raises(InputError, match="'causal' needs pieces of the sequence"):
        monarch_attention(k, k, k, grid=(2, 4), tile=(2, 2), causal=True)


def test_a_form_with_chosen_blocks_prints_and_is_stored_with_them() -> None:
    assert "chosen" not in str(Form(4, window=1))
    assert "chosen" not in Form(4, window=1).stored()
    assert str(Form(4, window=1, chosen=3)).endswith("window=1, prefix=0, chosen=3)")
    assert Form(**Form(4, chosen=3).stored()) == Form(4, chosen=3)
    assert Form(4, chosen=3).simplest() == Form(4, window=0, chosen=3)
    assert Form(4, window=0).simplest(is_causal=True) == Form(4, window=0)
