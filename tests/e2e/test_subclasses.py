"""Tensor subclasses: a model that stock Inductor compiles with them, monarch compiles, and says what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

import monarch_compile
from monarch_compile.attention.form import Form
from monarch_compile.attention.op import attention_with_lse
from monarch_compile.attention.reference import reference
from monarch_compile.attention.sharding import _shardings, shards_attention
from monarch_compile.errors import LoweringError
from monarch_compile.passes.memory import storages_of
from tests.support.backward_kernels import backward_kernels  # noqa: F401
from tests.support.block import Block
from tests.support.capture import run_passes
from tests.support.versions import sharded_heads

OPTIONS = {"policy": "always", "block_size": 8}


class Int8Weight(Tensor):
    """A weight of bytes and a scale, as quantisation libraries have it."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values_, self.scale = values, scale

    def __repr__(self, **_: object) -> str:
        return f"Int8Weight({list(self.shape)})"

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], meta: Any, size: Any, stride: Any) -> Int8Weight:
        return cls(inner["values_"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(*(func(x) for x in (args[0].values_, args[0].scale)))
        plain = pytree.tree_map_only(cls, lambda x: x.values_.to(x.scale.dtype) * x.scale, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class OwnLinear(Int8Weight):
    """The same, with a linear layer that reads what is inside."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, bias = args
            return (x @ weight.values_.to(x.dtype).T) * weight.scale.T + bias
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def with_weights(layers: int, make: Callable[[Tensor], Tensor]) -> nn.Sequential:
    """Layers of attention whose weights are of a subclass."""
    model = nn.Sequential(*(Block() for _ in range(layers))).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(make(module.weight.detach()), requires_grad=False)
    return model


def codes() -> dict[str, int]:
    return {name.removeprefix("exact: "): n for name, n in counters["monarch"].items() if n and name != "exact"}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd takes subclasses apart; what comes after it sees none."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))


def compiled(fn: Callable[..., Any], **options: object) -> Callable[..., Any]:
    return torch.compile(fn, backend="monarch", fullgraph=True, options=OPTIONS | options)


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Two ranks, of which this process is the first; nothing is sent."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@torch.no_grad()
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("weight", [Int8Weight, OwnLinear])
def test_plain_queries_of_quantised_weights_are_lowered(weight: type[Int8Weight]) -> None:
    model, x = with_weights(2, weight.of), torch.randn(2, 41, 24)
    output = compiled(model, strict=True)(x)
    assert codes() == {"lowered": 2}
    expected = x
    for layer in model:
        expected = layer.by_reference(expected, block_size=8)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("layers", [1, 2])
def test_attention_of_a_subclass_stays_exact(layers: int) -> None:
    model, x = with_weights(layers, lambda w: TwoTensor(w, w + 0.1)), torch.randn(2, 41, 24)
    output, expected = compiled(model)(x), model(x)
    assert codes() == {"tensor_subclass": layers}
    for part in ("a", "b"):
        torch.testing.assert_close(getattr(output, part), getattr(expected, part))
    with pytest.raises(Exception, match="TwoTensor") as raised:
        compiled(model, strict=True)(x)
    assert isinstance(raised.value.__cause__ or raised.value.inner_exception, LoweringError)


@torch.no_grad()
@pytest.mark.usefixtures("without_inductor")
def test_a_mask_of_a_subclass_stays_exact() -> None:
    q, visible = torch.randn(2, 3, 41, 8), torch.arange(41) < 30
    mask = TwoTensor(visible, visible.clone())
    output = compiled(lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask[None, None, None]))(q, mask)
    assert codes() == {"tensor_subclass": 1}
    torch.testing.assert_close(output.a, F.scaled_dot_product_attention(q, q, q, visible[None, None, None]))


@torch.no_grad()
@pytest.mark.usefixtures("without_inductor")
def test_attention_that_a_subclass_answers_itself_is_reported() -> None:
    keys, x = OwnLinear.of(torch.randn(2, 41, 8)), torch.randn(2, 41, 8)
    output = compiled(lambda x, k: F.scaled_dot_product_attention(x, k, x))(x, keys)
    assert codes() == {"tensor_subclass": 1}
    torch.testing.assert_close(output, F.scaled_dot_product_attention(x, keys, x))


def test_a_write_to_a_view_of_a_subclass_is_seen() -> None:
    """Views of a wrapper share memory inside it alone."""

    def fn(x: Tensor) -> Tensor:
        y = x * 1
        view = y.view(-1)
        view.add_(1)
        return y * 2

    with torch.no_grad():
        output, (result,) = run_passes(fn, TwoTensor(torch.ones(2, 3), torch.zeros(2, 3)))
    torch.testing.assert_close(output.a, torch.full((2, 3), 4.0))
    nodes = {node.name: storages_of(node) for node in result.after.graph.nodes if node.op == "call_function"}
    assert nodes["mul"] == nodes["reshape" if "reshape" in nodes else "view"]
    assert len(nodes["mul"]) == 2


@torch.no_grad()
@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("sharded", [0, pytest.param(1, marks=sharded_heads)], ids=["batch", "heads"])
def test_sharded_batches_and_heads_are_lowered(mesh: Any, sharded: int) -> None:
    """Each rank attends to what it holds: nothing is sent."""
    from torch.distributed.tensor import DTensor, Shard

    q, k, v = (torch.randn(2, 4, 41, 8) for _ in range(3))
    given = [DTensor.from_local(x, mesh, [Shard(sharded)], run_check=False) for x in (q, k, v)]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = torch.softmax(q @ k.mT, -1) @ v
        return torch.softmax(q @ k.mT, -1) @ v

    output = compiled(fn, strict=True)(*given)
    assert codes() == {"lowered": 2}
    assert output.placements == (Shard(sharded),)
    expected = monarch_compile.monarch_attention(q, k, v, block_size=8, scale=1.0)
    expected = monarch_compile.monarch_attention(expected, k, v, block_size=8, scale=1.0)
    torch.testing.assert_close(output.to_local(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads", "ways"), [(3, 3, 3), (4, 2, 3), (6, 3, 2)])
def test_heads_that_share_keys_stay_with_them(mesh: Any, heads: int, kv_heads: int, ways: int) -> None:
    """Three key heads over two ranks would be two and one; their six query heads would be three and three."""
    from torch.distributed.tensor import DTensor, Shard

    q, k = (
        DTensor.from_local(torch.randn(1, n, 5, 8), mesh, [Shard(0)], run_check=False)._spec for n in (heads, kv_heads)
    )
    assert len(_shardings(q, k, k, None, 0.5)) == ways


@pytest.mark.usefixtures("without_inductor")
def test_differentiated_dtensors_stay_exact(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Shard

    x = torch.randn(2, 3, 41, 8)
    given = DTensor.from_local(x, mesh, [Shard(0)], run_check=False).requires_grad_()
    output = compiled(lambda q: torch.softmax(q @ q.mT, -1) @ q)(given)
    assert codes() == {"tensor_subclass": 1}
    torch.testing.assert_close(output.to_local(), torch.softmax(x @ x.mT, -1) @ x)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sharded", [0, pytest.param(1, marks=sharded_heads)], ids=["batch", "heads"])
def test_operators_of_a_step_are_sharded(
    mesh: Any,
    backward_kernels: list[str],  # noqa: F811
    sharded: int,
    biased: bool,
) -> None:
    """Each rank differentiates what it holds; a bias gets a part of its gradient from the heads of each."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    assert shards_attention()
    local = [torch.randn(2, 4, 41, 8).requires_grad_() for _ in range(3)]
    arguments = (1.0, *Form(8).arguments(), None)
    given = [DTensor.from_local(x.detach(), mesh, [Shard(sharded)], run_check=False).requires_grad_() for x in local]
    bias = torch.randn(2, 41).requires_grad_()
    split = Shard(0) if sharded == 0 else Replicate()
    added = DTensor.from_local(bias.detach(), mesh, [split], run_check=False).requires_grad_()
    leaves = [*given, added] if biased else given
    output, lse = attention_with_lse(*given, added if biased else None, *arguments)
    assert output.placements == lse.placements == (Shard(sharded),)
    found = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert "backward" in backward_kernels
    expected = reference(*local, bias if biased else None, scale=1.0, block_size=8)
    grads = torch.autograd.grad(expected, [*local, bias] if biased else local, torch.ones_like(expected))
    for x, y in zip(found, grads, strict=True):
        torch.testing.assert_close(x.to_local(), y, rtol=1e-4, atol=1e-4)
    assert [x.placements for x in found[:3]] == [(Shard(sharded),)] * 3
    if biased:
        assert found[3].placements == ((split,) if sharded == 0 else (Partial(),))
