"""How much two outputs of a model differ."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from monarch_compile.errors import InputError


def relative_error(reference_output: Any, output: Any) -> float:
    """||output - reference|| / ||reference|| over all floating tensors of two outputs of one structure, in float64.

    Raises:
        InputError: there is no floating tensor, or the structures differ.
    """
    return ratio(*outputs_apart(reference_output, output))


def outputs_apart(reference_output: Any, output: Any) -> tuple[float, float]:
    """`squares_apart` over all floating tensors of two outputs of one structure.

    Raises:
        InputError: there is no floating tensor, or the structures differ.
    """
    references, outputs = (floating_tensors(x) for x in (reference_output, output))
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (references, outputs)]
    if not references or shapes[0] != shapes[1]:
        raise InputError(
            f"outputs must hold floating tensors of the same shapes; found {shapes[0]} in {type(reference_output)} "
            f"and {shapes[1]} in {type(output)}"
        )
    pairs = [squares_apart(x, y) for x, y in zip(references, outputs, strict=True)]
    return sum(difference for difference, _ in pairs), sum(norm for _, norm in pairs)


def ratio(difference: float, norm: float) -> float:
    """The relative error from two sums of squares; 0 where nothing differs, inf where the norm alone is 0."""
    if difference == 0:
        return 0.0
    return math.sqrt(difference / norm) if norm else math.inf


def squares_apart(reference: Tensor, tensor: Tensor) -> tuple[float, float]:
    """Sums of squares, in float64: of the difference, and of the reference."""
    return _squares(tensor.double() - reference.double()), _squares(reference.double())


def _squares(x: Tensor) -> float:
    return float(x.detach().square().sum())


def floating_tensors(output: Any) -> list[Tensor]:
    """Those of an output, in their order."""
    return [x for x in tree_leaves(output) if isinstance(x, torch.Tensor) and x.is_floating_point()]
