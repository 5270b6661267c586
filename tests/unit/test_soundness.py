"""Never silently wrong: programs written to mislead the rewriting give eager's numbers, lowered or not.

With block_size=1 Monarch attention is exact, so a lowered program has to agree with eager too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from support.soundness import LOWERED, Program, agrees, attend, make_inputs, result_as_kernels_leave_it  # noqa: F401
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

import monarch_compile
from monarch_compile.backend import monarch
from monarch_compile.config import MonarchConfig
from monarch_compile.errors import LoweringError
from monarch_compile.passes.pipeline import rewrite

INF = float("inf")


# ---- the scores, the scale and the probabilities ---------------------------------------------------------------------

S: dict[str, tuple[Program, list[str]]] = {
    "probs_to_int": (lambda q, k, v, m: torch.softmax(q @ k.mT * 5, -1).to(torch.int32).float() @ v, ["probs_op"]),
    "probs_to_bool": (lambda q, k, v, m: torch.softmax(q @ k.mT, -1).to(torch.bool).float() @ v, ["probs_op"]),
    "scores_to_float8": (lambda q, k, v, m: attend((q @ k.mT).to(torch.float8_e4m3fn).float(), v), ["scores_op"]),
    "scale_to_int": (
        lambda q, k, v, m: attend(q @ k.mT * torch.tensor(2.7).to(torch.int32), v),
        ["scale_not_constant"],
    ),
    "scale_to_half": (lambda q, k, v, m: attend(q @ k.mT * torch.tensor(0.1).half().float(), v), [LOWERED]),
    "constant_as_large_as_a_mask": (
        lambda q, k, v, m: attend((q @ k.mT + -20000.0).masked_fill(~m[:, None, None], -1e4), v),
        ["scores_op"],
    ),
    "constant_nan": (lambda q, k, v, m: attend(q @ k.mT + float("nan"), v), ["scores_op"]),
    "small_constant": (lambda q, k, v, m: attend(q @ k.mT + 3.0 - torch.tensor(2.0), v), [LOWERED]),
    "mask_subtracted": (lambda q, k, v, m: attend(q @ k.mT - 1e9 * (1 - m.float())[:, None, None], v), [LOWERED]),
    "mask_subtracted_from": (lambda q, k, v, m: attend((1 - m.float())[:, None, None] - q @ k.mT, v), ["scores_op"]),
    "mask_with_alpha": (
        lambda q, k, v, m: attend(torch.add(q @ k.mT, (m.float() - 1)[:, None, None], alpha=1e9), v),
        [LOWERED],
    ),
    "head_dim_broadcast": (
        lambda q, k, v, m: attend(torch.einsum("bhqd,bhkd->bhqk", q[..., :1], k), v),
        ["head_dim"],
    ),
    "mask_broadcasts_the_scores": (
        lambda q, k, v, m: attend((q[0, 0] @ k[0, 0].mT).masked_fill(~m[:, None, None], -INF), v[:, :1]),
        ["scores_view"],
    ),
    "scores_viewed_after_the_mask": (
        lambda q, k, v, m: attend((q @ k.mT).masked_fill(~m[:, None, None], -INF).view(3, 2, 7, 7), v.view(3, 2, 7, 4)),
        [LOWERED],
    ),
    "mask_on_merged_heads": (
        lambda q, k, v, m: (
            torch.softmax(
                torch.bmm(q.reshape(6, 7, 4), k.reshape(6, 7, 4).mT)
                .masked_fill(~m.repeat_interleave(3, 0)[:, None], -INF)
                .view(2, 3, 7, 7),
                -1,
            )
            @ v
        ),
        [LOWERED],
    ),
    "plain_mm": (lambda q, k, v, m: attend(q[0, 0].mm(k[0, 0].t()), v[0, 0]), [LOWERED]),
}


@pytest.mark.parametrize("name", S)
def test_what_happens_to_the_scores(name: str) -> None:
    assert agrees(S[name][0]) == S[name][1]


# ---- masks -----------------------------------------------------------------------------------------------------------

AR = torch.arange
MASKS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "int8_overflow": (lambda m: AR(7, dtype=torch.int8) * 100 >= 0, LOWERED),
    "int32_overflow": (lambda m: AR(7, dtype=torch.int32) * 1000000000 >= 0, LOWERED),
    "int_fill_truncated": (lambda m: torch.full((7, 7), 0.5, dtype=torch.long) > 0, "mask_general"),
    "nan_is_not_itself": (
        lambda m: (m.float().masked_fill(~m, float("nan")) == m.float().masked_fill(~m, float("nan")))[:, None, None],
        LOWERED,
    ),
    "nan_is_neither": (lambda m: _neither(m.float().masked_fill(~m, float("nan")))[:, None, None], LOWERED),
    "symmetric": (lambda m: (m[:, :, None] & m[:, None, :])[:, None], "mask_general"),
    "transposed": (lambda m: m[0].expand(7, 7).T, "mask_general"),
    "flattened_square": (lambda m: m[:, :, None].expand(2, 7, 7).reshape(2, 49).view(2, 1, 7, 7), "mask_general"),
    "expand_as": (lambda m: m[:, None, None].expand_as(torch.empty(2, 1, 7, 7)), LOWERED),
    "repeat": (lambda m: m[:, None, None].repeat(1, 3, 7, 1), LOWERED),
    "repeat_of_rows": (lambda m: torch.stack([m, ~m], 1).repeat(1, 4, 1)[:, None, 1:], "mask_general"),
    "lengths": (lambda m: (AR(7) < torch.tensor([3, 7])[:, None])[:, None, None], LOWERED),
    "roll": (lambda m: m.roll(1, 1)[:, None, None], LOWERED),
    "per_query": (lambda m: m[:, None, :, None].expand(2, 1, 7, 7), "mask_general"),
}


def _neither(x: Tensor) -> Tensor:
    return (x <= 0.5) | (x > 0.5)


@pytest.mark.parametrize("name", MASKS)
def test_a_kept_mask(name: str) -> None:
    make, code = MASKS[name]
    assert agrees(lambda q, k, v, m: attend((q @ k.mT).masked_fill(~make(m), -1e9), v)) == [code]


ADDED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan_where_visible": (lambda m: (1 - m.float()) * -INF, LOWERED),
    "int32_overflow": (lambda m: (m.int() - 1) * 2147483647 * 2, LOWERED),
    "divided": (lambda m: (1 - m.float()) / -1e-9, LOWERED),
    "negated": (lambda m: -((1 - m.float()) * 1e9), LOWERED),
    "bfloat16": (lambda m: (1 - m.bfloat16()) * torch.finfo(torch.bfloat16).min, LOWERED),
    "scaled_away": (lambda m: (1 - m.float()) * -1e9 * 1e-9, LOWERED),
    "many_terms": (lambda m: sum(((m | (AR(7) > i)).float() - 1) * 1e9 for i in range(10)), LOWERED),  # type: ignore[return-value]
}


@pytest.mark.parametrize("name", ADDED)
def test_an_added_mask(name: str) -> None:
    make, code = ADDED[name]
    assert agrees(lambda q, k, v, m: attend(q @ k.mT + make(m)[:, None, None], v)) == [code]


# ---- modes, gradients, transforms ------------------------------------------------------------------------------------


def _scaled_without_grad(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    with torch.no_grad():
        scaled = q * 0.5
    return attend(scaled @ k.mT, v)


def _copied_without_grad(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    with torch.no_grad():
        copied = q.clone()
    return attend(copied @ k.mT, v)


def _scored_without_grad(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    with torch.no_grad():
        scores = q @ k.mT
    return attend(scores, v)


def _chained(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    y = attend((q @ k.mT).masked_fill(~m[:, None, None], -INF), v)
    return attend(y @ y.mT, y) * 1


def _result_written(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    y = attend(q @ q.mT, q)
    y.view(6, 28).mul_(2)
    return y


GRADIENTS = {
    _scaled_without_grad: 0,
    _copied_without_grad: 0,
    _scored_without_grad: 0,
    _chained: 2,
    _result_written: 1,
}


@pytest.mark.parametrize("fn", GRADIENTS, ids=lambda f: f.__name__.strip("_"))
def test_gradients_are_those_of_eager(fn: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    torch._dynamo.reset()
    counters.clear()
    options = {"policy": "always", "block_size": 1}

    def gradients(fn: Program) -> list[Tensor]:
        *tensors, visible = make_inputs(dtype=torch.float64)
        leaves = [t.requires_grad_() for t in tensors]
        found = torch.autograd.grad(fn(*leaves, visible).square().sum(), leaves, allow_unused=True)
        return [torch.zeros(1) if g is None or not g.any() else g for g in found]

    compiled = torch.compile(fn, backend=monarch, fullgraph=True, options=options)
    torch.testing.assert_close(gradients(compiled), gradients(fn))
    assert counters["monarch"]["lowered"] == GRADIENTS[fn]


def test_autocast_inside_the_model() -> None:
    """The dtypes seen are those that autocast gives, and the lowered form returns the dtype that eager does."""

    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            inside = attend(q @ k.mT, v)
            scores = q @ k.mT
        return inside, attend(scores.float(), v)

    output, (result,) = run_passes(fn, *make_inputs())
    assert [d.code for d in result.decisions] == [LOWERED, "context"]
    torch.testing.assert_close(output, fn(*make_inputs()), rtol=2e-2, atol=2e-2)
    assert not torch.is_autocast_enabled("cpu")


def test_what_cannot_be_traced_is_refused_aloud() -> None:
    """Tracing loses sight of values inside vmap; they must not become constants of the graph."""
    seen: list[Exception] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        with pytest.raises(LoweringError, match="function transform") as error:
            rewrite(gm, example_inputs, MonarchConfig(policy="always", block_size=1))
        seen.append(error.value)
        return gm.forward

    torch._dynamo.reset()
    q, k, v, _ = make_inputs()
    torch.compile(lambda q, k, v: torch.vmap(lambda a, b, c: attend(a @ b.mT, c))(q, k, v), backend=backend)(q, k, v)
    assert len(seen) == 1


def test_forward_mode_is_refused_and_leaves_nothing_behind() -> None:
    """Run while it is traced, it would be entered and never left."""

    def tangent(x: Tensor) -> Tensor:
        return torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1]

    x = torch.randn(4, 8)
    expected = tangent(x)
    for fn in (tangent, torch.vmap(tangent), torch.func.jacfwd(torch.tanh)):
        with pytest.raises(BackendCompilerFailed, match="forward-mode"):
            run_passes(fn, x)
        torch.testing.assert_close(tangent(x), expected)
    report = monarch_compile.explain(tangent, x)
    assert "all in them stays exact" in report.summary


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_casts_what_is_attended_to(by_hand: bool, inside: bool) -> None:
    """Normalised queries and keys are float32 there, values are not: the products cast all of them."""
    norm = torch.nn.LayerNorm(4)

    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        q, k, v = norm(q), norm(k), v.bfloat16()
        return attend(q @ k.mT, v) if by_hand else F.scaled_dot_product_attention(q, k, v)

    def within(*x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return fn(*x)

    if inside:
        output, (result,) = run_passes(within, *make_inputs(), block_size=128)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            output, (result,) = run_passes(fn, *make_inputs(), block_size=128)
    expected = within(*make_inputs())
    assert [d.code for d in result.decisions] == [LOWERED]
    assert result.decisions[0].ir.dtype == torch.bfloat16
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


# ---- symbolic sizes --------------------------------------------------------------------------------------------------


def _merged_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    b, h, n, d = q.shape
    scores = torch.bmm(q.reshape(-1, n, d), k.reshape(-1, n, d).mT).view(b, h, n, n)
    scores = scores + torch.where(m, 0.0, -1e9)[:, None, None]
    return torch.bmm(torch.softmax(scores.view(-1, n, n), -1), v.reshape(-1, n, d)).view(b, h, n, d)


def _per_query(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    b, h, n, _ = q.shape
    return attend((q @ k.mT).masked_fill(~m[:, None, :, None].expand(b, h, n, n), -1e9), v)


@pytest.mark.parametrize("fn", [_merged_heads, _per_query, _chained], ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("first", [(2, 4, 7, 4), (4, 4, 4, 4)], ids=["apart", "equal"])
def test_sizes_that_coincide_at_first(fn: Program, first: tuple[int, ...]) -> None:
    """Equal sizes share a symbol until they differ; then Dynamo compiles anew, with symbols that only it may make."""
    graphs: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        result = rewrite(gm, example_inputs, MonarchConfig(policy="always", block_size=1))
        graphs.append(result.num_lowered)
        return result.after.forward

    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, dynamic=True, fullgraph=True)
    for shape in (first, (3, 4, 6, 4), (5, 4, 3, 4), (4, 4, 9, 4)):
        tensors = make_inputs(shape)
        for tensor in tensors[:3]:
            for dim in (1, 3):
                torch._dynamo.mark_static(tensor, dim)
        torch.testing.assert_close(compiled(*tensors), fn(*tensors), rtol=1e-5, atol=1e-5)
    assert len(graphs) <= (1 if first[0] != first[2] else 2)
