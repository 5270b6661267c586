"""Tensor parallelism over gloo: plans of torch around compiled models, and operators on DTensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from monarch_compile.attention.functional import monarch_attention
from monarch_compile.backend import monarch
from monarch_compile.convolution.op import long_convolution
from monarch_compile.distributed import register_shardings
from monarch_compile.linear.op import block_linear
from tests.support.ranks import RANKS, Pool, pool_of_ranks
from tests.support.versions import OLDER

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool_of_ranks(str(tmp_path_factory.mktemp("ranks"))) as found:
        yield found


class Attention(nn.Module):
    """Projections of their own, fewer key heads, as many heads as the projections' outputs hold."""

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 8 * n) for n in (heads, kv_heads, kv_heads))
        self.out = nn.Linear(8 * heads, 16)

    def forward(self, x: Tensor, by_hand: bool = False) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if by_hand:
            y = monarch_attention(q, k, v, block_size=8)
        else:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def train_by_heads(mesh: Any, heads: int, kv_heads: int) -> dict[str, int]:
    """A block whose heads are split by a plan of torch; what was lowered."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch._dynamo.reset()
    counters.clear()
    compile_fx.compile_fx = lambda gm, inputs, config_patches=None: aot_eager(gm, inputs)
    model = Attention(heads, kv_heads)
    whole = copy.deepcopy(model)
    plan = {name: ColwiseParallel() for name in "qkv"} | {"out": RowwiseParallel()}
    parallelize_module(model, mesh._flatten("all"), plan)
    run: Any = torch.compile(model, backend=monarch, options={"policy": "always", "block_size": 8})
    x = torch.randn(2, 41, 16, generator=torch.Generator().manual_seed(1))
    output, expected = run(x), whole(x, by_hand=True)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    output.square().sum().backward()
    expected.square().sum().backward()
    for own, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-4)
    return {name: n for name, n in counters["monarch"].items() if n}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 4)])
def test_plans_of_torch_split_heads(pool: Pool, heads: int, kv_heads: int) -> None:
    assert pool.run(train_by_heads, heads, kv_heads) == [{"lowered": 1}] * RANKS


def shard_operators(mesh: Any, name: str, dim: int) -> list[str]:
    """An operator on DTensors whose first input is split along a dim: results, gradients, and where the result is."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    assert register_shardings()
    flat = mesh._flatten("all")
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "convolution": ((4, 8, 12), (8, 12), (8,), (4, 8, 12), (4, 8, 12)),
        "linear": ((4, 8, 12), (3, 2, 5, 4), (2, 7, 3, 5)),
    }
    tensors = [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes[name]]
    places = {
        "convolution": (Shard(dim), *([Shard(0)] * 2 if dim == 1 else [Replicate()] * 2), Shard(dim), Shard(dim)),
        "linear": (Shard(dim), Replicate(), Replicate()),
    }

    def call(*given: Any) -> Any:
        if name == "convolution":
            return long_convolution(*given, 24, 12, 0, 1.0, torch.float32)
        return block_linear(*given, None, None, "blocked", "none")

    given = [
        distribute_tensor(x.detach(), flat, [p]).requires_grad_() for x, p in zip(tensors, places[name], strict=True)
    ]
    output, expected = call(*given), call(*tensors)
    torch.testing.assert_close(output.full_tensor(), expected, **TOLERANCE)
    if OLDER and (name, dim) != ("linear", 0):  # DTensor cannot flip, nor merge sharded dims: it says so
        with pytest.raises((NotImplementedError, RuntimeError), match=r"aten\.flip|flatten multiple dimensions"):
            torch.autograd.grad(output.square().sum(), given)
        return [str(place) for place in output.placements]
    grads = torch.autograd.grad(expected.square().sum(), tensors)
    found = torch.autograd.grad(output.square().sum(), given)
    for x, y in zip(found, grads, strict=True):
        torch.testing.assert_close(x.full_tensor(), y, rtol=1e-4, atol=1e-4)
    return [str(place) for place in output.placements]


@pytest.mark.parametrize(("name", "dim"), [("convolution", 0), ("convolution", 1), ("linear", 0), ("linear", 1)])
def test_operators_are_sharded(pool: Pool, name: str, dim: int) -> None:
    assert pool.run(shard_operators, name, dim) == [[f"S({dim})"]] * RANKS
