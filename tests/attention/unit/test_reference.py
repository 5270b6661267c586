"""The facts of Monarch attention, each for all inputs, in float64, against a dense form written apart."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.dense import dense_monarch, objective
from torch import Tensor

from monarch_compile.attention.functional import monarch_attention
from monarch_compile.errors import InputError

EPS = 1e-10
OPTIONS = ("block_size", "num_iters", "init", "pad", "window", "prefix")


@dataclass(frozen=True)
class Problem:
    batch: int
    heads: int
    n_q: int
    n_k: int
    dim: int
    value_dim: int
    block_size: int
    num_iters: int
    init: str
    pad: str
    spread: float
    seed: int
    window: int | None = None
    prefix: int = 0
    group: int = 1  # query heads that share a key head

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        heads = self.heads * self.group
        q = self.spread * torch.randn(self.batch, heads, self.n_q, self.dim, generator=g, dtype=torch.float64)
        k = torch.randn(self.batch, self.heads, self.n_k, self.dim, generator=g, dtype=torch.float64)
        v = torch.randn(self.batch, self.heads, self.n_k, self.value_dim, generator=g, dtype=torch.float64)
        return q, k, v

    def mask(self, share: float = 0.4) -> Tensor:
        """Padding mask, True where a key is ignored."""
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, self.n_k, generator=g) < share

    def options(self) -> dict[str, object]:
        """Those of `Form`."""
        return {n: getattr(self, n) for n in OPTIONS}

    def run(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, **changes: object) -> Tensor:
        options = self.options() | changes
        return monarch_attention(q, k, v, key_padding_mask=padding, **options)

    def dense(self, q: Tensor, k: Tensor, visible: Tensor, **more: Tensor) -> object:
        options = self.options() | more
        return dense_monarch(q, k, visible, scale=self.dim**-0.5, **options)


@st.composite
def problems(draw: st.DrawFn, square: bool = True, groups: bool = True) -> Problem:
    n_q = draw(st.integers(1, 24))
    n_k = n_q if square else draw(st.integers(1, 24))
    return Problem(
        batch=draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        n_q=n_q,
        n_k=n_k,
        dim=draw(st.sampled_from([1, 3, 8])),
        value_dim=draw(st.sampled_from([1, 3, 5])),
        block_size=draw(st.integers(1, n_k + 3)),
        num_iters=draw(st.integers(1, 3)),
        init=draw(st.sampled_from(["identity", "mean"])),
        pad=draw(st.sampled_from(["post", "pre"])),
        spread=draw(st.sampled_from([0.1, 1.0, 6.0])),
        seed=draw(st.integers(0, 2**20)),
        window=draw(st.sampled_from([None, 0, 1, 2, 30])) if groups else None,
        prefix=draw(st.sampled_from([0, 1, 4, 30])) if groups else 0,
        group=draw(st.sampled_from([1, 1, 2, 3])),
    )


def _exact(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
    mask = None if padding is None else ~padding[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _close(x: Tensor, y: Tensor) -> None:
    torch.testing.assert_close(x, y, rtol=EPS, atol=EPS)


@settings(max_examples=60, deadline=None)
@given(problems(square=False), st.booleans())
def test_reference_is_the_dense_form(p: Problem, masked: bool) -> None:
    q, k, v = p.tensors()
    padding = p.mask() if masked else torch.zeros(p.batch, p.n_k, dtype=torch.bool)
    output = p.run(q, k, v, padding if masked else None)
    for b in range(p.batch):
        for h in range(p.heads * p.group):
            kv = h // p.group
            _close(output[b, h], p.dense(q[b, h], k[b, kv], ~padding[b]).matrix @ v[b, kv])


@settings(max_examples=60, deadline=None)
@given(problems(square=False), st.floats(-1e6, 1e6))
def test_a_bias_of_the_keys_is_in_every_score(p: Problem, shift: float) -> None:
    """Against the dense form, whatever is added to all of them; -inf hides a key as a mask does."""
    q, k, v = p.tensors()
    hidden = p.mask()
    bias = 2 * torch.randn(p.batch, p.n_k, generator=torch.Generator().manual_seed(p.seed), dtype=q.dtype)
    output = p.run(q, k, v, key_bias=(bias + shift).masked_fill(hidden, float("-inf")))
    for b in range(p.batch):
        for h in range(p.heads * p.group):
            kv = h // p.group
            found = p.dense(q[b, h], k[b, kv], ~hidden[b], bias=bias[b]).matrix @ v[b, kv]
            torch.testing.assert_close(output[b, h], found, rtol=1e-8, atol=1e-8)
    _close(p.run(q, k, v, key_bias=torch.zeros_like(bias).masked_fill(hidden, -1e38)), p.run(q, k, v, hidden))


@settings(max_examples=60, deadline=None)
@given(problems(square=False))
def test_fact_1_rows_are_distributions_and_output_is_linear_in_v(p: Problem) -> None:
    q, k, v = p.tensors()
    matrix = p.run(q, k, torch.eye(p.n_k, dtype=q.dtype).expand(p.batch, p.heads, -1, -1))
    assert (matrix >= -EPS).all()
    _close(matrix.sum(-1), torch.ones_like(matrix[..., 0]))
    output = p.run(q, k, v)
    v = v.repeat_interleave(p.group, 1)
    _close(output, matrix @ v)
    assert (output <= v.amax(2, keepdim=True) + EPS).all()
    assert (output >= v.amin(2, keepdim=True) - EPS).all()
    _close(p.run(q, k, 2 * p.tensors()[2] + 1), 2 * output + 1)


@settings(max_examples=60, deadline=None)
@given(problems(square=False), st.sampled_from(["one key a block", "one block"]), st.booleans())
def test_fact_2_the_extremes_are_exact_attention(p: Problem, extreme: str, masked: bool) -> None:
    q, k, v = p.tensors()
    padding = p.mask() if masked else None
    if padding is not None:
        padding[:, 0] = False
    block_size = 1 if extreme == "one key a block" else p.n_k + p.seed % 3
    _close(p.run(q, k, v, padding, block_size=block_size), _exact(q, k, v, padding))


@settings(max_examples=60, deadline=None)
@given(problems())
def test_fact_3_the_objective_rises_and_is_bounded(p: Problem) -> None:
    q, k, _ = (t[0, 0] for t in p.tensors())
    objectives = p.dense(q, k, torch.ones(p.n_k, dtype=torch.bool)).objectives
    for earlier, later in itertools.pairwise(objectives):
        assert later >= earlier - 1e-9 * max(1, abs(earlier))
    assert objectives[-1] <= torch.logsumexp(p.dim**-0.5 * q @ k.mT, -1).sum() + 1e-9


@settings(max_examples=60, deadline=None)
@given(problems())
def test_fact_4_diagonal_blocks_are_exact_at_the_start(p: Problem) -> None:
    """A row's own block: within it, exact local attention; its weight, the exact local logsumexp against all blocks."""
    q, k, _ = (t[0, 0] for t in p.tensors())
    scale, size = p.dim**-0.5, p.block_size
    identity = torch.eye(p.n_k, dtype=q.dtype)[None, None]
    matrix = monarch_attention(q[None, None], k[None, None], identity, block_size=size, window=None)[0, 0]
    scores = scale * q @ k.mT
    for row in range(p.n_q):
        own = slice(row // size * size, row // size * size + size)
        local = scores[row, own]
        _close(matrix[row, own] / matrix[row, own].sum(), torch.softmax(local, -1))
    row_value = [
        (matrix[r] * (scores[r] - torch.where(matrix[r] > 0, matrix[r].log(), 0.0))).sum() for r in range(p.n_q)
    ]
    for row, value in enumerate(row_value):
        own = slice(row // size * size, row // size * size + size)
        share = matrix[row, own].sum()
        _close(share, torch.exp(torch.logsumexp(scores[row, own], -1) - value))


@settings(max_examples=40, deadline=None)
@given(problems(square=False))
def test_fact_5_rectangular_attention(p: Problem) -> None:
    assume(p.n_q != p.n_k)
    q, k, v = p.tensors()
    output = p.run(q, k, v)
    assert output.shape == (p.batch, p.heads * p.group, p.n_q, p.value_dim)
    _close(output[0, 0], p.dense(q[0, 0], k[0, 0], torch.ones(p.n_k, dtype=torch.bool)).matrix @ v[0, 0])


@settings(max_examples=40, deadline=None)
@given(problems())
def test_fact_6_symmetries(p: Problem) -> None:
    q, k, v = p.tensors()
    output = p.run(q, k, v)
    _close(p.run(q.flip(0, 1), k.flip(0, 1), v.flip(0, 1)), output.flip(0, 1))
    g = torch.Generator().manual_seed(p.seed)
    start = 0 if p.pad == "post" else -(-p.n_k // p.block_size) * p.block_size - p.n_k
    block = (torch.arange(p.n_k) + start) // p.block_size
    order = torch.argsort(block * 10.0 + torch.rand(p.n_k, generator=g))
    without = p.run(q, k, v, prefix=0)  # the prefix is a place in the sequence
    _close(p.run(q, k[:, :, order], v[:, :, order], prefix=0), without)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_fact_7_exact_attention_maximises_the_objective_of_each_row(p: Problem) -> None:
    q, k, _ = (t[0, 0] for t in p.tensors())
    matrix = p.dense(q, k, torch.ones(p.n_k, dtype=torch.bool)).matrix
    scores = p.dim**-0.5 * q @ k.mT
    for row in range(p.n_q):
        assert objective(matrix[row], scores[row]) <= torch.logsumexp(scores[row], -1) + 1e-9


@settings(max_examples=40, deadline=None)
@given(problems(square=False), st.booleans())
def test_a_window_over_everything_or_a_prefix_of_everything_is_exact_attention(p: Problem, masked: bool) -> None:
    q, k, v = p.tensors()
    padding = p.mask() if masked else None
    if padding is not None:
        padding[:, 0] = False
    blocks = -(-p.n_k // p.block_size)
    exact = _exact(q, k, v, padding)
    _close(p.run(q, k, v, padding, window=blocks - 1), exact)
    _close(p.run(q, k, v, padding, window=None, prefix=max(p.n_q, p.n_k)), exact)


@settings(max_examples=60, deadline=None)
@given(problems(square=False), st.sampled_from(["none", "mask", "bias"]))
def test_a_prefix_at_the_end_is_one_at_the_start(p: Problem, mask: str) -> None:
    """The same tokens put first give the same rows, in the other order."""
    q, k, v = p.tensors()
    told = {"none": None, "mask": p.mask(), "bias": p.mask().double().log()}[mask]  # 0 where hidden by the mask, -inf
    name = "key_bias" if mask == "bias" else "key_padding_mask"
    found = monarch_attention(q, k, v, **{name: told}, **p.options(), prefix_at_end=True)
    first = (x.roll(p.prefix % x.shape[2], 2) for x in (q, k, v))
    told = None if told is None else told.roll(p.prefix % p.n_k, 1)
    _close(found.roll(p.prefix % p.n_q, 2), monarch_attention(*first, **{name: told}, **p.options()))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_a_row_whose_keys_are_all_covered_is_exact(p: Problem) -> None:
    """Under a key mask that leaves a row only its window and the prefix, groups give it softmax attention."""
    assume(p.window is not None)
    q, k, v = p.tensors()
    after = max(p.n_k - p.prefix, 0)
    start = 0 if p.pad == "post" else -(-after // p.block_size) * p.block_size - after
    block = (torch.arange(p.n_k) - p.prefix + start) // p.block_size
    row = p.seed % p.n_q
    hidden = ((block - block[row]).abs() > p.window) & (torch.arange(p.n_k) >= p.prefix)
    padding = hidden.expand(p.batch, -1)
    _close(p.run(q, k, v, padding)[:, :, row], _exact(q, k, v, padding)[:, :, row])


@settings(max_examples=60, deadline=None)
@given(problems(square=False, groups=False), st.sampled_from([None, 0, 1, 2]), st.sampled_from([0, 1, 3]))
def test_a_group_never_lowers_the_objective(p: Problem, window: int | None, prefix: int) -> None:
    """At one iteration, row by row: R does not depend on the window, and the logsumexp of a group is at least any value
    of its keys inside a block, which is <R, s> + H(R)."""
    q, k, _ = (t[0, 0] for t in p.tensors())
    options = {"block_size": p.block_size, "num_iters": 1, "init": p.init, "pad": p.pad, "scale": p.dim**-0.5}
    visible = torch.ones(p.n_k, dtype=torch.bool)
    scores = p.dim**-0.5 * q @ k.mT
    wider = 0 if window is None else window + 1
    matrices = [
        dense_monarch(q, k, visible, **options, window=w, prefix=s).matrix
        for w, s in ((None, prefix), (window, prefix), (wider, prefix))
    ]
    for row in range(p.n_q):
        values = [objective(matrix[row], scores[row]) for matrix in matrices]
        assert values == sorted(values) or max(a - b for a, b in itertools.pairwise(values)) < 1e-9


@settings(max_examples=60, deadline=None)
@given(problems(square=False))
def test_padded_keys_have_no_influence_and_blind_rows_are_zero(p: Problem) -> None:
    q, k, v = p.tensors()
    padding = p.mask(0.7)
    padding[0] = True
    output = p.run(q, k, v, padding)
    assert output.isfinite().all()
    assert (output[0] == 0).all()
    hidden = padding[:, None, :, None]
    _close(p.run(q, k.masked_fill(hidden, 1e3), v.masked_fill(hidden, -1e6), padding), output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 2, 50, 16).to(dtype) for _ in range(3))
    output = monarch_attention(q, k, v, block_size=7)
    wide = monarch_attention(q.double(), k.double(), v.double(), block_size=7)
    assert output.dtype == dtype
    assert (output.double() - wide).abs().max() <= 2 * torch.finfo(dtype).eps * v.double().abs().max()


def test_output_memory_is_in_batch_seq_heads_order() -> None:
    q, k, v = (torch.randn(2, 3, 20, 4) for _ in range(3))
    output = monarch_attention(q, k, v, block_size=5)
    assert output.transpose(1, 2).is_contiguous()


def test_gradients_flow_and_agree_with_finite_differences() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 7, 3, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    padding = torch.zeros(1, 7, dtype=torch.bool)
    padding[0, 4:] = True
    for window, prefix in ((None, 0), (0, 1), (1, 0)):
        options = {"block_size": 2, "num_iters": 2, "window": window, "prefix": prefix}
        assert torch.autograd.gradcheck(
            lambda q, k, v, options=options: monarch_attention(q, k, v, key_padding_mask=padding, **options), (q, k, v)
        )


BAD_INPUTS = {
    "q, k and v must be (batch": lambda q: (q[0], q[0], q[0], {}),
    "must agree": lambda q: (q, q[:, :1], q, {}),
    "num_heads must be a multiple of k's": lambda q: (q[:, :1], q, q, {}),
    "no size may be 0": lambda q: (q[:, :, :0], q[:, :, :0], q[:, :, :0], {}),
    "share one floating dtype": lambda q: (q, q.half(), q, {}),
    "key_padding_mask must be bool": lambda q: (q, q, q, {"key_padding_mask": torch.zeros(1, 5)}),
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_is_named(message: str) -> None:
    q, k, v, options = BAD_INPUTS[message](torch.randn(1, 2, 5, 4))
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        monarch_attention(q, k, v, **({"block_size": 2} | options))
