"""`refine_`: errors fall on unseen inputs, errors of earlier parts are made up for, and what cannot go on is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from monarch_compile import BlastLinearConfig, DistillationError, InputError, MonarchLinearConfig, compress_, refine_
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.calibration.snapshot import Snapshot
from monarch_compile.linear.compression import refine
from monarch_compile.linear.compression.parts import Feeds, parts_of, seen_in
from monarch_compile.linear.compression.stages import stages_of

WIDTH = 16
MONARCH = MonarchLinearConfig(num_blocks=4, rank=4)
BLAST = BlastLinearConfig(num_blocks=4, rank=4, iterations=3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        x = x + torch.sigmoid(self.gate(h)) * self.value(h)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return x if mask is None else x * mask


class Net(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 8)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_ones(1)
        for layer in self.layers:
            x = layer(x, mask=mask)
            x = x.clone() if self.again else x
        return self.head(x)


def inputs(seed: int, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linspace(0.05, 1, WIDTH).diag() @ torch.randn(
        WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)
    )
    return [torch.randn(6, 20, WIDTH, generator=generator) @ mixing for _ in range(number)]


CALLS, UNSEEN = inputs(1, 6), inputs(2, 3)


def pair(config: Any = MONARCH, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    teacher = Net(**kwargs)
    model = copy.deepcopy(teacher)
    compress_(model, config, calls=CALLS, progress=False)
    return model, teacher


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def is_same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("config", [MONARCH, BLAST])
def test_errors_fall_on_unseen_inputs_and_all_else_stays(config: Any) -> None:
    model, teacher = pair(config)
    dense, before = state_of(teacher), state_of(model)
    report = refine_(model, teacher, CALLS, held_out=UNSEEN, steps=30, progress=False)
    assert [part.name for part in report.parts] == ["layers.0", "layers.1", "head"]
    assert [part.layers for part in report.parts] == [4, 4, 1]
    assert all(part.after <= part.fitted <= part.before for part in report.parts)
    assert any(part.after < part.fitted < part.before for part in report.parts)
    assert report.held_out is not None
    assert report.held_out.after < 0.9 * report.held_out.before
    with torch.no_grad():
        found = relative_error([teacher(x) for x in UNSEEN], [model(x) for x in UNSEEN])
    assert report.held_out.after == pytest.approx(found)
    assert is_same(teacher, dense)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not [name for name in changed if "norm" in name]
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (*model.modules(), *teacher.modules()))


def test_closed_forms_make_up_for_a_layer_before() -> None:
    """A layer that is far off is followed by one that can undo it: errors of what is given are seen."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).double()
    model = copy.deepcopy(teacher)
    compress_(model, MonarchLinearConfig(num_blocks=2, rank=WIDTH), progress=False)
    first: Any = model[0]
    with torch.no_grad():
        first.second.mul_(3)
    first.requires_grad_(False)
    calls = [x.double() for x in CALLS]
    real = refine.fit_stage

    def only_the_second(stage: Any, dense: Any, module: Any, theirs: Any, ours: Any, part: str) -> None:
        if part == "1":
            real(stage, dense, module, theirs, ours, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refine, "fit_stage", only_the_second)
        report = refine_(model, teacher, calls, steps=0, progress=False)
    assert report.calls.before > 0.5
    assert report.calls.after < 0.05


def test_the_same_arguments_give_the_same_weights_and_another_seed_others() -> None:
    states = []
    for seed in (0, 0, 1):
        model, teacher = pair()
        refine_(model, teacher, CALLS, steps=5, seed=seed, progress=False)
        states.append(state_of(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_parts_run_once_more_where_the_next_is_not_fed_by_the_one_before() -> None:
    """What passes through another operator on the way is recorded, and gives the same as what does not."""
    found = []
    for again in (False, True):
        model, teacher = pair(again=again)
        found.append(refine_(model, teacher, CALLS, steps=0, progress=False))
    assert [part.after for part in found[0].parts] == pytest.approx([part.after for part in found[1].parts], rel=1e-4)


def test_what_parts_are_given_is_what_the_model_gives_them() -> None:
    model, teacher = pair()
    models = (teacher, model)
    feeds = Feeds(models, [((x,), {}) for x in CALLS[:2]], Snapshot(model, teacher))
    for part, given in feeds.over(parts_of(model, feeds.called())):
        for own, ours in zip(models, given, strict=True):
            for x, (args, kwargs) in zip(CALLS, ours, strict=False):
                module = own.get_submodule(part.name)
                ((seen,),) = seen_in(lambda own=own, x=x: own(x), {part.name: module}).values()  # type: ignore[misc]
                assert torch.equal(seen.given[0][0], args[0])
                assert seen.given[1].keys() == kwargs.keys()


def test_layers_on_one_tensor_are_a_stage() -> None:
    model, _ = pair()
    part = parts_of(model, {name for name, _ in model.named_modules()})[0]
    found = stages_of(model.get_submodule(part.name), part.layers, ((CALLS[0],), {}))
    assert found == [("gate", "value"), ("up",), ("down",)]


@pytest.mark.parametrize("where", ["calls", "teacher"])
def test_what_is_not_finite_is_an_error_that_names_the_part_and_changes_nothing(where: str) -> None:
    model, teacher = pair()
    before = state_of(model)
    calls = CALLS
    if where == "calls":
        calls = [*CALLS[:-1], torch.full_like(CALLS[0], float("nan"))]
    else:
        nn.init.constant_(teacher.get_submodule("layers.1.down").weight, float("inf"))  # type: ignore[arg-type]
    name = r"layers\.0" if where == "calls" else r"layers\.1"
    with pytest.raises(DistillationError, match=name):
        refine_(model, teacher, calls, steps=3, progress=False)
    assert is_same(model, before)


def test_a_loss_that_is_not_finite_stops_with_the_name_of_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = pair()
    before, real = state_of(model), refine._Refining._loss

    def spoiled(self: Any, masters: Any, place: int) -> Tensor:
        loss = real(self, masters, place)
        return loss * float("nan") if self._part.name == "layers.1" else loss

    monkeypatch.setattr(refine._Refining, "_loss", spoiled)
    with pytest.raises(DistillationError, match=r"layers\.1: the loss is nan at step 1"):
        refine_(model, teacher, CALLS, steps=3, progress=False)
    assert is_same(model, before)


def test_an_interrupted_run_keeps_the_parts_that_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, teacher = pair()
    before, real = state_of(model), refine._Refining._loss

    def interrupted(self: Any, masters: Any, place: int) -> Tensor:
        if self._part.name == "layers.1":
            raise KeyboardInterrupt
        return real(self, masters, place)

    monkeypatch.setattr(refine._Refining, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refine_(model, teacher, CALLS, steps=3, progress=False)
    changed = {n.split(".")[1] for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed == {"0"}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in (*model.modules(), *teacher.modules()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, teacher = (x.to(dtype) for x in pair())
    report = refine_(model, teacher, [x.to(dtype) for x in CALLS], steps=5, progress=False)
    assert report.calls.after < report.calls.before
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": -1}, "steps must be an int of at least 0; found -1"),
        ({"lr": 0}, "lr must be a positive number"),
        ({"seed": 0.5}, "seed must be an int"),
        ({"calls": []}, "at least one call"),
        ({"model": Net()}, "the model has no block linear"),
    ],
)
def test_bad_arguments(change: dict[str, Any], says: str) -> None:
    model, teacher = pair()
    arguments = {"model": model, "teacher": teacher, "calls": CALLS, "progress": False, **change}
    with pytest.raises(InputError, match=says):
        refine_(**arguments)


def test_a_teacher_of_another_structure_is_an_error() -> None:
    model, teacher = pair()
    with pytest.raises(InputError, match=r"a dense linear 16 -> 16 at 'layers\.0\.gate'; found MonarchLinear"):
        refine_(model, copy.deepcopy(model), CALLS, progress=False)
    teacher.head = nn.Linear(WIDTH, 9)
    with pytest.raises(InputError, match=r"16 -> 8 at 'head'; found Linear with a weight of \(9, 16\)"):
        refine_(model, teacher, CALLS, progress=False)


def test_the_report_is_printed_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, teacher = pair()
    report = refine_(model, teacher, CALLS, held_out=UNSEEN, steps=2)
    shown = capsys.readouterr()
    assert "refine_: 2 of 3: layers.1: step 2 of 2" in shown.err
    assert shown.out == ""
    assert "layers.1" in str(report)
    assert "on 6 calls" in str(report)
    assert "on 3 held-out calls" in str(report)
    content = json.loads(report.save(tmp_path / "report.json").read_text())
    assert [part["name"] for part in content["parts"]] == ["layers.0", "layers.1", "head"]
    assert content["steps"] == 2
