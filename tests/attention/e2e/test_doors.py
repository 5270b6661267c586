"""replace_sdpa under torch.func, traces, subclasses and autocast: eager's numbers and dtypes, true reasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import monarch_compile
from monarch_compile.integrations import replace_sdpa
from monarch_compile.refusal import CODES

OPTIONS: dict[str, Any] = {"policy": "always", "block_size": 8}
GENERATOR = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 3, 21, 4, generator=GENERATOR) for _ in range(3))
HIDES = (torch.arange(21) < torch.tensor([[21], [12]]))[:, None, None].repeat(1, 1, 21, 1)


def _loss(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return sdpa(q, k, v, mask).square().sum()


def _per_sample() -> Tensor:
    found: Tensor = vmap(grad(lambda q, k, v: _loss(q[None], k[None], v[None])))(Q, K, V)
    return found


def _tangent() -> Tensor:
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        return forward_ad.unpack_dual(sdpa(forward_ad.make_dual(Q, K), K, V)).tangent


def _fake(mask: Tensor | None) -> tuple[Any, ...]:
    with FakeTensorMode() as fake_mode:
        q, k, v = map(fake_mode.from_tensor, (Q, K, V))
        found = sdpa(q, k, v, None if mask is None else fake_mode.from_tensor(mask))
    return tuple(found.shape), found.stride()


def _symbolic() -> str:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v)

    return str(torch.fx.symbolic_trace(Attention()).graph)


class Loud(Tensor):
    """A subclass that changes what attention gives."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found * 2 if func is sdpa else found


STAYS: dict[str, tuple[str, Callable[[], Any]]] = {
    "grad": ("transformed", lambda: grad(_loss)(Q, K, V)),
    "grad_with_a_mask": ("transformed", lambda: grad(_loss)(Q, K, V, HIDES)),
    "jacrev": ("transformed", lambda: jacrev(lambda q: sdpa(q, K[:1, :1], V[:1, :1]))(Q[:1, :1])),
    "per_sample": ("transformed", _per_sample),
    "vmap": ("transformed", lambda: vmap(sdpa)(Q[None], K[None], V[None])),
    "vmap_with_a_mask": ("transformed", lambda: vmap(sdpa)(Q[None], K[None], V[None], HIDES[None])),
    "vmap_of_the_mask": ("transformed", lambda: vmap(lambda mask: sdpa(Q, K, V, mask))(HIDES[None])),
    "forward_mode": ("transformed", _tangent),
    "fake": ("traced", lambda: _fake(None)),
    "fake_with_a_mask": ("traced", lambda: _fake(HIDES)),
    "make_fx": ("traced", lambda: make_fx(sdpa)(Q, K, V, HIDES)(Q, K, V, ~HIDES.tril())),
    "pre_dispatch": ("traced", lambda: make_fx(sdpa, pre_dispatch=True)(Q, K, V, HIDES)(Q, K, V, ~HIDES.tril())),
    "jit": (
        "traced",
        lambda: torch.jit.trace(lambda q: sdpa(q, q, q), (Q,), check_trace=False).graph.str().count("\n"),
    ),
    "symbolic_trace": ("traced", _symbolic),
    "subclass": ("tensor_subclass", lambda: sdpa(Q.as_subclass(Loud), K, V)),
    "subclass_of_the_mask": ("tensor_subclass", lambda: sdpa(Q, K, V, HIDES.as_subclass(Loud))),
    "meta": ("device", lambda: sdpa(*(x.to("meta") for x in (Q, K, V))).shape),
}


@pytest.mark.parametrize("name", STAYS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:There is a perf")
def test_what_is_transformed_or_traced_is_plain_sdpa(name: str) -> None:
    code, run = STAYS[name]
    expected = run()
    with replace_sdpa(**OPTIONS) as replaced:
        found = run()
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert found == expected
    assert (replaced.lowered, list(replaced.reasons)) == (0, [code])
    assert code in CODES


RAISES: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "dtypes": ("dtype", lambda: sdpa(Q, K, V.double())),
    "numbers_for_a_mask": ("sdpa_raises", lambda: sdpa(Q, K, V, HIDES.int())),
    "negative_dropout": ("dropout_active", lambda: sdpa(Q, K, V, dropout_p=-0.1)),
    "sparse_mask": ("layout", lambda: sdpa(Q, K, V, HIDES.to_sparse())),
    "shape_of_the_mask": ("sdpa_raises", lambda: sdpa(Q, K, V, HIDES[:, :, :7])),
    "dtype_of_the_mask": ("sdpa_raises", lambda: sdpa(Q.half(), K.half(), V.half(), HIDES.double())),
}


@pytest.mark.parametrize("name", RAISES)
def test_a_call_that_eager_refuses_raises_as_in_eager(name: str) -> None:
    code, run = RAISES[name]
    with pytest.raises(RuntimeError) as expected:
        run()
    with replace_sdpa(**OPTIONS) as replaced, pytest.raises(RuntimeError) as found:
        run()
    assert str(found.value) == str(expected.value)
    assert list(replaced.reasons) == [code]


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (F32, F32, BF16), (F16, BF16, F32), (F64, F64, F64)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast(dtypes: tuple[torch.dtype, ...], masked: bool) -> None:
    """One block is exact attention: so are the numbers, computed in float32 and rounded once."""
    q, k, v = (x.to(dtype) for x, dtype in zip((Q, K, V), dtypes, strict=True))
    mask = torch.zeros(HIDES.shape).masked_fill(~HIDES, -torch.inf) if masked else None
    if masked and q.dtype == F64:
        mask = HIDES  # a float mask would be cast, to another dtype than the queries'
    with torch.autocast("cpu", dtype=BF16):
        expected = sdpa(q, k, v, mask)
        with replace_sdpa(policy="always", block_size=64, strict=True) as replaced:
            found = sdpa(q, k, v, mask)
        with replace_sdpa(**OPTIONS):
            blocks = sdpa(q, k, v, mask)
    assert replaced.lowered == 1
    assert (found.dtype, found.stride()) == (expected.dtype, expected.stride())
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    with replace_sdpa(**OPTIONS):
        cast = [x.to(expected.dtype) for x in (q, k, v)]
        assert torch.equal(blocks, sdpa(*cast, HIDES if masked else None))


def test_autocast_that_cannot_make_one_dtype() -> None:
    with torch.autocast("cpu", dtype=BF16), replace_sdpa(**OPTIONS) as replaced, pytest.raises(RuntimeError):
        sdpa(Q.double(), K, V)
    assert list(replaced.reasons) == ["dtype"]


def test_autocast_does_not_reach_into_the_function() -> None:
    """16-bit attention is computed in float32, backward too."""

    def outcome() -> tuple[Tensor, ...]:
        q, k, v = (x.bfloat16().requires_grad_() for x in (Q, K, V))
        output = monarch_compile.monarch_attention(q, k, v, block_size=8, key_bias=HIDES[:, 0, 0].bfloat16())
        return output, *torch.autograd.grad(output.float().square().sum(), (q, k, v))

    expected = outcome()
    with torch.autocast("cpu", dtype=BF16):
        found = outcome()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["inference", "second_derivative"])
def test_what_runs_plainly_is_still_lowered(name: str) -> None:
    def inference() -> Tensor:
        with torch.inference_mode():
            return sdpa(Q, K, V, HIDES)

    def second_derivative() -> Tensor:
        q = Q.double().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (first,) = torch.autograd.grad(_loss(q, K.double(), V.double()), q, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), q)
        return second

    run = {"inference": inference, "second_derivative": second_derivative}[name]
    with replace_sdpa(policy="always", block_size=64) as replaced:
        torch.testing.assert_close(run(), run_plainly(run), rtol=1e-5, atol=1e-5)
    assert replaced.lowered == 1


def run_plainly(run: Callable[[], Tensor]) -> Tensor:
    with torch._C.DisableTorchFunction():
        return run()
