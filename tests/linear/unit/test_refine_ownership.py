"""`refine_` leaves block linears alone that share weights or do not run, says so, and finds parts that run."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from monarch_compile import compress_, refine_
from tests.linear.unit.test_refine_unusual import MONARCH, WIDTH, Block, Net, inputs, pair, seeded


class Pairs(nn.Module):
    """Blocks that are lists of modules, each of which runs by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([Block(), nn.Linear(WIDTH, WIDTH)]) for _ in range(2))
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block, last in self.layers:  # type: ignore[misc]
            x = last(block(x))
        return x


def test_elements_of_lists_of_lists_are_parts_and_what_does_not_run_is_told() -> None:
    model, teacher = pair(seeded(Pairs))
    report = refine_(model, teacher, inputs(), steps=0, progress=False)
    assert [part.name for part in report.parts] == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]
    assert report.calls.after < report.calls.before
    assert [(one.name, one.code) for one in report.kept] == [("unused", "unreached")]
    assert "unused stays: the first call does not run it [unreached]" in str(report)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return x + self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_layers_with_a_shared_bias_stay() -> None:
    model, teacher = pair(seeded(lambda: Net(Tied)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = refine_(model, teacher, inputs(), steps=3, progress=False)
    assert {(one.name, one.code) for one in report.kept} == {
        (f"layers.{i}.{name}", "tied") for i in (0, 1) for name in ("first", "second")
    }
    changed = {name.split(".")[2] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"third"}


def test_a_block_linear_in_two_parts_stays() -> None:
    model, teacher = pair(seeded(Net))
    for own in (model, teacher):
        own.layers[1].up = own.layers[0].up  # type: ignore[index,union-attr,operator]
    report = refine_(model, teacher, inputs(), steps=3, progress=False)
    assert [(one.name, one.code) for one in report.kept] == [("layers.0.up", "shared")]
    assert [part.layers for part in report.parts] == [1, 1]


def test_a_bias_that_the_teacher_shares_stays_as_it_is() -> None:
    teacher = seeded(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    model = copy.deepcopy(teacher)
    model[0].bias = teacher[0].bias  # type: ignore[index,union-attr]
    compress_(model, MONARCH, progress=False)
    before = teacher[0].bias.clone()  # type: ignore[index,operator,union-attr]
    report = refine_(model, teacher, inputs(), steps=3, progress=False)
    assert torch.equal(teacher[0].bias, before)  # type: ignore[index,union-attr,arg-type]
    assert report.kept[0].code == "tied"


def test_a_part_that_stands_twice_is_refined_once_on_both_its_inputs() -> None:
    model, teacher = pair(seeded(Net))
    for own in (model, teacher):
        own.layers[1] = own.layers[0]  # type: ignore[index,operator,union-attr]
    report = refine_(model, teacher, inputs(), steps=5, progress=False)
    assert [(part.name, part.layers) for part in report.parts] == [("layers.0", 2)]
    assert report.calls.after < report.calls.before
