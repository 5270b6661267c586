"""One group of sites learns: Adam on the weights that lead to it, against the exact model's outputs."""

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


@dataclass
class Progressed:
    """Where the training of a group is: the number of steps taken, what they made, and the seconds they took."""

    step: int
    masters: list[Tensor]
    optimizer: dict[str, Any]
    seconds: float


@dataclass(eq=False)
class Training:
    """A group while it learns.

    samples: of each call that the group runs in. elements: which elements of each parameter learn, as bool.
    name: what messages call the group. masters: the values of all parameters that lead to the group.
    """

    name: str
    samples: Sequence[Sequence[Sample]]
    parameters: Sequence[nn.Parameter]
    elements: Mapping[nn.Parameter, Tensor]
    schedule: Schedule
    masters: dict[nn.Parameter, Tensor] = field(init=False)
    descent: Descent = field(init=False)
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.masters = masters_of(self.parameters)
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
            loss = self._take_step(self.samples[self.schedule.place(self.step, len(self.samples))])
            self.step += 1
            self.seconds += time.perf_counter() - start
            say(f"{self.name}: step {self.step} of {self.schedule.steps}, relative error {math.sqrt(loss):.4f}")
            if self.step % every == 0:
                save()

    def _take_step(self, samples: Sequence[Sample]) -> float:
        def loss() -> Tensor:
            return torch.stack([relative_square(sample, self.masters) for sample in samples]).mean()

        with autocast.switched_off(self._device.type):
            return self.descent.take(self.step, loss)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.masters.values())).device

    def learned(self) -> dict[nn.Parameter, Tensor]:
        """The new values of the parameters, in their dtypes; what leads to nothing that learns is bit-identical."""
        found = {}
        for parameter, elements in self.elements.items():
            value = self.masters[parameter].detach().to(parameter.dtype)
            found[parameter] = torch.where(elements, value, parameter.detach())
        return found


def relative_square(sample: Sample, masters: Masters) -> Tensor:
    """The squared relative error of what a site gives with these weights; () float."""
    output, target = _both(sample, masters)
    norm = target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)
    return (output - target).square().sum() / norm


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
