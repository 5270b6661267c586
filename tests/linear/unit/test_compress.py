"""`compress_`: what it replaces, what it refuses, and what its modules can do."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import monarch_compile
from monarch_compile import BlastLinearConfig, CompressionReport, MonarchLinearConfig, compress_
from monarch_compile.errors import ConfigError, InputError
from monarch_compile.linear.compression import compress, moments
from monarch_compile.linear.compression.loading import load_compressed_
from monarch_compile.linear.modules import BlastLinear, MonarchLinear

MONARCH = MonarchLinearConfig(num_blocks=2, rank=4)
BLAST = BlastLinearConfig(num_blocks=2, rank=3, iterations=3)


class Net(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 12, layers: int = 2) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width, bias=False))
            for _ in range(layers)
        )

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        for block in self.body:
            x = x + scale * block(x)
        return x


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def run(model: nn.Module, config: Any = MONARCH, **kwargs: Any) -> CompressionReport:
    return compress_(model, config, progress=False, **kwargs)


def linears(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, MonarchLinear, BlastLinear))]


@pytest.mark.parametrize(("config", "made"), [(MONARCH, MonarchLinear), (BLAST, BlastLinear)])
def test_every_linear_is_replaced_in_place_and_told(config: Any, made: type) -> None:
    model = Net().eval()
    biases = [m.bias for m in linears(model)]
    dense = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    model.body[0][0].weight.requires_grad_(False)
    report = run(model, config)
    assert [type(m) for m in linears(model)] == [made] * 4
    assert [m.bias for m in linears(model)] == biases
    assert [m.training for m in linears(model)] == [False] * 4
    assert [m.first.requires_grad for m in linears(model)] == [False, True, True, True]
    assert [layer.name for layer in report.layers] == ["body.0.0", "body.0.2", "body.1.0", "body.1.2"]
    for layer in report.layers:
        own = model.get_submodule(layer.name)
        error = (own.weight.detach() - dense[layer.name]).norm() / dense[layer.name].norm()
        assert layer.weight_error == pytest.approx(float(error), rel=1e-5)
        assert 0.05 < layer.weight_error < 0.9
        assert layer.output_error is None
        assert layer.parameters == sum(p.numel() for n, p in own.named_parameters() if n != "bias")
        assert layer.bytes == 4 * layer.parameters
        assert layer.dense_parameters == 96
    x = torch.randn(3, 5, 8)
    first = model.body[0][0]
    torch.testing.assert_close(first(x), F.linear(x, first.weight, first.bias))


def test_full_rank_is_the_dense_model_up_to_rounding() -> None:
    model = Net().double()
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = model(x)
    report = run(model, MonarchLinearConfig(num_blocks=2, rank=8), calls=x)
    assert all(layer.weight_error < 1e-12 for layer in report.layers)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_data_aware_compression_is_better_where_it_was_asked_for() -> None:
    plain, aware = Net(16, 32), Net(16, 32)
    aware.load_state_dict(plain.state_dict())
    mixing = torch.randn(16, 16)
    x = torch.randn(200, 16) @ mixing * torch.linspace(0, 1, 16)
    expected = plain(x)
    run(plain, MonarchLinearConfig(num_blocks=4, rank=4))
    report = run(aware, MonarchLinearConfig(num_blocks=4, rank=4), calls=[x[:100], ((x[100:],), {"scale": 1.0})])
    errors = [float((model(x) - expected).norm().detach() / expected.norm().detach()) for model in (plain, aware)]
    assert errors[1] < 0.9 * errors[0]
    assert all(layer.output_error is not None and layer.output_error < layer.weight_error for layer in report.layers)


def test_the_output_error_is_what_the_calls_show() -> None:
    model = nn.Sequential(nn.Linear(8, 12, bias=False))
    x = torch.randn(50, 8)
    expected = model(x)
    (layer,) = run(model, calls=x).layers
    assert layer.output_error == pytest.approx(float((model(x) - expected).norm() / expected.norm()), rel=1e-4)


def test_layers_are_taken_in_groups_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MOST_BYTES", 8 * 8**2)
    model, runs = Net(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    run(model, calls=torch.randn(20, 8))
    assert len(runs) == 4


def test_layers_that_no_call_reaches_are_fitted_to_their_weights() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    found = {layer.name: layer.output_error for layer in run(model, calls=torch.randn(9, 8)).layers}
    assert found["used"] is not None
    assert found["unused"] is None


def test_hooks_are_gone_afterwards_also_where_a_call_fails() -> None:
    model = Net()
    with pytest.raises(RuntimeError, match="shape"):
        run(model, calls=torch.randn(3, 7))
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert [type(m) for m in linears(model)] == [nn.Linear] * 4


def test_calls_leave_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 12))
    before = copy.deepcopy(model[0].state_dict())
    state = torch.get_rng_state()
    run(model, calls=[torch.randn(20, 8, generator=torch.Generator().manual_seed(0))] * 2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model[0].state_dict().items():
        assert torch.equal(value, before[name])


def test_infinities_in_the_inputs_are_an_error() -> None:
    with pytest.raises(InputError, match=r"body\.0\.0 has an infinity or NaN"):
        run(Net(), calls=torch.full((3, 8), float("inf")))


@pytest.mark.parametrize("calls", [[], 3, ["text"]])
def test_what_is_no_call(calls: Any) -> None:
    with pytest.raises(InputError, match="call"):
        run(Net(), calls=calls)


# ---- how much is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.6])
@pytest.mark.parametrize("make", [MonarchLinearConfig, BlastLinearConfig])
def test_a_parameter_budget_is_kept_and_used(make: Any, budget: float) -> None:
    model = Net(32, 64, 1)
    with torch.no_grad():
        model.body[0][0].weight.copy_(torch.randn(64, 1) @ torch.randn(1, 32))  # rank 1: needs little
    report = run(model, make(num_blocks=2, budget=budget))
    assert report.parameters <= budget * report.dense_parameters
    assert report.parameters > 0.8 * budget * report.dense_parameters
    if make is MonarchLinearConfig:
        assert report.layers[0].rank == 2 < report.layers[1].rank


def test_a_budget_below_the_least_rank_is_an_error() -> None:
    for make in (MonarchLinearConfig, BlastLinearConfig):
        model = Net()
        with pytest.raises(InputError, match="is below"):
            run(model, make(num_blocks=4, budget=0.01))
        assert [type(m) for m in linears(model)] == [nn.Linear] * 4


@pytest.mark.parametrize("make", [MonarchLinearConfig, BlastLinearConfig])
def test_each_layer_gets_the_least_rank_that_keeps_an_error(make: Any) -> None:
    dense, x = Net(16, 32, 1), torch.randn(64, 16)
    model = copy.deepcopy(dense)
    report = run(model, make(num_blocks=2, max_error=0.4), calls=x)
    assert all(layer.output_error is not None and layer.output_error <= 0.4 for layer in report.layers)
    first = report.layers[0]
    step = 2 if make is MonarchLinearConfig else 1
    less = run(dense, make(num_blocks=2, rank=first.rank - step), filter_fn=lambda m, name: name == first.name, calls=x)
    assert less.layers[0].output_error is not None
    assert less.layers[0].output_error > 0.4


@pytest.mark.parametrize(
    ("make", "options", "says"),
    [
        (MonarchLinearConfig, {"num_blocks": 4}, "give one of rank, budget and max_error; found none"),
        (MonarchLinearConfig, {"num_blocks": 4, "rank": 4, "budget": 0.5}, "found rank, budget"),
        (MonarchLinearConfig, {"num_blocks": 4, "rank": 6}, "no factors of rank 6; the nearest.* are 4 and 8"),
        (BlastLinearConfig, {"num_blocks": 4, "rank": 0}, "no factors of rank 0"),
        (MonarchLinearConfig, {"num_blocks": 1, "rank": 6}, "num_blocks must be at least 2"),
        (MonarchLinearConfig, {"num_blocks": 4, "budget": 1.5}, "budget must be above 0 and below 1"),
        (MonarchLinearConfig, {"num_blocks": 4, "max_error": 0}, "max_error must be above 0 and below 1"),
        (BlastLinearConfig, {"num_blocks": 4, "rank": 1, "iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_bad_configs(make: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**options)


def test_blocks_that_do_not_divide_are_told_with_what_does_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 30))
    with pytest.raises(InputError) as error:
        run(model, MonarchLinearConfig(num_blocks=4, rank=4))
    text = str(error.value)
    assert "num_blocks=4 does not divide 12 -> 30 of 1; these do: 1, 2, 3, 6;" in text
    assert "these divide all 2 chosen layers: 1, 2;" in text
    assert [type(m) for m in model] == [nn.Linear] * 2


def test_a_rank_that_is_too_high_is_told_with_what_there_is() -> None:
    with pytest.raises(InputError, match=r"0 \(8 -> 12\) has no rank 10; there are multiples of 2 up to 8"):
        run(nn.Sequential(nn.Linear(8, 12)), MonarchLinearConfig(num_blocks=2, rank=10))


def test_modules_refuse_bad_sizes() -> None:
    with pytest.raises(InputError, match="these do: 1, 2, 4"):
        MonarchLinear(8, 12, num_blocks=3, rank=3)
    with pytest.raises(InputError, match="the nearest are 4 and 8"):
        MonarchLinear(8, 12, num_blocks=4, rank=5)
    with pytest.raises(InputError, match="at least 1"):
        BlastLinear(8, 12, num_blocks=4, rank=0)


def test_what_else_is_no_model_or_config() -> None:
    with pytest.raises(InputError, match="itself a linear layer"):
        run(nn.Linear(8, 8))
    with pytest.raises(InputError, match="config must be"):
        run(Net(), {"num_blocks": 2})


# ---- what stays ------------------------------------------------------------------------------------------------------


class Subclass(nn.Linear):
    pass


class Weight(nn.Parameter):
    pass


def _tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def _shared() -> nn.Module:
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.ReLU(), layer)


def _view_of_another() -> nn.Module:
    model = nn.ModuleDict({"head": nn.Linear(8, 12, bias=False)})
    model.register_buffer("whole", torch.randn(24, 8))
    model["head"].weight = nn.Parameter(model.whole[:12])
    return model


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _with_weight(weight: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 12))
    model[0].weight = weight
    return model


def _quantised() -> nn.Module:
    return _with_weight(nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), requires_grad=False))


STAYS = {
    "tied": (_tied, "tied"),
    "shared": (_shared, "shared"),
    "view_of_another": (_view_of_another, "tied"),
    "hooked": (_hooked, "hooks"),
    "parametrized": (_parametrized, "subclass"),
    "subclass": (lambda: nn.Sequential(Subclass(8, 12)), "subclass"),
    "tensor_subclass": (lambda: _with_weight(Weight(torch.randn(12, 8))), "tensor_subclass"),
    "quantised": (_quantised, "quantised"),
    "float8": (lambda: _with_weight(nn.Parameter(torch.zeros(12, 8).to(torch.float8_e4m3fn), False)), "quantised"),
    "complex": (lambda: _with_weight(nn.Parameter(torch.zeros(12, 8, dtype=torch.complex64))), "quantised"),
    "meta": (lambda: nn.Sequential(nn.Linear(8, 12, device="meta")), "meta"),
    "nan": (lambda: _with_weight(nn.Parameter(torch.full((12, 8), float("nan")))), "not_finite"),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 12), "read_by_parent"),
    "attention": (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), "subclass"),
    "compressed": (lambda: nn.Sequential(MonarchLinear(8, 12, 2, 4)), "compressed"),
}


@pytest.mark.parametrize("name", STAYS)
def test_it_stays_and_the_report_says_why(name: str) -> None:
    make, code = STAYS[name]
    model = make()
    before = list(model.modules())
    report = run(model)
    assert report.layers == ()
    assert list(model.modules()) == before
    assert {kept.code for kept in report.kept} >= {code}
    assert f"[{code}]" in str(report)
    assert "no layer compressed" in str(report)


def test_layers_that_the_filter_leaves_out_are_not_touched() -> None:
    model = Net()
    asked: list[str] = []

    def chosen(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return name.endswith(".0")

    report = run(model, filter_fn=chosen)
    assert asked == ["body.0.0", "body.0.2", "body.1.0", "body.1.2"]
    assert [layer.name for layer in report.layers] == ["body.0.0", "body.1.0"]
    assert report.kept == ()


def test_a_shared_parent_is_one_place() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model = nn.Sequential(block, block)
    assert len(run(model).layers) == 1
    assert model(torch.randn(3, 8)).shape == (3, 8)


def test_an_interrupted_compression_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, real = Net(), [], compress.block_module

    def interrupted(*args: Any) -> Any:
        made.append(1)
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(compress, "block_module", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, calls=torch.randn(5, 8))
    assert [type(m) for m in linears(model)] == [MonarchLinear, MonarchLinear, nn.Linear, nn.Linear]
    assert model(torch.randn(5, 8)).shape == (5, 8)
    assert not any(m._forward_pre_hooks for m in model.modules())
    report = run(model)
    assert [layer.name for layer in report.layers] == ["body.1.0", "body.1.2"]
    assert [kept.code for kept in report.kept] == ["compressed"] * 2


def test_progress_is_shown_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    compress_(Net(), MonarchLinearConfig(num_blocks=2, budget=0.8))
    shown = capsys.readouterr()
    assert "compress_: 4 of 4: body.1.2" in shown.err
    assert "compress_: rank of 1 of 4: body.0.0" in shown.err
    assert shown.out == ""


# ---- the modules -----------------------------------------------------------------------------------------------------


def test_conv1d_of_gpt2() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(12, 8))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.normal_()
    x = torch.randn(3, 5, 8)
    expected = model(x)
    report = run(model, MonarchLinearConfig(num_blocks=2, rank=8))
    assert type(model[0]) is MonarchLinear
    assert (report.layers[0].in_features, report.layers[0].out_features) == (8, 12)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [MONARCH, BLAST])
def test_a_state_dict_makes_a_round_trip_into_a_dense_model(config: Any, tmp_path: Path) -> None:
    model, other = Net(), Net()
    run(model, config, filter_fn=lambda m, name: name != "body.1.2")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    load_compressed_(other, torch.load(tmp_path / "model.pt"))
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))
    load_compressed_(other, model.state_dict())  # again: it is compressed already
    with pytest.raises(InputError, match=r"no linear that can become a block linear at body\.1\.0, body\.1\.2?"):
        load_compressed_(
            Net(layers=1), {f"body.1.{i}.{n}": torch.ones(2, 2, 2, 2) for i in (0, 2) for n in ("first", "second")}
        )


@pytest.mark.parametrize("config", [MONARCH, BLAST])
def test_safetensors(config: Any, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = Net(), Net()
    run(model, config)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    load_compressed_(other, safetensors.load_file(str(tmp_path / "model.safetensors")))
    x = torch.randn(3, 8)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("config", [MONARCH, BLAST])
def test_modules_are_copied_pickled_and_moved(config: Any) -> None:
    model, x = Net(), torch.randn(3, 8)
    run(model, config)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
    wide = copy.deepcopy(model).to(torch.float64)
    torch.testing.assert_close(wide(x.double()).float(), expected)
    assert copy.deepcopy(model).to("meta")(x.to("meta")).shape == (3, 8)
    assert "num_blocks=2" in repr(model)


def test_a_low_rank_adapter_on_top_is_trained() -> None:
    model, x = Net(layers=1), torch.randn(4, 8)
    run(model)
    before = model(x).detach()
    model.requires_grad_(False)
    down, up = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.zeros(12, 2))
    model.body[0][0].register_forward_hook(lambda m, args, y: y + args[0] @ down.mT @ up.mT)
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert up.grad is not None
    assert float(up.grad.norm()) > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("config", [MONARCH, BLAST])
def test_a_compressed_model_is_trained(config: Any) -> None:
    model, x = Net(), torch.randn(64, 8)
    target = model(x).detach()
    run(model, config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


def test_autocast_computes_in_its_dtype() -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    run(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(3, 8))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert model[0].first.grad.dtype is torch.float32


@pytest.mark.parametrize("made", [MonarchLinear, BlastLinear])
def test_new_modules_have_the_scale_of_a_linear(made: Any) -> None:
    own, dense = made(256, 512, num_blocks=4, rank=64), nn.Linear(256, 512)
    ratio = float(own.weight.std() / dense.weight.std())
    assert 0.7 < ratio < 1.4
    assert made(8, 12, 2, 4, bias=False).bias is None


# ---- the report ------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table_and_json(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 12), "b": Subclass(8, 8)})
    report = run(model)
    text = str(report)
    assert "a      8->12  monarch  2       4     80 (83%)" in text
    assert "b stays: it is a Subclass" in text
    assert "1 layer compressed, 96 -> 80 parameters (83.3%); predicted" in text
    assert "8192 tokens" in text
    content = json.loads(report.save(tmp_path / "deep" / "report.json").read_text())
    assert content["parameters"] == 80
    assert content["layers"][0]["dtype"] == "f32"
    assert content["layers"][0]["dense_bytes"] == 4 * 96
    assert set(content["layers"][0]["predicted"]) == {"1", "256", "8192"}
    assert content["kept"] == [{"name": "b", "code": "subclass", "reason": report.kept[0].reason}]
    (predicted,) = (layer.times(64, "cuda") for layer in report.layers)
    assert predicted is not None
    assert predicted.dense_s > 0
    assert report.speedup(64, "mps") is None


def test_the_public_names() -> None:
    assert monarch_compile.compress_ is compress_
    assert monarch_compile.MonarchLinearConfig is MonarchLinearConfig
