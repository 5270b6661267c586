"""Adam with a rate that falls: what everything that learns here has in common."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.errors import DistillationError, InputError

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

    @staticmethod
    def of(steps: Any, lr: Any, seed: Any, least_steps: int = 1, prefix: str = "") -> Schedule:
        """That of a user's arguments, the names of the first two beginning with a prefix.

        Raises:
            InputError: one is not allowed.
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < least_steps:
            raise InputError(f"{prefix}steps must be an int of at least {least_steps}; found {steps!r}")
        if not isinstance(lr, (int, float)) or isinstance(lr, bool) or not 0 < lr < math.inf:
            raise InputError(f"{prefix}lr must be a positive number; found {lr!r}")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise InputError(f"seed must be an int; found {seed!r}")
        return Schedule(steps, float(lr), seed)

    def rate(self, step: int) -> float:
        """The share that a step changes, counted from 0."""
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def place(self, step: int, number: int) -> int:
        """Which of `number` calls a step learns from: all in random order, then all in another one."""
        turn, place = divmod(step, number)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        return int(torch.randperm(number, generator=generator)[place])


@dataclass(eq=False)
class Descent:
    """Takes steps of Adam on some tensors, which begin to require gradients. name: what messages call them."""

    name: str
    leaves: Sequence[Tensor]
    schedule: Schedule
    optimizer: torch.optim.Adam = field(init=False)

    def __post_init__(self) -> None:
        matrices = [leaf for leaf in self.leaves if leaf.dim() > 1]
        mean = math.sqrt(sum(float(x.square().mean()) for x in matrices) / len(matrices))
        groups = []
        for leaf in self.leaves:
            own = math.sqrt(float(leaf.detach().square().mean())) if leaf.dim() > 1 else mean
            groups.append({"params": [leaf.requires_grad_()], "lr": 0.0, "scale": own})
        self.optimizer = torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPSILON)

    def take(self, step: int, loss_of: Callable[[], Tensor]) -> float:
        """Take a step, counted from 0, down a loss; its value before.

        Raises:
            DistillationError: the loss or a gradient is not finite, or no gradient reaches a tensor.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = loss_of()
            if not loss.requires_grad:
                raise DistillationError(
                    f"{self.name}: no gradient reaches what is to learn, of {len(self.leaves)} tensors; the model's "
                    "weights are as they were. Look for torch.no_grad, detach or integers in its forward"
                )
            # No `backward`, which would give gradients to whatever else the loss depends on.
            grads = torch.autograd.grad(loss, list(self.leaves), allow_unused=True)
        for leaf, grad in zip(self.leaves, grads, strict=True):
            leaf.grad = grad
        value = loss.item()
        if not math.isfinite(value) or not all(grad is None or bool(grad.isfinite().all()) for grad in grads):
            raise DistillationError(
                f"{self.name}: the loss is {value} at step {step + 1}, or its gradient is not finite; the model's "
                "weights are as they were. Look for inputs with nan or inf, or take a smaller lr"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = group["scale"] * self.schedule.rate(step)
        self.optimizer.step()
        return value


@contextlib.contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """While this lasts, all modules are in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
