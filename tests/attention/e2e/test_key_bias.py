"""A bias that is added to each key's scores, whatever the query: lowered with what it adds, and what it hides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

import monarch_compile
from monarch_compile.attention.ir import MaskKind
from monarch_compile.errors import InputError
from monarch_compile.integrations import replace_sdpa

OPTIONS = {"policy": "always", "block_size": 7}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would go to Inductor goes through AOTAutograd alone."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None, :])


def attend_to_itself(x: Tensor, bias: Tensor) -> Tensor:
    return attend(x, 2 * x, x, bias)


def inputs(keys: int = 41) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, 3, keys, 8, generator=generator) for _ in range(3))
    bias = 2 * torch.randn(2, keys, generator=generator)
    bias[1, keys // 2 :] = float("-inf")
    return q, k, v, bias


@pytest.mark.parametrize("block_size", [1, 64])
def test_the_extremes_are_exact_through_inductor(block_size: int) -> None:
    given = inputs()
    output = torch.compile(attend, backend="monarch", options=OPTIONS | {"block_size": block_size})(*given)
    assert counters["monarch"]["lowered"] == 1
    torch.testing.assert_close(output, attend(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "automatic"])
@pytest.mark.parametrize("form", [{"window": 1, "prefix": 3}, {"window": None, "num_iters": 2}], ids=str)
def test_the_backend_agrees_with_the_function(form: dict[str, object], dynamic: bool | None) -> None:
    call = torch.compile(attend_to_itself, backend="monarch", dynamic=dynamic, options=OPTIONS | form)
    for keys in (41, 60, 83):
        x, _, _, bias = inputs(keys)
        expected = monarch_compile.monarch_attention(x, 2 * x, x, key_bias=bias, block_size=7, **form)
        torch.testing.assert_close(call(x, bias), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, attend_to_itself(x, bias), atol=1e-3)
    assert counters["monarch"]["exact"] == 0


@pytest.mark.usefixtures("no_inductor")
def test_a_learned_bias_gets_its_gradient() -> None:
    found = []
    for call in (torch.compile(attend, backend="monarch", options=OPTIONS | {"block_size": 64}), attend):
        given = [x.requires_grad_() for x in inputs()]
        call(*given).square().sum().backward()
        found.append([x.grad for x in given])
    assert counters["monarch"]["lowered"] == 1
    assert found[0][3].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_report_says_so() -> None:
    report = monarch_compile.explain(attend, *inputs(), options=OPTIONS, measure=True)
    (site,) = report.sites
    assert (site.code, site.mask, site.ir.mask) == ("lowered", "key_bias", MaskKind.KEY_BIAS)
    assert "mask=key_bias" in str(site.ir)
    assert 0 < site.error < 1
    assert any("bias * LOG2E" in kernel.text for kernel in site.kernels)


def test_eager_calls() -> None:
    given = inputs()
    with replace_sdpa(policy="always", block_size=64, strict=True) as replaced:
        output = attend(*given)
    assert replaced.lowered == 1
    torch.testing.assert_close(output, attend(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key_bias": torch.zeros(2, 40)}, "key_bias must be floating"),
        ({"key_bias": torch.zeros(2, 41, dtype=torch.bool)}, "key_bias must be floating"),
        ({"key_padding_mask": torch.zeros(2, 41, dtype=torch.bool)}, "both given"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    q, k, v, bias = inputs()
    with pytest.raises(InputError, match=message):
        monarch_compile.monarch_attention(q, k, v, block_size=7, **({"key_bias": bias} | change))


@pytest.mark.parametrize("start", [torch.zeros, torch.randn])
def test_eager_calls_give_a_learned_bias_its_gradient(start: Callable[..., Tensor]) -> None:
    """Zeros that are learned are a bias, not a mask."""
    q, k, v, _ = inputs()
    first = start(2, 41)
    found = []
    for context in (replace_sdpa(policy="always", block_size=64, strict=True), contextlib.nullcontext()):
        bias = first.clone().requires_grad_()
        with context:
            F.scaled_dot_product_attention(q, k, v, bias[:, None, None].expand(-1, 3, 41, -1)).square().sum().backward()
        found.append(bias.grad)
    assert found[1].abs().max() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_learned_numbers_of_each_query_stay_exact_though_they_are_equal() -> None:
    q, k, v, _ = inputs()
    table = torch.zeros(41, 41, requires_grad=True)
    with replace_sdpa(policy="always", block_size=8) as replaced:
        F.scaled_dot_product_attention(q, k, v, table).square().sum().backward()
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, table)
    assert (replaced.exact, replaced.lowered, [*replaced.reasons]) == (1, 1, ["mask_general"])
    assert (table.grad.abs().amax(1) > 0).all()


@pytest.mark.usefixtures("no_inductor")
def test_a_learned_bias_gets_the_gradient_of_every_row() -> None:
    def full(x: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, 2 * x, x, torch.zeros(3, 41, 41) + 2 * bias[:, None, None, :])

    x, _, _, _ = inputs()
    found = []
    for call in (torch.compile(full, backend="monarch", options=OPTIONS | {"block_size": 64}), full):
        bias = torch.linspace(-1, 1, 82).view(2, 41).requires_grad_()
        call(x, bias).square().sum().backward()
        found.append(bias.grad)
    assert counters["monarch"]["lowered"] == 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form", [{"window": None}, {"window": 1, "prefix": 3}, {"num_iters": 3, "init": "mean"}], ids=str
)
@pytest.mark.parametrize("low", [-1e4, -65504.0, -1e9, -1e20])
def test_whole_blocks_of_very_low_biases_are_as_hidden(form: dict[str, object], low: float) -> None:
    """Finite ones, below which nothing is left of a key: no division by the nothing that a block gets."""
    q, k, v, _ = inputs()
    hidden = torch.arange(41).expand(2, 41) % 31 > torch.tensor([[8], [15]])
    bias = torch.zeros(2, 41).masked_fill(hidden, low).requires_grad_()
    given = [x.requires_grad_() for x in (q, k, v)]
    found = monarch_compile.monarch_attention(*given, key_bias=bias, block_size=7, **form)
    expected = monarch_compile.monarch_attention(q, k, v, key_padding_mask=hidden, block_size=7, **form)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (*given, bias))


@pytest.mark.usefixtures("no_inductor")
def test_large_integers_stay_apart_in_float64() -> None:
    def shifted(x: Tensor, times: Tensor) -> Tensor:
        return torch.softmax(x @ (2 * x).mT + times, -1) @ x

    x, times = inputs()[0].double(), 1_700_000_000 + torch.arange(41) % 5
    output = torch.compile(shifted, backend="monarch", options=OPTIONS | {"block_size": 64})(x, times)
    assert counters["monarch"]["lowered"] == 1
    torch.testing.assert_close(output, shifted(x, times), rtol=1e-5, atol=1e-5)
