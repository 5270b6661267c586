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
from monarch_compile.distillation.groups import Masters, learned_values, masters_of
from monarch_compile.distillation.recording import Sample
from monarch_compile.errors import DistillationError

BETAS = (0.9, 0.99)
EPSILON = 1e-9
"""Adam's: small beside gradients of a relative error, large beside those that are rounding alone, as of a key bias."""


@dataclass(frozen=True)
class Schedule:
    """steps: of Adam for each group, one call of the model each. lr: what the first step changes, as a share of the
    root mean square of the elements of each weight; it falls to 0 along half a cosine. seed: of the order of calls."""

    steps: int
    lr: float
    seed: int

    def rate(self, step: int) -> float:
        """The share that a step changes, counted from 0."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def place(self, step: int, number: int) -> int:
        """Which of `number` calls a step learns from: all in random order, then all in another one."""
        turn, place = divmod(step, number)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return int(torch.randperm(number, generator=generator)[place])


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
    optimizer: torch.optim.Adam = field(init=False)
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.masters = masters_of(self.parameters)
        matrices = [self.masters[p] for p in self.elements if p.dim() > 1]
        mean = math.sqrt(sum(float(x.square().mean()) for x in matrices) / len(matrices))
        groups = []
        for parameter in self.elements:
            master = self.masters[parameter].requires_grad_()
            own = math.sqrt(float(master.detach().square().mean())) if parameter.dim() > 1 else mean
            groups.append({"params": [master], "lr": 0.0, "scale": own})
        self.optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPSILON)

    def resume(self, found: Progressed) -> None:
        """Go on from where an earlier run of the same training was."""
        self.step, self.seconds = found.step, found.seconds
        with torch.no_grad():
            for parameter, value in zip(self.elements, found.masters, strict=True):
                self.masters[parameter].copy_(value)
        self.optimizer.load_state_dict(found.optimizer)

    def progressed(self) -> Progressed:
        """What a later run needs to go on from here."""
        values = [self.masters[p].detach().cpu().clone() for p in self.elements]
        return Progressed(self.step, values, self.optimizer.state_dict(), self.seconds)

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
        self.optimizer.zero_grad(set_to_none=True)
        with autocast.switched_off(self._device.type), torch.enable_grad():
            loss = torch.stack([relative_square(sample, self.masters) for sample in samples]).mean()
            loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
        grads = [self.masters[p].grad for p in self.elements]
        if not math.isfinite(value) or not all(grad is None or bool(grad.isfinite().all()) for grad in grads):
            raise DistillationError(
                f"{self.name}: the loss is {value} at step {self.step + 1}, or its gradient is not finite; the model's "
                "weights are as they were. Look for inputs with nan or inf, or take a smaller lr"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.schedule.rate(self.step)
        self.optimizer.step()
        return value

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
