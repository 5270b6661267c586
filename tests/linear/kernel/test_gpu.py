"""The kernels of block linears on a CUDA device, against the float64 reference, over poisoned buffers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from monarch_compile.backend import monarch
from monarch_compile.codegen.linear.search import ERROR_BOUNDS, inputs
from monarch_compile.linear.ir import (
    BLAST,
    FUSED,
    KERNEL_FORMS,
    MONARCH,
    ORDERS,
    SPLIT,
    STAGED,
    BlockLinear,
    FormedLinear,
    LinearGradients,
)
from monarch_compile.linear.op import LINEAR_OP
from tests.linear.kernel.problems import HALF, error_of, formed, gradient_errors

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
WAYS = [(MONARCH, form) for form in KERNEL_FORMS] + [(BLAST, STAGED)]
TOKENS = (1, 2, 16, 17, 100, 256, 1000, 4096)


def bound(dtype: torch.dtype) -> float:
    return ERROR_BOUNDS[dtype]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("kind", "form"), WAYS)
def test_layers_at_every_number_of_tokens(kind: str, form: str, tokens: int) -> None:
    rank = 32 if kind == MONARCH else 256
    of = BlockLinear(kind, tokens, 1024, 1536, 8, 8, rank, HALF, bias=True, activation="gelu")
    assert error_of(FormedLinear(of, form), device=CUDA) < bound(HALF)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output_order", ORDERS)
@pytest.mark.parametrize(("kind", "form"), WAYS)
def test_odd_sizes(kind: str, form: str, dtype: torch.dtype, output_order: str) -> None:
    for changes in ({}, {"in_features": 100, "out_features": 300, "in_blocks": 5, "out_blocks": 4, "rank": 37}):
        of = replace(formed(form, kind=kind, dtype=dtype, output_order=output_order).of, **changes)
        assert error_of(FormedLinear(of, form), device=CUDA, few_terms=True) < bound(dtype)


@pytest.mark.parametrize(("in_features", "out_features", "blocks", "rank"), [
    (4096, 4096, 16, 64), (4096, 4096, 16, 32), (4096, 11008, 16, 64), (768, 3072, 4, 64), (1152, 4608, 8, 48),
])  # fmt: skip
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_layers_of_models(form: str, in_features: int, out_features: int, blocks: int, rank: int) -> None:
    of = BlockLinear(MONARCH, 272, in_features, out_features, blocks, blocks, rank, torch.bfloat16)
    assert error_of(FormedLinear(of, form), device=CUDA) < bound(torch.bfloat16)


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))


@settings(deadline=None, max_examples=8)
@given(st.sampled_from(WAYS), st.integers(1, 300), SIZES, st.booleans())
def test_any_sizes(way: tuple[str, str], tokens: int, sizes: tuple[int, ...], bias: bool) -> None:
    (kind, form), (ins, outs, p, q, rank) = way, sizes
    of = BlockLinear(kind, tokens, ins * p, outs * q, ins, outs, rank, HALF, bias=bias)
    assert error_of(FormedLinear(of, form), device=CUDA, few_terms=True) < bound(HALF)


@pytest.mark.parametrize("tokens", [1, 33, 1000, 4096])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("output_order", ORDERS)
def test_gradients(output_order: str, dtype: torch.dtype, tokens: int) -> None:
    limit = 2.0**-18 if dtype is torch.float32 else 2 * bound(dtype)
    for sizes in ((1024, 1536, 8, 8, 32), (36, 60, 2, 3, 5)):
        of = BlockLinear(MONARCH, tokens, *sizes, dtype, output_order=output_order)
        assert max(gradient_errors(LinearGradients(of), CUDA, few_terms=sizes[0] == 36)) < limit


def test_strides() -> None:
    """Transposed and strided inputs and factors give the same as contiguous ones."""
    x, first, second, _, bias = inputs(FormedLinear(BlockLinear(MONARCH, 64, 256, 384, 4, 4, 32, HALF), STAGED), CUDA)
    assert x is not None
    assert first is not None
    assert second is not None
    turned = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (x, first, second)]
    for form in KERNEL_FORMS:
        plain, other = (LINEAR_OP(*t, None, bias, "blocked", "none", form) for t in ((x, first, second), turned))
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-3)


class Layer(torch.nn.Module):
    """A Monarch linear spelled by hand, of 1024 features in 8 blocks of rank 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.randn(8, 128, 128, device=CUDA, dtype=HALF) / 11)
        self.second = torch.nn.Parameter(torch.randn(8, 128, 128, device=CUDA, dtype=HALF) / 11)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.bmm(x.reshape(-1, 8, 128).transpose(0, 1), self.first.mT)
        z = z.transpose(0, 1).reshape(-1, 128, 8).permute(2, 0, 1)
        return torch.bmm(z, self.second.mT).permute(1, 2, 0).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("policy", ["auto", "always"])
def test_compiled_with_gradients(policy: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Layer()
    compiled = torch.compile(model, backend=monarch, options={"policy": policy}, dynamic=dynamic, fullgraph=True)
    for tokens in (3, 2048):
        x = torch.randn(tokens, 1024, device=CUDA, dtype=HALF, requires_grad=True)
        found, wanted = _step(compiled, model, x), _step(_double(model), model, x.double())
        for own, other in zip(found, wanted, strict=True):
            error = (own.double() - other).norm() / other.norm()
            assert error < 2.0**-8


def _double(model: Layer) -> Any:
    def run(x: Tensor) -> Tensor:
        wide = {name: p.double() for name, p in model.named_parameters()}
        result: Tensor = torch.func.functional_call(model, wide, (x,))
        return result

    return run


def _step(function: Any, model: Layer, x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return (y.detach(), *torch.autograd.grad(y.sum(), (leaf, *model.parameters())))


@pytest.mark.parametrize(("tokens", "form"), itertools.product((1, 512), (*KERNEL_FORMS, "products", "dense", "auto")))
def test_every_form_in_a_cuda_graph(tokens: int, form: str) -> None:
    of = BlockLinear(MONARCH, tokens, 1024, 1024, 8, 8, 32, HALF)
    x, first, second, _, _ = inputs(FormedLinear(of, FUSED if form != SPLIT else SPLIT), CUDA)
    arguments = (x, first, second, None, None, "blocked", "none", form)
    plain = LINEAR_OP(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = LINEAR_OP(*arguments)
    graph.replay()
    assert torch.equal(plain, replayed)
