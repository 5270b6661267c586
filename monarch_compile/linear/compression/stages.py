"""Block linears fitted in closed form to what dense layers give, on what the compressed model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.errors import DistillationError
from monarch_compile.linear.compression.factors import fill, fitter, stored_weight
from monarch_compile.linear.compression.parts import Given, run_on, seen_in, version_of
from monarch_compile.linear.modules import BlockLinearModule

PULLS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the mean second moment: how much the dense weight may count beside the least squares."""
ITERATIONS = 20
"""Of BLAST."""
FLOOR = 1e-11
"""Of the mean second moment, added to each of those about the means: what is left of equal inputs is rounding."""


Stage = tuple[str, ...]
"""Layers of a part that run one after the other on the same tensor."""


def stages_of(module: nn.Module, layers: Sequence[str], given: Given) -> list[Stage]:
    """The layers of a part, in the order in which they run; without those that do not run, or more than once."""
    order: list[tuple[str, Tensor, int | None]] = []

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of((args, kwargs))
            order.append((name, x, version_of(x)))

        return note

    with ExitStack() as stack, torch.no_grad():
        for name in layers:
            handle = module.get_submodule(name).register_forward_pre_hook(noting(name), with_kwargs=True)
            stack.callback(handle.remove)
        run_on(module, given)
    names = [name for name, _, _ in order]
    stages: list[Stage] = []
    last: tuple[Tensor, int | None] | None = None
    for name, x, version in order:
        if names.count(name) != 1:
            last = None
            continue
        if last is not None and x is last[0] and version == last[1]:
            stages[-1] = (*stages[-1], name)
        else:
            stages.append((name,))
        last = (x, version)
    return stages


def input_of(given: Given) -> Tensor:
    """What a linear layer is given."""
    args, kwargs = given
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


@dataclass(frozen=True)
class _Means:
    """Means of inputs x and wanted outputs y of a layer, and moments E[x x^T] and E[y x^T]."""

    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor

    def target(self, weight: Tensor, pull: float) -> Tensor:
        """The weight (out_features, in_features) that is best for the outputs, beside a `pull` towards the dense one.

        Ridge regression (Hoerl, Kennard, Technometrics 12, 1970) about the dense weight, by the mean second moment.
        """
        added = pull * self.xx.diagonal().mean() + torch.finfo(self.xx.dtype).tiny
        eye = torch.eye(len(self.xx), dtype=self.xx.dtype, device=self.xx.device)
        solved: Tensor = torch.linalg.solve(self.xx + added * eye, (self.yx + added * weight).mT)
        return solved.mT

    def missed(self, weight: Tensor) -> float:
        """The squared error of a weight's outputs, less what is the same for all weights."""
        return float(((weight @ self.xx - 2 * self.yx) * weight).sum())


@dataclass
class _Sums:
    """Sums over rows of inputs x and wanted outputs y, in float64."""

    rows: int = 0
    x: Any = 0
    xx: Any = 0
    y: dict[str, Any] = field(default_factory=dict)
    yx: dict[str, Any] = field(default_factory=dict)

    def __add__(self, other: _Sums) -> _Sums:
        """Those over the rows of both."""
        y, yx = ({n: a.get(n, 0) + b.get(n, 0) for n in {*a, *b}} for a, b in ((self.y, other.y), (self.yx, other.yx)))
        return _Sums(self.rows + other.rows, self.x + other.x, self.xx + other.xx, y, yx)

    def about_means(self, name: str, centred: bool) -> _Means:
        """The moments of a layer, about the means where they are `centred`."""
        x, y = self.x / self.rows, self.y[name] / self.rows
        xx, yx = self.xx / self.rows, self.yx[name] / self.rows
        if not centred:
            return _Means(x, y, xx, yx)
        floor = FLOOR * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        return _Means(x, y, xx - x[:, None] * x + floor, yx - y[:, None] * x)

    def add(self, x: Tensor, wanted: Mapping[str, Tensor]) -> None:
        """x (rows, in_features), and outputs (rows, out_features) by the names of their layers; both in float64."""
        self.rows += len(x)
        self.x = self.x + x.sum(0)
        self.xx = self.xx + x.mT @ x
        for name, y in wanted.items():
            self.y[name] = self.y.get(name, 0) + y.sum(0)
            self.yx[name] = self.yx.get(name, 0) + y.mT @ x


def fit_stage(
    stage: Stage, dense: nn.Module, module: nn.Module, theirs: Sequence[Given], ours: Sequence[Given], part: str
) -> None:
    """Give the layers of a stage the factors and biases with which they come closest to the dense layers' outputs.

    With x the inputs in the compressed part `module` and y = W x' the outputs in the dense one, both over all calls,
    the best dense weight is T = E[y x^T] E[x x^T]^-1, damped towards W as much as makes the T of either half of the
    calls best for the other; the factors are the best for T under the second moment of x. Where there is a bias, the
    moments are those about the means, and the bias makes up for these. All in float64.

    Layers stay that are given more rows in one module than in the other, as experts are: their rows do not correspond.

    Raises:
        DistillationError: an input is not finite.
    """
    own: dict[str, Any] = {name: module.get_submodule(name) for name in stage}
    layers: dict[str, Any] = {name: dense.get_submodule(name) for name in stage}
    halves = (_Sums(), _Sums())
    with torch.no_grad():
        for number, (their, our) in enumerate(zip(theirs, ours, strict=True)):
            x, given = _input_in(module, stage[0], our), _input_in(dense, stage[0], their)
            if x is None and given is None:
                continue
            if x is None or given is None or x.shape != given.shape:
                return
            halves[number % 2].add(x.double(), {name: layer(given).double() for name, layer in layers.items()})
        whole = halves[0] + halves[1]
        if not whole.rows:
            return
        for name in stage:
            if not bool(whole.xx.isfinite().all() and whole.yx[name].isfinite().all()):
                raise DistillationError(
                    f"{part}: what {name} is given, or is to give, has an infinity or NaN; the model's weights are as "
                    "they were. Look for inputs with nan or inf"
                )
        for name, layer in own.items():
            _fit(layer, _weight_of(layers[name]), halves, name)


def _input_in(module: nn.Module, layer: str, given: Given) -> Tensor | None:
    """What a layer of a module is given, (rows, in_features): the rest of the module does not run. None where the layer
    does not."""
    seen = seen_in(lambda: run_on(module, given), {layer: module.get_submodule(layer)}, 1)
    if layer not in seen:
        return None
    x = input_of(seen[layer][0].given)
    return x.reshape(-1, x.shape[-1])


def _weight_of(layer: Any) -> Tensor:
    """(out_features, in_features) of a Linear or a Conv1D."""
    weight: Tensor = layer.weight.detach().double()
    return weight if isinstance(layer, nn.Linear) else weight.mT


def _fit(layer: BlockLinearModule, weight: Tensor, halves: tuple[_Sums, _Sums], name: str) -> None:
    centred = layer.bias is not None
    means = (halves[0] + halves[1]).about_means(name, centred)
    target = means.target(weight, _pull(weight, halves, name, centred=centred))
    factors = fitter(layer.kind, target, means.xx, layer.num_blocks, ITERATIONS)(layer.rank)
    fill(layer, factors)
    if layer.bias is not None:
        layer.bias.data.copy_(means.y - stored_weight(layer) @ means.x)


def _pull(weight: Tensor, halves: tuple[_Sums, _Sums], name: str, *, centred: bool) -> float:
    """That of `PULLS` with which the best weight for one half of the calls is the best for the other one too."""
    if not all(half.rows for half in halves):
        return PULLS[len(PULLS) // 2]
    first, second = (half.about_means(name, centred) for half in halves)

    def missed(pull: float) -> float:
        return second.missed(first.target(weight, pull)) + first.missed(second.target(weight, pull))

    return min(PULLS, key=missed)
