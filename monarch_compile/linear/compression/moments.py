"""Second moments of what layers are given: the mean of x x^T over all tokens of a few calls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.calibration.inputs import Call
from monarch_compile.calibration.snapshot import Snapshot
from monarch_compile.errors import InputError
from monarch_compile.linear.compression.layers import Layer

MOST_BYTES = 2**30
"""Of moments that are held at one time, unless those of a single layer take more."""


def groups_of(layers: Sequence[Layer], most_bytes: int | None = None) -> Iterator[list[Layer]]:
    """The layers in order, as many at a time as there is room for the moments of."""
    room, group = most_bytes or MOST_BYTES, list[Layer]()
    used = 0
    for layer in layers:
        needed = 8 * layer.weight.shape[1] ** 2
        if group and used + needed > room:
            yield group
            group, used = [], 0
        group.append(layer)
        used += needed
    if group:
        yield group


def moments_of(model: nn.Module, layers: Sequence[Layer], calls: Sequence[Call]) -> dict[str, Tensor]:
    """(in_features, in_features) in float64, by the layers' names; none for a layer that no call reaches.

    The model runs without gradients, in its own mode; random state, buffers and attributes are put back afterwards.

    Raises:
        InputError: a layer is given an infinity or NaN.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows = x.detach().reshape(-1, x.shape[-1]).double()  # rounded to less, products may have no inverse
            found = rows.mT @ rows
            sums[name] = sums[name] + found if name in sums else found
            counts[name] = counts.get(name, 0) + len(rows)

        return note

    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(noting(layer.name), with_kwargs=True)
            stack.callback(handle.remove)
        state = stack.enter_context(Snapshot(model, list(calls)))
        for args, kwargs in calls:
            state.restore()
            model(*args, **kwargs)
    found = {name: total / counts[name] for name, total in sums.items() if counts[name]}
    for name, moment in found.items():
        if not bool(moment.isfinite().all()):
            raise InputError(f"the input of {name} has an infinity or NaN in these calls")
    return found
