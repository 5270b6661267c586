"""Weights learn: Adam on a loss of each call, that of a group of sites or of the whole model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile import autocast
from monarch_compile.calibration.metrics import ratio, squares_apart
from monarch_compile.distillation.descent import Descent, Schedule
from monarch_compile.distillation.groups import Masters, learned_values, masters_of
from monarch_compile.distillation.recording import Sample

Loss = Callable[[int, Masters], Tensor]
"""What is to fall, () float, in the call of a place, with some values of the parameters."""


@dataclass
class Progressed:
    """Where a training is: the number of steps taken, what they made, and the seconds they took."""

    step: int
    masters: list[Tensor]
    optimizer: dict[str, Any]
    seconds: float


@dataclass(eq=False)
class Training:
    """Parameters while some of them learn.

    name: what messages call it. loss_of: what is to fall, in each of `num_calls` calls. elements: which elements of
    each parameter learn, as bool. masters: the values of all parameters. unreached: those that learn which no gradient
    has reached so far.
    """

    name: str
    loss_of: Loss
    num_calls: int
    parameters: Sequence[nn.Parameter]
    elements: Mapping[nn.Parameter, Tensor]
    schedule: Schedule
    masters: dict[nn.Parameter, Tensor] = field(init=False)
    descent: Descent = field(init=False)
    step: int = 0
    seconds: float = 0.0
    unreached: set[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.masters = masters_of(self.parameters)
        self.unreached = set(self.elements)
        self.descent = Descent(self.name, [self.masters[p] for p in self.elements], self.schedule)

    def resume(self, found: Progressed) -> None:
        """Go on from where an earlier run of the same training was."""
        self.step, self.seconds = found.step, found.seconds
        with torch.no_grad():
            for parameter, value in zip(self.elements, found.masters, strict=True):
                self.masters[parameter].copy_(value)
        self.descent.optimizer.load_state_dict(found.optimizer)

    def progressed(self) -> Progressed:
        """What a later run needs to go on from here."""
        values = [self.masters[p].detach().cpu().clone() for p in self.elements]
        return Progressed(self.step, values, self.descent.optimizer.state_dict(), self.seconds)

    def run(self, say: Callable[[str], None], save: Callable[[], None], every: int) -> None:
        """Take the steps that are left; `save` after every so many.

        Raises:
            DistillationError: a loss is not finite.
        """
        while self.step < self.schedule.steps:
            start = time.perf_counter()
            loss = self._take_step(self.schedule.place(self.step, self.num_calls))
            self.step += 1
            self.seconds += time.perf_counter() - start
            say(f"{self.name}: step {self.step} of {self.schedule.steps}, relative error {math.sqrt(loss):.4f}")
            if self.step % every == 0:
                save()

    def _take_step(self, place: int) -> float:
        loss = self.descent.take(self.step, lambda: self.loss_of(place, self.masters))
        self.unreached = {p for p in self.unreached if self.masters[p].grad is None}
        return loss

    def learned(self) -> dict[nn.Parameter, Tensor]:
        """The new values of the parameters, in their dtypes; what leads to nothing that learns is bit-identical."""
        found = {}
        for parameter, elements in self.elements.items():
            value = self.masters[parameter].detach().to(parameter.dtype)
            found[parameter] = torch.where(elements, value, parameter.detach())
        return found


def loss_of_sites(calls: Sequence[Sequence[Sample]]) -> Loss:
    """The mean squared relative error over the runs of sites in a call."""

    def loss_of(place: int, masters: Masters) -> Tensor:
        with autocast.switched_off(next(iter(masters.values())).device.type):
            pairs = [_both(sample, masters) for sample in calls[place]]
            return torch.stack([relative_square([output], [target]) for output, target in pairs]).mean()

    return loss_of


def relative_square(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The squared relative error of outputs against targets, over all of them, which gradients go through; () float."""
    pairs = list(zip(outputs, targets, strict=True))
    difference = torch.stack([(output - target).square().sum() for output, target in pairs]).sum()
    norm = torch.stack([target.square().sum() for target in targets]).sum()
    return difference / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def relative_error(samples: Sequence[Sequence[Sample]], masters: Masters) -> float:
    """Relative error of what sites give with these weights, over all runs."""
    difference = norm = 0.0
    with autocast.switched_off(next(iter(masters.values())).device.type), torch.no_grad():
        for sample in (sample for call in samples for sample in call):
            output, target = _both(sample, masters)
            own, square = squares_apart(target, output)
            difference, norm = difference + own, norm + square
    return ratio(difference, norm)


def _both(sample: Sample, masters: Masters) -> tuple[Tensor, Tensor]:
    device = next(iter(masters.values())).device
    moved = sample.moved(device)
    return moved.call(learned_values(moved, masters)).reference(), moved.target
