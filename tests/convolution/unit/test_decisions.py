"""Which legal convolutions are lowered, by policy, device, plan and strict mode; symbolic sizes; bodies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.capture import decisions_of, run_passes
from support.convolutions import bidirectional, hyena, inputs, monarch_mixer, s4, time_reversed
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fft import irfft, rfft
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.two_tensor import TwoTensor

from monarch_compile import LoweringError, PlanError
from monarch_compile.attention.form import Form
from monarch_compile.backend import rewritten
from monarch_compile.calibration.plan import Plan, SitePlan
from monarch_compile.calls import launcher_of
from monarch_compile.config import MonarchConfig
from monarch_compile.convolution.op import CONVOLUTION_OP
from monarch_compile.cost.devices import device_for
from monarch_compile.passes.capture.trace import to_aten
from monarch_compile.passes.checks import first_refusal
from monarch_compile.passes.convolution import checks
from monarch_compile.passes.convolution import choose as choosing
from monarch_compile.passes.convolution.lower import to_ir
from monarch_compile.passes.convolution.match import find_sites
from monarch_compile.passes.convolution.region import ConvolutionRegion
from monarch_compile.passes.pipeline import Rewrite, rewrite

LENGTH = 12
N = 2 * LENGTH

Program = Callable[..., Any]


def _convolved(u: Tensor, k: Tensor) -> Tensor:
    return irfft(rfft(u, n=N) * rfft(k, n=N), n=N)


def _tensors() -> tuple[Tensor, Tensor]:
    u, k = (x.detach() for x in inputs(LENGTH)[:2])
    return u, k


# ---- policy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "code"), [("auto", "cpu_fft_wins"), ("never", "policy_never"), ("always", "lowered")]
)
def test_policy_on_a_cpu(policy: str, code: str) -> None:
    (decision,) = decisions_of(_convolved, *_tensors(), policy=policy)
    assert decision.code == code
    assert decision.ir is not None, "the report shows what it could be"


def _on_cuda(monkeypatch: pytest.MonkeyPatch, program: Program, dtype: torch.dtype, length: int, batch: int) -> str:
    """The code of a program of fake tensors, taken for those of an H100 that has kernels."""
    monkeypatch.setattr(choosing, "value_of", lambda node: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(choosing, "kernel_refusal", lambda device: None)
    monkeypatch.setattr(choosing, "installed", lambda device: device_for("cuda", "NVIDIA H100 80GB HBM3"))
    with FakeTensorMode():
        u, k, d = torch.empty(batch, 768, length, dtype=dtype), torch.empty(768, length), torch.empty(768)
        traced = torch.fx.experimental.proxy_tensor.make_fx(program, pre_dispatch=True)(u, k, d)
        result = rewrite(traced, (u, k, d), MonarchConfig(policy="auto"))
    (decision,) = result.decisions
    return str(decision.code)


def _model(u: Tensor, k: Tensor, d: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    y = irfft(rfft(u.float(), n=n) * rfft(k, n=n), n=n)[..., : u.shape[-1]]
    return (y + u * d[:, None]).to(u.dtype)


def _model_in_float32(u: Tensor, k: Tensor, d: Tensor) -> Tensor:
    return _model(u.float(), k, d)


@pytest.mark.parametrize(
    ("program", "dtype", "length", "batch", "code"),
    [
        (_model, torch.bfloat16, 4096, 16, "lowered"),
        (_model, torch.bfloat16, 1 << 21, 1, "cost_exact_wins"),
        (_model, torch.float16, 4096, 16, "lowered"),
        (_model, torch.float32, 4096, 16, "float32_result"),
        (_model_in_float32, torch.bfloat16, 4096, 16, "float32_result"),
    ],
)
def test_policy_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, program: Program, dtype: torch.dtype, length: int, batch: int, code: str
) -> None:
    assert _on_cuda(monkeypatch, program, dtype, length, batch) == code


def test_where_the_fft_is_predicted_to_win_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real = choosing.predict
    monkeypatch.setattr(choosing, "predict", lambda *args: real(*args).__class__(1.0, 1.0))
    assert _on_cuda(monkeypatch, _model, torch.bfloat16, 4096, 16) == "cost_exact_wins"


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "kernel_refusal", lambda device: "there are none")
    assert [d.code for d in decisions_of(_convolved, *_tensors())] == ["no_kernels"]


# ---- strict mode, plans ----------------------------------------------------------------------------------------------


def _strictly(program: Program, policy: str) -> None:
    config = MonarchConfig(policy=policy, strict=True, block_size=1)

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        rewritten(gm, example_inputs, config, launcher_of())
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=backend, fullgraph=True)(*_tensors())


def test_strict_mode_accepts_a_choice_and_no_near_miss() -> None:
    _strictly(_convolved, "always")
    _strictly(_convolved, "auto")
    with pytest.raises(Exception, match="spectrum_op") as caught:
        _strictly(lambda u, k: irfft(rfft(u, n=N) / rfft(k, n=N), n=N), "auto")
    assert LoweringError.__name__ in str(caught.type) + str(caught.value)


def _attention_and_convolution(u: Tensor, k: Tensor) -> Tensor:
    q = u[:, None]
    return scaled_dot_product_attention(q, q, q) + _convolved(u, k)[..., :LENGTH][:, None]


def test_a_plan_says_nothing_of_convolutions() -> None:
    """Neither does one that lists the site: the lowered form is as exact."""
    u, k = _tensors()
    found = decisions_of(_attention_and_convolution, u, k)
    attention, convolution = (decision.name for decision in found)
    for names in ((attention,), (attention, convolution)):
        sites = tuple(SitePlan(name, (), Form(4) if name == attention else None, "") for name in names)
        plan = Plan(sites, (names,), 0.1, 0.0, 1, 1, "cpu")
        codes = [d.code for d in decisions_of(_attention_and_convolution, u, k, plan=plan, block_size="auto")]
        assert codes == ["lowered", "lowered"]


def test_a_plan_still_knows_its_attention() -> None:
    plan = Plan((SitePlan("another", (), Form(4)),), (("another",),), 0.1, 0.0, 1, 1, "cpu")
    with pytest.raises(Exception, match="the plan does not fit this model") as caught:
        decisions_of(_attention_and_convolution, *_tensors(), plan=plan, block_size="auto")
    assert PlanError.__name__ in str(caught.type) + str(caught.value)


# ---- symbolic sizes --------------------------------------------------------------------------------------------------


def _compiled(program: Program, found: list[Rewrite]) -> Program:
    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        found.append(rewrite(gm, example_inputs, MonarchConfig(policy="always")))
        return found[-1].after.forward

    torch._dynamo.reset()
    return torch.compile(program, backend=backend, dynamic=True, fullgraph=True)


def _middle(u: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
    n, middle = u.shape[-1] + k.shape[-1], k.shape[-1] // 2
    return irfft(rfft(u, n=n) * rfft(k, n=n), n=n)[..., middle : middle + u.shape[-1]]


def _last(u: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n) / n, n=n)[..., -u.shape[-1] :]


@pytest.mark.parametrize("program", [hyena, monarch_mixer, bidirectional, s4, time_reversed, _middle, _last])
def test_one_graph_serves_every_length(program: Program) -> None:
    found: list[Rewrite] = []
    compiled = _compiled(program, found)
    for length, batch in ((12, 2), (31, 3), (128, 2)):
        tensors = inputs(length, batch=batch)
        torch.testing.assert_close(compiled(*tensors), program(*tensors), rtol=1e-9, atol=1e-9)
    assert len(found) == 1
    targets = [node.target for node in found[0].after.graph.nodes]
    assert CONVOLUTION_OP in targets
    assert not [target for target in targets if "fft" in str(target)]


def _orthonormal_filter(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return irfft(rfft(u, n=n) * rfft(k, n=n, norm="ortho"), n=n)


def test_what_symbolic_sizes_rule_out() -> None:
    found: list[Rewrite] = []
    compiled = _compiled(_orthonormal_filter, found)
    u, k = torch.randn(2, 3, 20), torch.randn(3, 9)
    torch.testing.assert_close(compiled(u, k), _orthonormal_filter(u, k))
    assert [d.code for d in found[0].decisions] == ["scale_not_constant"]


def _symbolic_region() -> ConvolutionRegion:
    regions = []

    def backend(gm: GraphModule, example_inputs: list[Any]) -> Any:
        regions.extend(find_sites(to_aten(gm, example_inputs)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(_last, backend=backend, dynamic=True, fullgraph=True)(*_tensors())
    (region,) = regions
    return region


def test_sizes_that_no_graph_here_has() -> None:
    """Fake tensors guard on most of these before they get here."""
    region = _symbolic_region()
    assert _code(region) is None
    odd = replace(region, ending=replace(region.ending, length=region.seq_len % 7 + 1))
    assert _code(odd) == "symbolic_dims"
    assert _code(replace(region, points=8)) == "symbolic_dims", "the input may be longer"
    unknown = region.seq_len.node.shape_env.create_unbacked_symint()
    assert _code(replace(region, points=unknown)) == "data_dependent"


# ---- bodies, transforms, devices -------------------------------------------------------------------------------------


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(u, k)
        return _convolved(u, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def test_an_autograd_function_is_reported() -> None:
    u, k = _tensors()
    decisions = decisions_of(_Own.apply, u.requires_grad_(), k)
    assert [d.code for d in decisions] == ["in_body"]
    assert "an autograd function" in decisions[0].reason


def test_in_a_branch() -> None:
    u, k = _tensors()

    def program(u: Tensor, k: Tensor) -> Tensor:
        return torch.cond(u.sum() > 0, lambda u: _convolved(u, k), lambda u: torch.cat([u, u], -1), (u,))

    with torch.no_grad():
        output, (result,) = run_passes(program, u, k)
        torch.testing.assert_close(output, program(u, k))
    assert [d.code for d in result.decisions] == ["lowered"]
    assert "in the true branch of cond" in result.decisions[0].name


def _region(program: Program = _convolved) -> ConvolutionRegion:
    traced = torch.fx.experimental.proxy_tensor.make_fx(program, tracing_mode="fake", pre_dispatch=True)(*_tensors())
    (site,) = find_sites(traced)
    assert isinstance(site, ConvolutionRegion)
    return site


def _code(region: ConvolutionRegion) -> str | None:
    refusal = first_refusal(region, checks.CHECKS)
    return None if refusal is None else refusal.code


def test_checks_of_what_a_cpu_graph_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    region = _region()
    assert _code(region) is None
    source: Node = region.u.node
    kept = source.meta["val"]
    source.meta["val"] = kept.to("meta")
    assert _code(region) == "device"
    source.meta["val"] = TwoTensor(torch.zeros(kept.shape), torch.zeros(kept.shape))
    assert _code(region) == "tensor_subclass"
    source.meta["val"] = kept
    monkeypatch.setattr("monarch_compile.passes.checks.active_transform", lambda: "torch.func")
    assert _code(region) == "transformed"


def test_transforms_of_16_bits_are_not_taken_over() -> None:
    """A GPU transforms float16 to complex numbers of 16 bits each; filters are not added in these."""
    with FakeTensorMode():
        u, k = torch.empty(2, 3, 16, device="cuda").half(), torch.empty(3, 16, device="cuda").half()
        program = lambda u, k: irfft(rfft(u) * (rfft(k) + rfft(k).conj()), n=16)  # noqa: E731
        traced = torch.fx.experimental.proxy_tensor.make_fx(program, pre_dispatch=True)(u, k)
    (region,) = find_sites(traced)
    assert isinstance(region, ConvolutionRegion)
    ir = to_ir(region)
    assert (ir.dtype, ir.filter_dtype, ir.out_dtype) == (torch.float16, torch.float32, torch.float16)


def test_scales_that_are_no_numbers() -> None:
    for scale in (float("inf"), float("nan")):
        region = _region(lambda u, k: irfft(rfft(u, n=N) * rfft(k, n=N) * scale, n=N))  # noqa: B023
        assert _code(region) == "scale"


def test_a_part_of_a_tensor_does_not_leave_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    region = _region(lambda u, k: _convolved(u, k)[..., :LENGTH])
    assert _code(region) is None
    monkeypatch.setattr(checks, "enclosing", lambda graph: object())
    assert _code(region) == "in_body"
