"""Block linears fitted in closed form to what dense layers give, on what the compressed model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.errors import DistillationError
from monarch_compile.linear.compression.factors import fitter
from monarch_compile.linear.compression.parts import Given, seen_in
from monarch_compile.linear.modules import BlockLinearModule

TOWARDS = 1e-3
"""Of the mean second moment: how much the dense weight counts beside the least squares."""
ITERATIONS = 20
"""Of BLAST."""


Stage = tuple[str, ...]
"""Layers of a part that run one after the other on the same tensor."""


def stages_of(module: nn.Module, layers: Sequence[str], given: Given) -> list[Stage]:
    """The layers of a part, in the order in which they run; without those that do not run, or more than once."""
    args, kwargs = given
    order: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Any:
        return lambda module, args, kwargs: order.append((name, input_of((args, kwargs))))

    with ExitStack() as stack, torch.no_grad():
        for name in layers:
            handle = module.get_submodule(name).register_forward_pre_hook(noting(name), with_kwargs=True)
            stack.callback(handle.remove)
        module(*args, **kwargs)
    names = [name for name, _ in order]
    stages: list[Stage] = []
    last: Tensor | None = None
    for name, x in order:
        if names.count(name) == 1 and x is last:
            stages[-1] = (*stages[-1], name)
        elif names.count(name) == 1:
            stages.append((name,))
        last = x if names.count(name) == 1 else None
    return stages


def input_of(given: Given) -> Tensor:
    """What a linear layer is given."""
    args, kwargs = given
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


@dataclass
class _Sums:
    """Sums over rows of inputs x and wanted outputs y, in float64."""

    rows: int = 0
    x: Any = 0
    xx: Any = 0
    y: dict[str, Any] = field(default_factory=dict)
    yx: dict[str, Any] = field(default_factory=dict)

    def add(self, x: Tensor, wanted: Mapping[str, Tensor]) -> None:
        """x (rows, in_features), and outputs (rows, out_features) by the names of their layers."""
        self.rows += len(x)
        self.x = self.x + x.double().sum(0)
        self.xx = self.xx + (x.mT @ x).double()
        for name, y in wanted.items():
            self.y[name] = self.y.get(name, 0) + y.double().sum(0)
            self.yx[name] = self.yx.get(name, 0) + (y.mT @ x).double()


def fit_stage(
    stage: Stage, dense: nn.Module, module: nn.Module, theirs: Sequence[Given], ours: Sequence[Given], part: str
) -> None:
    """Give the layers of a stage the factors and biases with which they come closest to the dense layers' outputs.

    With x the inputs in the compressed part `module` and y = W x' the outputs in the dense one, both over all calls,
    the best dense weight is T = E[y x^T] E[x x^T]^-1, damped towards W; the factors are the best for T under the second
    moment of x. Where there is a bias, the moments are those about the means, and the bias makes up for these.

    Raises:
        DistillationError: an input is not finite.
    """
    own: dict[str, Any] = {name: module.get_submodule(name) for name in stage}
    layers: dict[str, Any] = {name: dense.get_submodule(name) for name in stage}
    sums = _Sums()
    with torch.no_grad():
        for their, our in zip(theirs, ours, strict=True):
            x = _input_in(module, stage[0], our)
            given = _input_in(dense, stage[0], their)
            sums.add(_wide(x), {name: _wide(layer(given)) for name, layer in layers.items()})
        if not bool(sums.xx.isfinite().all()):
            raise DistillationError(f"{part}: the input of {stage[0]} has an infinity or NaN")
        for name, layer in own.items():
            _fit(layer, _weight_of(layers[name], layer), sums, name)


def _input_in(module: nn.Module, layer: str, given: Given) -> Tensor:
    """What a layer of a module is given, (rows, in_features): the rest of the module does not run."""
    args, kwargs = given
    (seen,) = seen_in(lambda: module(*args, **kwargs), {layer: module.get_submodule(layer)}, 1)[layer]
    x = input_of(seen.given)
    return x.reshape(-1, x.shape[-1])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _weight_of(layer: Any, own: BlockLinearModule) -> Tensor:
    """(out_features, in_features) of a Linear or a Conv1D."""
    weight: Tensor = layer.weight.detach().double()
    return weight if isinstance(layer, nn.Linear) else weight.mT


def _fit(layer: BlockLinearModule, weight: Tensor, sums: _Sums, name: str) -> None:
    moment, crossed = sums.xx / sums.rows, sums.yx[name] / sums.rows
    x, y = sums.x / sums.rows, sums.y[name] / sums.rows
    if layer.bias is not None:
        moment, crossed = moment - x[:, None] * x, crossed - y[:, None] * x
    pull = TOWARDS * moment.diagonal().mean() + torch.finfo(moment.dtype).tiny
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    target = torch.linalg.solve(moment + pull * eye, (crossed + pull * weight).mT).mT
    factors = fitter(layer.kind, target, moment, layer.num_blocks, ITERATIONS)(layer.rank)
    pairs = ((layer.first, factors.first), (layer.second, factors.second), (layer.coupling, factors.coupling))
    for parameter, value in pairs:
        if parameter is not None and value is not None:
            parameter.data.copy_(value)
    if layer.bias is not None:
        layer.bias.data.copy_(y - layer.weight.double() @ x)
