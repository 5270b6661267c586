"""Higher-order ops: kept as they are, the attention outside them lowered, the attention inside them reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.capture import run_passes
from support.soundness import make_inputs
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch._inductor import compile_fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from monarch_compile.backend import monarch

Program = Callable[[Tensor, Tensor, Tensor], Any]
attend = F.scaled_dot_product_attention
EVERYTHING = create_block_mask(lambda b, h, q, k: q >= 0, None, None, 7, 7, device="cpu")


class Odd(torch.autograd.Function):
    """Twice the input, with a gradient that nothing but its own backward gives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7


def _checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(attend, q, k, v, use_reentrant=False), k, v)


def _spelled_in_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(lambda q, k: torch.softmax(q @ k.mT, -1) @ v, q, k, use_reentrant=False), k, v)


def _own_backward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Odd.apply(q) + attend(k, k, v)


def _own_backward_of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(Odd.apply(q), k, v)


def _either(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(torch.cond(q.sum() > 0, attend, lambda q, k, v: q * 2, (q, k, v)), k, v)


def _scanned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(scan(lambda c, x: (attend(c, k, v) + x, c * 1), q, torch.stack([q, k]))[0], k, v)


def _looped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    count = torch.tensor(0)
    return attend(while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, attend(x, x, x)), (count, q * 1))[1], k, v)


def _flexible(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(flex_attention(q, k, v, block_mask=EVERYTHING), k, v)


def _nothing_inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(torch.sin, q, use_reentrant=False), k, v)


CODES: dict[Program, list[str]] = {
    _checkpointed: ["in_body", "lowered"],
    _spelled_in_checkpoint: ["in_body", "lowered"],
    _own_backward: ["lowered"],
    _own_backward_of_queries: ["lowered"],
    _either: ["in_body", "lowered"],
    _scanned: ["in_body", "lowered"],
    _looped: ["in_body", "lowered"],
    _flexible: ["flex_attention", "lowered"],
    _nothing_inside: ["lowered"],
}


@pytest.mark.parametrize("fn", CODES, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore")
def test_sites_outside_are_lowered_and_sites_inside_reported(fn: Program) -> None:
    tensors = make_inputs()[:3]
    output, (result,) = run_passes(fn, *tensors)
    assert [d.code for d in result.decisions] == CODES[fn]
    assert all(d.name and d.reason for d in result.decisions)
    torch.testing.assert_close(output, fn(*tensors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fn",
    [_checkpointed, _spelled_in_checkpoint, _own_backward, _own_backward_of_queries],
    ids=lambda f: f.__name__.strip("_"),
)
def test_gradients_through_kept_ops(fn: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
    torch._dynamo.reset()
    counters.clear()

    def gradients(fn: Program) -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in make_inputs(dtype=torch.float64)[:3]]
        return torch.autograd.grad(fn(*leaves).square().sum(), leaves)

    options = {"policy": "always", "block_size": 1}
    compiled = torch.compile(fn, backend=monarch, fullgraph=True, options=options)
    torch.testing.assert_close(gradients(compiled), gradients(fn))
    assert counters["monarch"]["lowered"] == 1
    assert not counters["monarch"]["fallback"]
