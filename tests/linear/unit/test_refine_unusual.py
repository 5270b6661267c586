"""`refine_` on modules that write to what they are given, whose layers do not always run; and on inputs of low rank."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from monarch_compile import BlastLinearConfig, DistillationError, InputError, MonarchLinearConfig, compress_, refine_
from monarch_compile.linear.compression import parts, refine
from monarch_compile.linear.compression.stages import stages_of

WIDTH = 16
MONARCH = MonarchLinearConfig(num_blocks=2, rank=4)
BLAST = BlastLinearConfig(num_blocks=2, rank=4, iterations=3)


class Cache:
    """What blocks keep for later calls, as models of language do."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []


class Block(nn.Module):
    """x + W2 tanh(W1 norm(x)), which may write to x, or to a cache whose mean it adds."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.in_place = in_place

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        h = self.down(torch.tanh(self.up(self.norm(x))))
        if cache is not None:
            cache.held.append(h)
            h = torch.stack(cache.held).mean(0)
        if self.in_place:
            x += h
            return x
        return x + h


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Block, shift: float = 0, caches: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(2))
        self.shift, self.caches = shift, caches

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        cache = Cache() if self.caches else None
        for layer in self.layers:
            x = layer(x, cache) if self.caches else layer(x)
            if self.shift:
                x.add_(self.shift)
        return x


def inputs(number: int = 4, rows: int = 30) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, WIDTH, generator=generator) for _ in range(number)]


def pair(teacher: nn.Module, config: Any = MONARCH) -> tuple[nn.Module, nn.Module]:
    model = copy.deepcopy(teacher)
    compress_(model, config, progress=False)
    return model, teacher


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def test_a_block_that_writes_to_its_input_is_refined_as_one_that_does_not() -> None:
    reports = []
    for in_place in (False, True):
        model, teacher = pair(seeded(lambda own=in_place: Net(lambda: Block(own))))  # type: ignore[misc]
        reports.append(refine_(model, teacher, inputs(), steps=5, progress=False))
    one, other = reports
    assert [p.after for p in other.parts] == pytest.approx([p.after for p in one.parts], rel=1e-5)
    assert other.calls.after == pytest.approx(one.calls.after, rel=1e-5)
    assert one.calls.after < 0.9 * one.calls.before


def test_what_is_written_to_between_parts_is_what_the_next_part_is_given() -> None:
    model, teacher = pair(seeded(lambda: Net(shift=2.0)))
    given: list[Tensor] = []
    real = refine._Refining.__init__

    def noting(self: Any, part: Any, teacher: Any, model: Any, theirs: Any, ours: Any, schedule: Any) -> None:
        given.append(theirs[0][0][0])
        real(self, part, teacher, model, theirs, ours, schedule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine._Refining, "__init__", noting)
        refine_(model, teacher, inputs(), steps=0, progress=False)
    layers: Any = teacher.layers
    torch.testing.assert_close(given[1], layers[0](inputs()[0] * 1.5) + 2.0)


def test_what_a_cache_holds_is_put_back_after_each_run_of_a_part() -> None:
    model, teacher = pair(seeded(lambda: Net(caches=True)))
    held: list[int] = []
    real = Block.forward

    def noting(self: Block, x: Tensor, cache: Cache | None = None) -> Tensor:
        assert cache is not None
        held.append(len(cache.held))
        return real(self, x, cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", noting)
        report = refine_(model, teacher, inputs(), steps=3, progress=False)
    assert set(held) == {0, 1}  # what the block before has put there
    assert report.calls.after < report.calls.before


def test_a_language_model_with_a_cache_of_keys_and_values() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=2, **sizes)
    assert config.use_cache
    model, teacher = pair(seeded(lambda: transformers.LlamaForCausalLM(config)))
    generator = torch.Generator().manual_seed(1)
    calls = [{"input_ids": torch.randint(0, 50, (2, 12), generator=generator)} for _ in range(3)]
    report = refine_(model, teacher, calls, steps=5, progress=False)
    assert [part.name for part in report.parts] == ["model.layers.0", "model.layers.1", "lm_head"]
    assert report.calls.after < report.calls.before


class WithoutGradients(Block):
    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        with torch.no_grad():
            return super().forward(x, cache)


def test_a_part_that_no_gradient_reaches_is_named() -> None:
    model, teacher = pair(seeded(lambda: Net(WithoutGradients)))
    with pytest.raises(DistillationError, match=r"layers\.0: no gradient reaches what is to learn"):
        refine_(model, teacher, inputs(), steps=1, progress=False)
    assert refine_(model, teacher, inputs(), steps=0, progress=False).calls.after > 0


class Found:
    """What no tree of tensors is made of."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Hidden(Block):
    def forward(self, x: Any, cache: Cache | None = None) -> Any:
        return Found(super().forward(x.x if isinstance(x, Found) else x))


class Shown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net(Hidden)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net.layers:
            x = layer(x)
        found: Any = x
        return found.x  # type: ignore[no-any-return]


def test_a_part_without_a_floating_output_is_named() -> None:
    model, teacher = pair(seeded(Shown))
    with pytest.raises(InputError, match=r"net\.layers\.0 must give a floating tensor"):
        refine_(model, teacher, inputs(), steps=1, progress=False)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_any_error_all_weights_modes_and_hooks_are_as_they_were(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for an interruption: the first part is done then."""
    model, teacher = pair(seeded(Net))
    model.layers[0].train(False)  # type: ignore[index,union-attr,operator]
    modes = [module.training for module in model.modules()]
    before, real = {n: v.clone() for n, v in model.state_dict().items()}, refine.fit_stage
    random_state = torch.get_rng_state()

    def failing(stage: Any, dense: Any, module: Any, theirs: Any, ours: Any, part: str) -> None:
        real(stage, dense, module, theirs, ours, part)
        if part == "layers.1":
            raise error("no memory")

    monkeypatch.setattr(refine, "fit_stage", failing)
    with pytest.raises(error):
        refine_(model, teacher, inputs(), steps=1, progress=False)
    changed = {n.split(".")[1] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == (set() if error is RuntimeError else {"0"})
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    every = (*model.modules(), *teacher.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in every)
    assert all(p.grad is None and p.requires_grad for m in every for p in m.parameters())


class Output(NamedTuple):
    states: Tensor
    count: int
    nothing: None


class Mixed(nn.Module):
    """Dropout, statistics, keyword arguments, and an output that is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, *, states: Tensor) -> Output:
        return Output(states + self.drop(self.linear(self.norm(states))), 3, None)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixed() for _ in range(2))

    def forward(self, states: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            states = layer(states=states).states
        return {"states": states}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_statistics_keywords_and_tuples(dtype: torch.dtype) -> None:
    model, teacher = (x.to(dtype) for x in pair(seeded(Stack)))
    model.requires_grad_(False)
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    calls = [{"states": x.to(dtype)} for x in inputs()]
    report = refine_(model, teacher, calls, steps=5, progress=False)
    assert [part.name for part in report.parts] == ["layers.0", "layers.1"]
    assert report.calls.after < report.calls.before
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())
    assert all(m.training for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("config", [MONARCH, BLAST])
@pytest.mark.parametrize(
    "calls",
    [
        [7 + 100 * inputs()[0][:1]],
        [inputs()[0][:1].repeat(20, 1)] * 3,
        [100 + 0.01 * x for x in inputs()],
        [torch.zeros(8, WIDTH)],
    ],
    ids=["one row", "equal rows", "large mean", "zeros"],
)
def test_inputs_that_hardly_vary(config: Any, calls: list[Tensor]) -> None:
    """The moments about the means are rounding then."""
    model, teacher = pair(seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH))), config)
    report = refine_(model, teacher, calls, steps=0, progress=False)
    assert report.calls.after < 1e-3


def test_models_of_different_dtypes() -> None:
    model, teacher = pair(seeded(lambda: nn.Sequential(nn.Embedding(30, WIDTH), nn.Linear(WIDTH, WIDTH))))
    report = refine_(model, teacher.double(), [torch.arange(30)], steps=3, progress=False)
    assert report.calls.after < report.calls.before


def test_compiled_models_are_refined_as_the_modules_that_were_compiled() -> None:
    model, teacher = pair(seeded(Net))
    report = refine_(torch.compile(model), torch.compile(teacher), inputs(), steps=0, progress=False)  # type: ignore[arg-type]
    assert [part.name for part in report.parts] == ["layers.0", "layers.1"]


def test_a_teacher_whose_linear_is_the_other_way_round_is_an_error() -> None:
    model, _ = pair(nn.Sequential(nn.Linear(WIDTH, 8)))
    with pytest.raises(InputError, match=r"16 -> 8 at '0'; found Linear with a weight of \(16, 8\)"):
        refine_(model, nn.Sequential(nn.Linear(8, WIDTH)), inputs(), progress=False)


class Writing(nn.Module):
    """Its second layer is given the tensor of the first one, with other values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(x.mul_(2)) + h  # type: ignore[no-any-return]


def test_layers_on_a_tensor_that_is_written_to_in_between_are_no_stage() -> None:
    module = Writing()
    assert stages_of(module, ("first", "second"), ((inputs()[0],), {})) == [("first",), ("second",)]


def test_outputs_of_calls_are_not_all_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the whole model is judged, those of one call are."""
    model, teacher = pair(seeded(Net))
    alive: list[int] = []
    held: list[Any] = []

    class Watched(refine._Run):
        def _output(self, model: nn.Module, call: Any) -> Any:
            alive.append(sum(ref() is not None for ref in held))
            output = super()._output(model, call)
            held.append(weakref.ref(output))
            return output

    monkeypatch.setattr(refine, "_Run", Watched)
    refine_(model, teacher, inputs(6), steps=0, progress=False)
    assert max(alive) <= 2


class Experts(nn.Module):
    """Rows go to one of two layers by the sign of their first number."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h, result = self.gate(x), x.clone()
        for number, expert in enumerate(self.experts):
            rows = (h[:, 0] > 0) == bool(number)
            if rows.any():
                result[rows] += expert(h[rows])
        return result


def test_layers_that_do_not_run_in_all_calls_or_on_other_rows_stay_for_the_steps() -> None:
    model, teacher = pair(seeded(lambda: Net(Experts)))
    calls = [*inputs(), inputs()[0][:1], inputs()[1][:1], inputs()[2][:1]]
    report = refine_(model, teacher, calls, steps=10, progress=False)
    assert [part.name for part in report.parts] == ["layers.0", "layers.1"]
    assert report.calls.after < report.calls.before


def test_a_part_that_runs_less_often_in_a_later_call_is_named() -> None:
    class Some(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in list(self.layers)[: len(x)]:
                x = layer(x)
            return x

    model, teacher = pair(seeded(Some))
    with pytest.raises(
        InputError, match=r"layers\.1 must run as often in all calls; found 1 times .* 0 times in call 2"
    ):
        refine_(model, teacher, [inputs()[0], inputs()[0][:1]], progress=False)


def test_tensors_of_one_identity_stay_one() -> None:
    x = inputs()[0]
    expanded = x[:1].expand(4, WIDTH)
    (a, b, c), kwargs = parts._copied(((x, x, expanded), {"y": x}))
    assert a is b
    assert kwargs["y"] is a
    assert a.data_ptr() != x.data_ptr()
    assert c.stride() == expanded.stride()
