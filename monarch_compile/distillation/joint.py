"""All weights that have learned learn together: against the exact model's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.calibration.metrics import floating_tensors
from monarch_compile.distillation.descent import Schedule
from monarch_compile.distillation.groups import Masters
from monarch_compile.distillation.recording import Teacher
from monarch_compile.distillation.training import Training, relative_square
from monarch_compile.distillation.widened import widened

NAME = "all sites together"
NUMBER = -1
"""The checkpoint's, where groups of sites have theirs from 0."""

Elements = Mapping[nn.Parameter, Tensor]
"""Which elements of parameters may change, as bool."""


def joint_training(teacher: Teacher, references: Sequence[Any], elements: Elements, schedule: Schedule) -> Training:
    """The training of the parameters of `elements` from the values that they have. references: the exact model's
    outputs of the calls, which the lowered model is to give."""
    targets = [[widened(x) for x in floating_tensors(reference)] for reference in references]

    def loss_of(place: int, masters: Masters) -> Tensor:
        output = teacher.learning_output(place, {p: _value(p, masters[p], own) for p, own in elements.items()})
        return relative_square([widened(x) for x in floating_tensors(output)], targets[place])

    return Training(NAME, loss_of, len(references), list(elements), elements, schedule)


def _value(parameter: nn.Parameter, master: Tensor, elements: Tensor) -> Tensor:
    """What a parameter is, gradients going to the elements that may change."""
    return torch.where(elements, master.to(parameter.dtype), parameter.detach())
