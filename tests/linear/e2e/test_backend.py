"""Block linears through `torch.compile(backend="monarch")` on a CPU: spelled by hand, and made by `compress_`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.block_linears import (
    Factors,
    assert_same_gradients,
    blast,
    bmm_interleaved,
    einsum_dots,
    given,
    with_gelu,
    with_relu,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters

from monarch_compile import BlastLinearConfig, MonarchLinearConfig, compress_, explain
from monarch_compile.backend import monarch
from monarch_compile.export import lower_exported

ALWAYS = {"policy": "always"}
CONFIGS = [MonarchLinearConfig(num_blocks=2, rank=4), BlastLinearConfig(num_blocks=2, rank=3, iterations=2)]


def _compiled(model: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend=monarch, options=options or {}, fullgraph=True, **kwargs)


@pytest.mark.parametrize("program", [bmm_interleaved, with_relu, with_gelu, blast, einsum_dots])
def test_numbers_and_gradients(program: Any) -> None:
    model, x = Factors(program, dtype=torch.float32), given(2, 5, dtype=torch.float32)
    output, expected = _compiled(model, ALWAYS)(x), model(x)
    assert counters["monarch"]["lowered"] == 1
    assert counters["monarch"]["exact"] == 0
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(model, x, output, expected, rtol=1e-3, atol=1e-2)


def test_one_compilation_serves_many_tokens() -> None:
    model = Factors(with_relu, dtype=torch.float32)
    compiled = _compiled(model, ALWAYS, dynamic=True)
    with torch.no_grad():
        for tokens in (5, 7, 64):
            x = given(tokens, dtype=torch.float32)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_policy_auto_leaves_it_to_inductor_and_says_why() -> None:
    model, x = Factors(bmm_interleaved, dtype=torch.float32), given(5, dtype=torch.float32)
    report = explain(model, x)
    (site,) = report.sites
    assert (site.family, site.status, site.code) == ("linear", "exact", "no_gain")
    text = str(report)
    assert "5x12->10, monarch rank 3" in text
    assert "2x2" in text
    assert "0 of 1 block linears lowered in 1 graph" in text
    assert "policy='always', which changes no numbers but rounding" in text
    torch.testing.assert_close(_compiled(model, {"strict": True})(x), model(x), rtol=1e-4, atol=1e-4)


def test_under_autocast() -> None:
    model, x = Factors(with_relu, dtype=torch.float32), given(6, dtype=torch.float32)

    def run(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    compiled = _compiled(run, ALWAYS)
    output, expected = compiled(x), run(x)
    assert counters["monarch"]["lowered"] == 1
    assert output.dtype is expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.05, atol=0.2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def _net(config: Any) -> Net:
    torch.manual_seed(0)
    model = Net()
    compress_(model, config, calls=torch.randn(32, 8), progress=False)
    return model


@pytest.mark.parametrize("backend", ["monarch", "inductor", "aot_eager"])
@pytest.mark.parametrize("config", CONFIGS, ids=["monarch", "blast"])
def test_a_compressed_model_compiles_whole_and_trains(config: Any, backend: str) -> None:
    model, x = _net(config), torch.randn(2, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=monarch if backend == "monarch" else backend, fullgraph=True)
    output, expected = compiled(x), model(x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    leaves = list(model.parameters())
    own, wanted = (torch.autograd.grad(y.square().sum(), leaves) for y in (output, expected))
    for one, other in zip(own, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=["monarch", "blast"])
def test_a_compressed_model_is_exported(config: Any) -> None:
    model, x = _net(config).eval(), torch.randn(6, 8)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},))
    other = torch.randn(9, 8)
    torch.testing.assert_close(program.module()(other), model(other))
    lowered = lower_exported(program, options=ALWAYS)
    torch.testing.assert_close(lowered.module()(other), model(other), rtol=1e-4, atol=1e-4)


def test_a_program_spelled_by_hand_is_exported() -> None:
    model, x = Factors(with_relu, dtype=torch.float32).eval(), given(5, dtype=torch.float32).detach()
    lowered = lower_exported(torch.export.export(model, (x,)), options=ALWAYS)
    assert "block_linear" in str(lowered.graph)
    torch.testing.assert_close(lowered.module()(x), model(x), rtol=1e-4, atol=1e-4)
