"""Short depthwise convolutions beside long ones: which become sums, and that numbers and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.capture import run_passes
from torch import Tensor
from torch.fft import irfft, rfft

from monarch_compile.config import MonarchConfig
from monarch_compile.passes.convolution import short_sums
from monarch_compile.passes.pipeline import Rewrite, rewrite
from monarch_compile.report.explainer import explain
from monarch_compile.report.page import render

CHANNELS, LENGTH = 6, 10

Program = Callable[..., Any]


def long(u: Tensor, k: Tensor) -> Tensor:
    """A long convolution: the graph of every program has one, so that one is lowered."""
    n, dtype = 2 * u.shape[-1], torch.promote_types(u.dtype, torch.float32)
    return irfft(rfft(u.to(dtype), n=n) * rfft(k.to(dtype), n=n), n=n)[..., : u.shape[-1]].to(u.dtype)


def tensors(dtype: torch.dtype = torch.float64, taps: int = 3, channels: int = CHANNELS) -> tuple[Tensor, ...]:
    """x (2, LENGTH, channels) as of a linear layer, weight, bias, and a long filter of a third of the channels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    return normal(2, LENGTH, channels), normal(channels, 1, taps), normal(channels), normal(channels // 3, LENGTH)


@pytest.fixture
def on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short_sums, "DEVICES", frozenset({"cpu"}))


def _run(program: Program, given: tuple[Any, ...], **options: Any) -> tuple[Any, Rewrite]:
    output, (result,) = run_passes(program, *given, **options)
    return output, result


def _convolutions(result: Rewrite) -> list[Any]:
    return [n for n in result.after.graph.nodes if "conv" in str(n.target) and "long_convolution" not in str(n.target)]


def gated(x: Tensor, weight: Tensor, bias: Tensor | None, k: Tensor, **options: Any) -> Tensor:
    """As in Monarch Mixer: gates and the input are a third each of what a short convolution gives."""
    y = F.conv1d(x.transpose(1, 2), weight, bias, groups=weight.shape[0], **options)
    x1, x2, v = y[..., : x.shape[1]].chunk(3, 1)
    return long(v * x1, k[:, : v.shape[-1]]) * x2


def whole(x: Tensor, weight: Tensor, bias: Tensor | None, k: Tensor, **options: Any) -> Tensor:
    """The result of the short convolution is read as one."""
    y = F.conv1d(x.transpose(1, 2), weight, bias, groups=weight.shape[0], **options)
    return long(y, k.repeat(3, 1)[:, : y.shape[-1]]) + y.relu()


# ---- what becomes a sum ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("program", [gated, whole])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_sum_has_the_numbers_and_gradients_of_the_convolution(program: Program, dtype: torch.dtype) -> None:
    given = tuple(x.requires_grad_() for x in tensors(dtype))
    run = lambda *given: program(*given, padding=1)  # noqa: E731
    output, result = _run(run, given)
    assert _convolutions(result) == []
    (change,) = result.changes
    assert "depthwise convolution of 3 taps" in change.reason
    assert "test_short.py" in change.name
    wanted = run(*(x.detach().double().requires_grad_() for x in given))
    bound = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    assert _error(output, wanted) < bound
    exact = tuple(x.detach().double().requires_grad_() for x in given)
    own = torch.autograd.grad(output.sum(), given)
    for one, other in zip(own, torch.autograd.grad(run(*exact).sum(), exact), strict=True):
        assert _error(one, other) < bound


def _error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a short convolution; padding by a number or a word."""
    taps, dilation, length = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 12))
    rest = dilation * (taps - 1)
    padding = draw(st.sampled_from(["same", "valid", *range(6)]))
    sides = {"same": rest, "valid": 0}.get(padding, 2 * padding)
    return {
        "sizes": (draw(st.integers(1, 3)), draw(st.integers(1, 3)), max(length, rest - sides + 1)),
        "taps": taps,
        "options": {"dilation": dilation, "padding": padding},
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "seed": draw(st.integers(0, 100)),
    }


@given(problems())
@settings(max_examples=60, deadline=None)
def test_sums_are_as_accurate_as_one_rounding_of_float64(problem: dict[str, Any]) -> None:
    """Of any sizes; and each output is that of the float64 convolution rounded once, but for float32's rounding."""
    generator = torch.Generator().manual_seed(problem["seed"])
    batch, channels, length = problem["sizes"]
    shapes = [(batch, channels, length), (channels, 1, problem["taps"]), (channels,)]
    x, weight, bias = (torch.randn(shape, generator=generator).to(problem["dtype"]) for shape in shapes)
    bias = bias if problem["bias"] else None
    options = {"groups": channels, **problem["options"]}
    graph = torch.fx.Graph()
    nodes = [None if t is None else graph.placeholder(name) for name, t in (("x", x), ("w", weight), ("b", bias))]
    for node, value in zip(nodes, (x, weight, bias), strict=True):
        if node is not None:
            node.meta["val"] = value
    node = graph.call_function(_overload(options), _arguments(nodes, options))
    node.meta["val"] = F.conv1d(x, weight, bias, **options)
    graph.output(node)
    short = short_sums.short_convolution(node)
    rest = options["dilation"] * (problem["taps"] - 1)
    cut = rest - {"same": rest // 2, "valid": 0}.get(options["padding"], options["padding"])
    if short is None:
        assert cut > length, "only a tap that lies wholly beside the input is refused"
        return
    with graph.inserting_before(node):
        part = short_sums.Part(short, node, 0, channels, ())
        node.replace_all_uses_with(short_sums._sum_of(graph, part))
    found = torch.fx.GraphModule({}, graph)(*(t for t in (x, weight, bias) if t is not None))
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    wanted = F.conv1d(*wide, **options)
    sizes = F.conv1d(*(None if t is None else t.abs() for t in wide), **options)  # of the terms of each sum
    epsilon = torch.finfo(problem["dtype"]).eps
    assert found.dtype is problem["dtype"]
    assert found.shape == wanted.shape
    allowed = wanted.abs() * epsilon / 2 + sizes * 6 * torch.finfo(torch.float32).eps + 1e-7
    assert ((found.double() - wanted).abs() <= allowed).all()


def _overload(options: dict[str, Any]) -> Any:
    conv1d = torch.ops.aten.conv1d
    return conv1d.padding if isinstance(options["padding"], str) else conv1d.default


def _arguments(nodes: list[Any], options: dict[str, Any]) -> tuple[Any, ...]:
    padding = options["padding"]
    return (*nodes, [1], padding if isinstance(padding, str) else [padding], [options["dilation"]], options["groups"])


# ---- where a sum is computed -----------------------------------------------------------------------------------------


def _sizes_of_products(result: Rewrite) -> set[int]:
    """How many channels the sums have that are computed at once: of weights that are cut, or of whole ones."""
    cut = [n for n in result.after.graph.nodes if n.target is torch.ops.aten.slice.Tensor and n.args[1] == 0]
    return {n.args[3] - n.args[2] for n in cut}


def _in_order(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=2, groups=6)
    return long(y[:, 4:, 1:9], k[:, :8]) * y.narrow(1, 0, 2)[..., :8] + y[:, -4:-2, :8]


def _cropped(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    return gated(x, weight, bias, k, padding=2)


def _split(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    x1, x2, v = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6)[:, :, :9].split([2, 2, 2], 1)
    return long(v * x1, k[:, :9]) * x2


def _first_of_two(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    y, _ = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6).chunk(2, 1)
    return long(y[:, :2], k) + 1


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize(
    ("program", "channels"), [(_in_order, {2}), (_cropped, {2}), (_split, {2}), (_first_of_two, {3})]
)
def test_channels_that_are_taken_apart_are_computed_apart(program: Program, channels: set[int]) -> None:
    given = tensors()
    output, result = _run(program, given)
    torch.testing.assert_close(output, program(*given), rtol=1e-10, atol=1e-10)
    assert _convolutions(result) == []
    assert _sizes_of_products(result) == channels


def _returned(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    x1, x2, v = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6).chunk(3, 1)
    return long(v * x1, k) * x2, x1, v


def _written(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    x1, x2, v = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6).chunk(3, 1)
    x1.mul_(2)
    return long(v * x1, k) * x2


def _overlapping(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6)
    return long(y[:, :2] * y[:, 1:3], k) * y[:, :4].sum(1, keepdim=True)


def _viewed(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    x1, x2, v = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6).chunk(3, 1)
    return long(v * x1, k) * torch.as_strided(x2, (2, 2, 10), (60, 10, 1), 0)


def _input_written_later(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6)
    x.mul_(3)
    x1, x2, v = y.chunk(3, 1)
    return long(v * x1, k) * x2


def _taken_without_gradients(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6)
    x1, x2, v = y.chunk(3, 1)
    return long(v * x1, k) * x2


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize(
    "program", [_returned, _written, _overlapping, _viewed, _input_written_later, _taken_without_gradients]
)
def test_where_memory_or_modes_are_seen_nothing_is_computed_apart(program: Program) -> None:
    given, others = tensors(), tensors()
    for tensor in (given[3], others[3]):
        tensor.requires_grad_()
    (output, result), wanted = _run(program, given), program(*others)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)
    for one, other in zip(given, others, strict=True):
        torch.testing.assert_close(one, other)
    assert _sizes_of_products(result) == set()
    if isinstance(output, tuple):
        assert output[1].untyped_storage()._cdata == output[2].untyped_storage()._cdata
        assert output[1].stride() == wanted[1].stride()


# ---- dtypes, layouts, lengths ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("on_any_device")
def test_autocast_rounds_what_the_sum_is_given() -> None:
    def program(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6)
        return long(y.float(), k.repeat(3, 1))

    given = tensors(torch.float32)
    x, weight, bias, _ = (t.bfloat16().double() for t in given)
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6)
    wanted = long(y.bfloat16().double(), given[3].double().repeat(3, 1))
    output, result = _run(program, given)
    assert _convolutions(result) == []
    torch.testing.assert_close(output.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("program", [gated, whole])
def test_one_graph_of_many_lengths(program: Program) -> None:
    found: list[Rewrite] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append(rewrite(gm, example_inputs, MonarchConfig(policy="always")))
        return found[-1].after.forward

    module = Module(program, tensors()[1:]).eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=True, fullgraph=True)
    for length in (7, 9, 5):
        x = torch.randn(2, length, CHANNELS, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-9, atol=1e-9)
    assert len(found) == 1
    assert _convolutions(found[0]) == []


class Module(torch.nn.Module):
    """A program of x alone; the other tensors are parameters, whose sizes are numbers."""

    def __init__(self, program: Program, others: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.program = program
        self.others = torch.nn.ParameterList(others)

    def forward(self, x: Tensor) -> Tensor:
        others = [self.others[place] for place in range(len(self.others))]  # Dynamo of torch 2.11 cannot unpack them
        result: Tensor = self.program(x, *others, padding=2, dilation=2)
        return result


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_padding_modes(mode: str) -> None:
    module = torch.nn.Conv1d(6, 6, 3, padding=1, groups=6, padding_mode=mode).double()
    x, *_, k = tensors()
    program = lambda x, k: long(module(x.transpose(1, 2)), k.repeat(3, 1))  # noqa: E731
    output, result = _run(program, (x, k))
    torch.testing.assert_close(output, program(x, k), rtol=1e-10, atol=1e-10)
    assert _convolutions(result) == []


@pytest.mark.usefixtures("on_any_device")
def test_a_single_sequence_and_weights_that_are_not_finite() -> None:
    """No NaN comes of an infinite weight where the input has no points, as in PyTorch's kernel for CUDA."""

    def program(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
        y = F.conv1d(x[0].t(), weight, bias, padding=1, groups=6)
        return y + long(x.mT, k.repeat(3, 1))[0, :, :1]

    x, weight, bias, k = tensors()
    weight[1, 0, 0] = float("inf")
    output, result = _run(program, (x, weight, bias, k))
    assert _convolutions(result) == []
    wanted = program(x, weight, bias, k)
    assert output[1, 0].isfinite()
    output[1, 0] = wanted[1, 0] = 0
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)
    assert output[1, 1:].isinf().all()


@pytest.mark.usefixtures("on_any_device")
def test_a_result_lies_in_memory_as_the_convolutions() -> None:
    def program(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv1d(x.transpose(1, 2), weight, bias, padding=1, groups=6)
        return y, long(y, k.repeat(3, 1))

    given = tensors()
    (output, _), result = _run(program, given)
    assert _convolutions(result) == []
    assert output.stride() == program(*given)[0].stride()


# ---- what stays ------------------------------------------------------------------------------------------------------


def _with(weight: Callable[[Tensor], Tensor], **options: Any) -> Program:
    def program(x: Tensor, own: Tensor, bias: Tensor, k: Tensor) -> Tensor:
        y = F.conv1d(x.transpose(1, 2), weight(own), **options)
        return long(y, k[:1].repeat(y.shape[1], 1)[:, : y.shape[-1]])

    return program


def _transposed(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    return long(F.conv_transpose1d(x.mT, weight, bias, padding=1, groups=6), k.repeat(3, 1))


def _in_two_dims(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    y = F.conv2d(x.mT[:, :, None], weight[:, :, None], bias, padding=(0, 1), groups=6)
    return long(y[:, :, 0], k.repeat(3, 1))


def _without_a_long_one(x: Tensor, weight: Tensor, bias: Tensor, k: Tensor) -> Tensor:
    return F.conv1d(x.mT, weight, bias, padding=1, groups=6)


STAYS: dict[str, Program] = {
    "groups of two": _with(lambda w: w.repeat(1, 2, 1), groups=3, padding=1),
    "two results of a channel": _with(lambda w: w.repeat(2, 1, 1), groups=6, padding=1),
    "dense": _with(lambda w: w.repeat(1, 6, 1), padding=1),
    "stride of two": _with(lambda w: w, groups=6, stride=2),
    "five taps": _with(lambda w: w.repeat(1, 1, 2)[..., :5], groups=6, padding=2),
    "a tap that lies wholly beside the input": _with(lambda w: w, groups=6, dilation=11, padding=11),
    "transposed": _transposed,
    "in two dims": _in_two_dims,
    "without a long one": _without_a_long_one,
}


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("name", STAYS)
def test_other_convolutions_stay(name: str) -> None:
    given = tensors()
    output, result = _run(STAYS[name], given)
    assert len(_convolutions(result)) == 1
    assert result.changes == ()
    torch.testing.assert_close(output, STAYS[name](*given), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("on_any_device")
@pytest.mark.parametrize("options", [{"short_convolutions": False}, {"policy": "never"}])
def test_options_that_leave_them(options: dict[str, Any]) -> None:
    _, result = _run(whole, tensors(), **options)
    assert (len(_convolutions(result)), result.changes) == (1, ())


def test_a_cpu_is_left_to_pytorch() -> None:
    _, result = _run(whole, tensors())
    assert result.num_lowered == 1
    assert (len(_convolutions(result)), result.changes) == (1, ())


@pytest.mark.usefixtures("on_any_device")
def test_the_report_says_what_was_changed() -> None:
    report = explain(whole, *tensors(), options={"policy": "always"})
    (line,) = [line for line in str(report).splitlines() if line.startswith("changed: ")]
    assert "a depthwise convolution of 3 taps is a sum of 3 products" in line
    assert report.to_dict()["changes"] == [vars(change) for change in report.changes]
    assert "is a sum of 3 products" in render(report)
