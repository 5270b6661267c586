"""Whatever moves tokens and features around two products, numbers, gradients and strides stay."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from support.capture import run_passes
from torch import Tensor, nn

from monarch_compile.linear.op import LINEAR_OP

WIDTH, ROWS, RANK = 2, 3, 2


class Layer(nn.Module):
    """A layer whose moves are drawn: `answers` say which of its options it takes, one after the other."""

    def __init__(self, answers: list[int], blocks: int, kind: str, dynamic: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {
            "first": (blocks, blocks, RANK, WIDTH) if kind == "monarch" else (blocks, RANK, WIDTH),
            "second": (blocks, ROWS, blocks, RANK) if kind == "monarch" else (blocks, ROWS, RANK),
            "coupling": (blocks, blocks, RANK),
            "bias": (blocks * ROWS,),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)))
        self.answers, self.blocks, self.kind, self.dynamic = answers, blocks, kind, dynamic
        self.asked = 0

    def choose(self, options: list[Any]) -> Any:
        """One of some options."""
        self.asked += 1
        return options[self.answers[self.asked - 1] % len(options)]

    def moved(self, x: Tensor, features: int) -> Tensor:
        """Tokens permuted, merged or split; the last `features` dims stay."""
        tokens = x.dim() - features
        kind = self.choose(["nothing", "swap", "merge", "split", "last", "copy"])
        if kind == "swap" and tokens > 1:
            return x.transpose(0, tokens - 1)
        if kind == "merge" and tokens > 1:
            return x.flatten(0, tokens - 1)
        if kind == "split" and tokens == 1 and x.shape[0] % 2 == 0 and not self.dynamic:
            return x.unflatten(0, (2, -1))
        if kind == "last" and tokens:
            turned = x.movedim(0, -1).contiguous()
            return turned.movedim(-1, 0)
        return x.contiguous() if kind == "copy" else x

    def forward(self, x: Tensor) -> Tensor:
        self.asked = 0
        x = self.moved(x, 1)
        blocks = x.unflatten(-1, (self.blocks, WIDTH))
        if self.kind == "monarch":
            z = torch.einsum("...bp,blrp->...blr", blocks, self.first)
            z = self.moved(z, 3)
            spelled = self.choose(["apart", "together"])
            if spelled == "apart":
                y = torch.einsum("...blr,lqbr->...lq", z, self.second)
            else:
                z = self.moved(z.transpose(-3, -2).flatten(-2), 2)
                y = torch.einsum("...ls,lqs->...lq", z, self.second.flatten(2))
        else:
            z = self.moved(torch.einsum("...bp,brp->...br", blocks, self.first), 2)
            z = torch.einsum("...br,lbr->...lr", z, self.coupling)
            y = torch.einsum("...lr,lqr->...lq", self.moved(z, 2), self.second)
        y = self.moved(y, 2)
        end = self.choose(["blocked", "interleaved", "apart", "mixed"])
        if end == "apart":
            return y
        if end == "mixed" and y.dim() > 2:
            return y.transpose(0, -1).flatten(-2)
        y = self.moved((y.mT if end == "interleaved" else y).flatten(-2), 1)
        y = y + self.bias if self.choose([False, True]) else y
        return self.choose([F.relu, F.gelu, F.silu, torch.tanh, self.moved_tokens])(y)

    def moved_tokens(self, y: Tensor) -> Tensor:
        return self.moved(y, 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(0, 59), min_size=12, max_size=12), st.sampled_from([2, 3]),
    st.sampled_from(["monarch", "blast"]),
    st.lists(st.integers(1, 4), max_size=3), st.booleans(),
)  # fmt: skip
def test_numbers_and_gradients_stay(
    answers: list[int], blocks: int, kind: str, tokens: list[int], dynamic: bool
) -> None:
    layer = Layer(answers, blocks, kind, dynamic)
    generator = torch.Generator().manual_seed(1)
    size = math.prod(tokens) * blocks * WIDTH
    x = torch.randn(size, generator=generator, dtype=torch.float64).reshape(*tokens, blocks * WIDTH)
    for dim, count in enumerate(tokens):
        if dynamic and count > 1:
            torch._dynamo.mark_dynamic(x, dim)
    x.requires_grad_()
    expected = layer(x)
    output, (result,) = run_passes(layer, x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert [s for n, s in zip(output.shape, output.stride(), strict=True) if n != 1] == [
        s for n, s in zip(expected.shape, expected.stride(), strict=True) if n != 1
    ]
    codes = [d.code for d in result.decisions]
    event(f"{kind}: {codes}")
    assert codes in (["lowered"], ["block_order"])
    assert [node.target for node in result.after.graph.nodes].count(LINEAR_OP) == codes.count("lowered")
    weight = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).reshape(expected.shape)
    leaves = [x, *layer.parameters()]
    own, wanted = (torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True) for y in (output, expected))
    for one, other in zip(own, wanted, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
