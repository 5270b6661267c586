"""Gradients by every path that training takes, against those of the eager reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.utils.checkpoint import checkpoint

from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.op import ATTENTION_OP, ATTENTION_WITH_LSE_OP, attention_with_lse
from monarch_compile.attention.reference import reference
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.calibration.instrument import with_attention
from tests.support.backward_kernels import backward_kernels  # noqa: F401
from tests.support.block import Block, key_padding
from tests.support.capture import run_passes
from tests.support.poison import Poisoned, between_margins

FORM = {"block_size": 8, "window": 1}
OPTIONS = {"policy": "always", "strict": True, **FORM}
ARGUMENTS = (0.5, *Form(8, window=1).arguments(), None, False)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd traces both passes and decides what is saved; what it gives runs as it is."""
    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))


@pytest.fixture(params=["reference", "kernels"])
def launched(request: pytest.FixtureRequest) -> list[str] | None:
    """The backward pass is the vjp of the reference, as on the CPU, or goes by kernels, as on CUDA."""
    return request.getfixturevalue("backward_kernels") if request.param == "kernels" else None


def by_kernels(launched: list[str] | None) -> bool:
    """Whether the backward pass went where it was to go."""
    return launched is None or "backward" in launched


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="monarch", options=OPTIONS | options)


def gradients_of(model: nn.Module, run: Callable[[], Tensor], times: int = 1) -> dict[str, Tensor]:
    """Gradients of a model's parameters, summed over calls."""
    model.zero_grad()
    for _ in range(times):
        run().sin().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def block() -> tuple[Block, Tensor, dict[str, Tensor]]:
    """A model, an input, and the model's gradients by the eager reference."""
    model, x = Block(), torch.randn(2, 41, 24, generator=torch.Generator().manual_seed(0))
    return model, x, gradients_of(model, lambda: model.by_reference(x, **FORM))


@pytest.mark.usefixtures("without_inductor")
def test_a_step(block: Any, launched: list[str] | None) -> None:
    model, x, expected = block
    assert_alike(gradients_of(model, lambda: compiled(model)(x)), expected)
    assert by_kernels(launched)
    assert counters["monarch"]["lowered"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, pytest.param("reduce-overhead", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("way", ["kernels", pytest.param("reference", marks=pytest.mark.nightly)])
def test_a_step_through_inductor(
    block: Any, poisoned: Poisoned, request: pytest.FixtureRequest, way: str, mode: str | None
) -> None:
    launched = request.getfixturevalue("backward_kernels") if way == "kernels" else None
    model, x, expected = block
    run, x = compiled(model, **({} if mode is None else {"mode": mode})), between_margins(x)
    for _ in range(2):
        assert_alike(gradients_of(model, lambda: run(x)), expected)
    assert by_kernels(launched)
    assert poisoned.num_buffers


@pytest.mark.usefixtures("without_inductor")
def test_gradients_of_several_steps_add_up(block: Any, launched: list[str] | None) -> None:
    model, x, expected = block
    run = compiled(model)
    found = gradients_of(model, lambda: run(x), times=2)
    assert_alike(found, {name: 2 * g for name, g in expected.items()})


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "around"])
def test_under_an_activation_checkpoint(block: Any, launched: list[str] | None, inside: bool) -> None:
    model, x, expected = block

    def layer(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    run = compiled(layer) if inside else compiled(model)
    call = (lambda: run(x)) if inside else (lambda: checkpoint(run, x, use_reentrant=False))
    assert_alike(gradients_of(model, call), expected)
    assert by_kernels(launched)
    assert counters["monarch"]["lowered"] == 1


@pytest.mark.usefixtures("without_inductor")
def test_compiled_autograd(block: Any, launched: list[str] | None) -> None:
    from torch._dynamo import compiled_autograd

    model, x, expected = block
    run = compiled(model)
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradients_of(model, lambda: run(x))
    assert_alike(found, expected)
    assert by_kernels(launched)


@pytest.mark.usefixtures("without_inductor")
def test_under_autocast(launched: list[str] | None) -> None:
    model, x = Block(), torch.randn(2, 41, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients_of(model, lambda: model.by_reference(x, **FORM))
        found = gradients_of(model, lambda: compiled(model)(x))
    assert_alike(found, expected, 3e-2)
    assert by_kernels(launched)


@pytest.mark.usefixtures("without_inductor")
def test_a_graph_that_is_kept_is_differentiated_twice(block: Any, launched: list[str] | None) -> None:
    model, x, expected = block
    loss = compiled(model)(x).sin().sum()
    for keep in (True, False):
        found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=keep)
        assert_alike(dict(zip(expected, found, strict=True)), expected)


def tensors(heads: int = 4, kv_heads: int = 2, seq_len: int = 41, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, n, seq_len, 8, dtype=dtype, generator=generator) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_what_is_frozen_has_no_gradient(launched: list[str] | None, frozen: int, way: str) -> None:
    given = [x.requires_grad_(place != frozen) for place, x in enumerate(tensors())]
    expected = reference(*given, None, scale=0.5, **FORM)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)

    output = attention_with_lse(*given, None, *ARGUMENTS)[0] if way == "eager" else compiled(attend)(*given)
    leaves = [x for x in given if x.requires_grad]
    found = torch.autograd.grad(output.sin().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sin().sum(), leaves))
    assert by_kernels(launched)


def test_the_vjp_of_what_is_frozen_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from monarch_compile.attention import gradients

    q, k, v = (x.requires_grad_(place == 2) for place, x in enumerate(tensors()))
    output, _ = attention_with_lse(q, k, v, None, *ARGUMENTS)
    found = gradients.by_reference(torch.ones_like(output), (q, k, v, None), (False, False, True, False), ARGUMENTS)
    assert [x is None for x in found] == [True, True, False, True]


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_a_learned_bias_of_the_keys(launched: list[str] | None, way: str) -> None:
    given = [*tensors(3, 3), torch.randn(2, 41)]
    given[3][1, 30:] = float("-inf")
    for x in given:
        x.requires_grad_()

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, bias[:, None, None, :], scale=0.5)

    output = attention_with_lse(*given, *ARGUMENTS)[0] if way == "eager" else compiled(attend)(*given)
    found = torch.autograd.grad(output.sin().sum(), given)
    expected = torch.autograd.grad(reference(*given, scale=0.5, **FORM).sin().sum(), given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert by_kernels(launched)


@pytest.mark.usefixtures("without_inductor")
def test_hidden_keys_get_no_gradient(launched: list[str] | None) -> None:
    given, visible = [x.requires_grad_() for x in tensors(2, 2)], key_padding(2, 41)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, visible[:, None, None], scale=0.5)

    found = torch.autograd.grad(compiled(attend)(*given).sin().sum(), given)
    expected = torch.autograd.grad(reference(*given, visible, scale=0.5, **FORM).sin().sum(), given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    hidden = ~visible[:, None, :, None].expand(2, 2, 41, 8)
    assert all((grad[hidden] == 0).all() for grad in found[1:])


@pytest.mark.usefixtures("without_inductor")
def test_lengths_one_after_another(launched: list[str] | None) -> None:
    model = Block()
    run = torch.compile(model, backend="monarch", options=OPTIONS, dynamic=True)
    for batch, seq_len in ((2, 41), (3, 33), (2, 64), (5, 100)):
        x = torch.randn(batch, seq_len, 24)
        found = gradients_of(model, lambda x=x: run(x))
        assert_alike(found, gradients_of(model, lambda x=x: model.by_reference(x, **FORM)), 1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_gradients_by_torch_func_of_the_function() -> None:
    """Without kernels: these have no rules for transforms."""
    given = tensors(2, 2)
    found = torch.func.grad(lambda q, k, v: monarch_attention(q, k, v, scale=0.5, **FORM).sin().sum(), (0, 1, 2))(
        *given
    )
    expected = torch.func.grad(lambda q, k, v: reference(q, k, v, scale=0.5, **FORM).sin().sum(), (0, 1, 2))(*given)
    torch.testing.assert_close(found, expected)


def test_gradients_by_torch_func_around_a_compiled_function(block: Any) -> None:
    """Dynamo does not compile what torch.func transforms from outside: it runs as it is, exactly."""
    model, x, _ = block
    found = torch.func.grad(lambda x: compiled(model)(x).sin().sum())(x)
    torch.testing.assert_close(found, torch.func.grad(lambda x: model(x).sin().sum())(x))
    assert not counters["monarch"]


def test_second_derivatives_are_those_of_the_reference(launched: list[str] | None) -> None:
    """Kernels have no derivatives of second order: where these are asked for, both passes are the reference's."""
    given = [x.requires_grad_() for x in tensors(2, 2, 19, torch.float64)]

    def second(attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attend(*given).sin().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    found = second(lambda q, k, v: attention_with_lse(q, k, v, None, *ARGUMENTS)[0])
    torch.testing.assert_close(found, second(lambda q, k, v: reference(q, k, v, None, scale=0.5, **FORM)))


@pytest.mark.usefixtures("without_inductor")
def test_the_function_in_compiled_code(block: Any, launched: list[str] | None) -> None:
    model, x, expected = block
    run = compiled(lambda x: model.by_reference(x, **FORM))
    assert_alike(gradients_of(model, lambda: run(x)), expected)
    assert by_kernels(launched)


def test_sites_of_a_model_that_asks_for_gradients_can_be_replaced(block: Any) -> None:
    model, x, expected = block
    run = with_attention(model, AttentionCall.monarch, OPTIONS)
    assert_alike(gradients_of(model, lambda: run(x)), expected)


# ---- which operator stands for a site --------------------------------------------------------------------------------


def targets(model: nn.Module, x: Tensor, **options: Any) -> list[Any]:
    """The operators that stand for the sites of a model."""
    _, results = run_passes(model, x, **(OPTIONS | options))
    ours = (ATTENTION_OP, ATTENTION_WITH_LSE_OP)
    return [node.target for result in results for node in result.after.graph.nodes if node.target in ours]


@contextlib.contextmanager
def _enabled() -> Iterator[None]:
    yield


@pytest.mark.parametrize(
    ("around", "options", "expected"),
    [
        (_enabled, {}, ATTENTION_WITH_LSE_OP),
        (torch.no_grad, {}, ATTENTION_OP),
        (torch.inference_mode, {}, ATTENTION_OP),
        (_enabled, {"num_iters": 2}, ATTENTION_OP),
        (_enabled, {"init": "mean"}, ATTENTION_OP),
        (_enabled, {"prefix": 17}, ATTENTION_OP),
    ],
)
def test_a_site_keeps_what_backward_kernels_read_where_they_will_run(around: Any, options: Any, expected: Any) -> None:
    with around():
        assert targets(Block(), torch.randn(2, 41, 24), **options) == [expected]


@pytest.mark.usefixtures("without_inductor")
def test_a_step_under_a_checkpoint_where_attention_stays_exact(block: Any) -> None:
    """What tracing saves is not counted by the checkpoint around the first call."""
    model, x, _ = block
    run = torch.compile(model, backend="monarch", options={"policy": "never"})
    found = gradients_of(model, lambda: checkpoint(run, x, use_reentrant=False))
    assert_alike(found, gradients_of(model, lambda: model(x)))


def test_a_frozen_model_keeps_nothing() -> None:
    assert targets(Block().requires_grad_(False), torch.randn(2, 41, 24)) == [ATTENTION_OP]
