"""Steps of training on a CUDA device: gradients by kernels through every path, against the reference in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from monarch_compile.attention import op
from monarch_compile.backend import monarch
from tests.support.block import Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORM = {"block_size": 64, "window": 1}
OPTIONS = {"policy": "always", "strict": True, **FORM}
SEQ_LEN = 700


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def model() -> Block:
    return Block(128, 2).cuda()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, SEQ_LEN, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


def gradients_of(model: Block, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.compiler.cudagraph_mark_step_begin()
    run(x).sin().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expected_of(model: Block, x: Tensor) -> dict[str, Tensor]:
    double = Block(128, 2).cuda().double()
    double.load_state_dict(model.state_dict())
    return gradients_of(double, lambda x: double.by_reference(x, **FORM), x.double())


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        error = (grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["plain", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step(model: Block, x: Tensor, options: dict[str, Any], dynamic: bool) -> None:
    run = torch.compile(model, backend=monarch, options=OPTIONS | options, dynamic=dynamic)
    for given in (x, x[:, :650].contiguous()) if dynamic else (x, x + 1, x):
        assert_close(gradients_of(model, run, given), expected_of(model, given), 1e-2)


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_under_a_checkpoint(model: Block, x: Tensor, inside: bool) -> None:
    def layer(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(layer if inside else model, backend=monarch, options=OPTIONS)
    run = compiled if inside else lambda x: checkpoint(compiled, x, use_reentrant=False)
    assert_close(gradients_of(model, run, x), expected_of(model, x), 1e-2)


def test_a_step_under_autocast(model: Block, x: Tensor) -> None:
    run = torch.compile(model, backend=monarch, options=OPTIONS)
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients_of(model, run, x)
    assert_close(found, expected_of(model, x), 3e-2)


def test_the_backward_pass_runs_on_kernels(model: Block, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    vjp = op.gradients.by_reference

    def noted(*arguments: Any) -> Any:
        asked.append(True)
        return vjp(*arguments)

    monkeypatch.setattr(op.gradients, "by_reference", noted)
    with torch.compiler.config.patch(force_disable_caches=True):
        torch.compile(model, backend=monarch, options=OPTIONS)(x).sum().backward()
        assert not asked
        torch.compile(model, backend=monarch, options=OPTIONS | {"num_iters": 2})(x).sum().backward()
        assert asked


def test_a_step_takes_little_more_memory_than_exact_attention() -> None:
    """At most 1.5 times as much."""
    q, k, v = (torch.randn(1, 12, 8192, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))

    def peak(attend: Callable[..., Tensor]) -> int:
        gc.collect()  # what other tests left must not be freed meanwhile
        for _ in range(2):
            torch.cuda.synchronize()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.autograd.grad(attend(q, k, v).sum(), (q, k, v))
        return torch.cuda.max_memory_allocated() - held

    exact = torch.nn.functional.scaled_dot_product_attention
    lowered = torch.compile(exact, backend=monarch, options={"policy": "always", "window": 1})
    assert peak(lowered) <= 1.5 * peak(exact)
