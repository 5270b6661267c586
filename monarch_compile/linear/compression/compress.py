"""`compress_`: dense linear layers become block linears, in place."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from monarch_compile.calibration.inputs import Call, calls_of
from monarch_compile.errors import InputError
from monarch_compile.linear.compression.configs import BlastLinearConfig, Config, MonarchLinearConfig
from monarch_compile.linear.compression.factors import Spectrum, fill, fitter, squared, stored_weight
from monarch_compile.linear.compression.layers import FilterFn, Layer, block_module, find_layers
from monarch_compile.linear.compression.moments import groups_of, moments_of
from monarch_compile.linear.compression.ranks import Curve, ranks_within
from monarch_compile.linear.compression.report import CompressedLayer, CompressionReport
from monarch_compile.linear.modules import MODULES, common_divisors, size_of
from monarch_compile.progress import Progress

logger = logging.getLogger(__name__)


def compress_(
    model: nn.Module,
    config: Config,
    filter_fn: FilterFn | None = None,
    calls: Any = None,
    *,
    progress: bool = True,
) -> CompressionReport:
    """Replace linear layers of a model by `MonarchLinear` or `BlastLinear`, fitted to their weights.

    The model changes in place, one layer at a time, and needs no more memory than one layer's fit takes (with calls:
    and second moments of at most 1 GiB, or of one layer). Where it is interrupted, every layer is either as it was or
    compressed; a second call goes on with the rest. Weights that are trained stay so; biases are kept.

    Args:
        model: holds `torch.nn.Linear` layers, or Conv1D of transformers. What else holds a linear, or shares its
            weight, stays; the report says why.
        config: `MonarchLinearConfig` or `BlastLinearConfig`.
        filter_fn: of a layer and its path in the model, whether to compress it; None: all.
        calls: a few typical inputs of the model; a list of calls, each a tensor, a tuple of positional arguments, a
            dict of keyword arguments, or ((positional, ...), {keyword: ...}). With them, the error of each layer's
            output on these inputs is least, not that of its weight. Layers before may be compressed by then.
        progress: say on stderr what is being done.

    Raises:
        InputError: `num_blocks` does not divide a layer's features, or a layer has no such rank (nothing is changed
            then); the model itself is a linear; no call is given in `calls`, or one gives an infinity or NaN.
    """
    if not isinstance(config, (MonarchLinearConfig, BlastLinearConfig)):
        raise InputError(f"config must be a MonarchLinearConfig or a BlastLinearConfig; found {type(config)}")
    if isinstance(model, nn.Linear):
        raise InputError("the model is itself a linear layer, which cannot be replaced in place: put it in a module")
    given = None if calls is None else calls_of(calls)
    layers, kept = find_layers(model, filter_fn)
    _require_fit(layers, config)
    with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be trained
        run = _Run(model, config, given, Progress("compress_", progress))
        done = tuple(run.over(layers))
    return CompressionReport(done, tuple(kept))


def _require_fit(layers: Sequence[Layer], config: Config) -> None:
    """Raise InputError, which lists what would do, where a layer cannot be cut like this."""
    for layer in layers:
        out_features, in_features = layer.weight.shape
        if config.num_blocks not in common_divisors(in_features, out_features):
            everywhere = common_divisors(*(size for one in layers for size in one.weight.shape))
            raise InputError(
                f"num_blocks={config.num_blocks} does not divide {in_features} -> {out_features} of {layer.name}; "
                f"these do: {_listed(common_divisors(in_features, out_features))}; these divide all {len(layers)} "
                f"chosen layers: {_listed(everywhere)}; or leave the layer out by filter_fn"
            )
        if config.rank is not None and config.rank > _most(layer, config):
            raise InputError(
                f"{layer.name} ({in_features} -> {out_features}) has no rank {config.rank}; there are "
                f"{'multiples of ' + str(config.step) if config.step > 1 else 'all'} up to {_most(layer, config)}"
            )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _most(layer: Layer, config: Config) -> int:
    """The largest rank of a layer: with it every weight is reached (Monarch), or no memory saved (BLAST)."""
    out_features, in_features = layer.weight.shape
    if isinstance(config, MonarchLinearConfig):
        return min(out_features, in_features)
    each = size_of(config.kind, in_features, out_features, config.num_blocks, 1)
    return max(1, layer.size // each, min(out_features, in_features))


@dataclass(frozen=True)
class _Problem:
    """A layer's weight in float64, and the second moment of its inputs where there is one."""

    layer: Layer
    weight: Tensor
    moment: Tensor | None

    def error(self, weight: Tensor) -> float:
        """Relative error of a weight: of the output where there are moments."""
        whole = squared(self.weight, self.moment)
        return math.sqrt(squared(self.weight - weight, self.moment) / whole) if whole else 0.0


class _Run:
    """One call of `compress_`."""

    def __init__(self, model: nn.Module, config: Config, calls: Sequence[Call] | None, say: Progress) -> None:
        self._model, self._config, self._calls, self._say = model, config, calls, say

    def over(self, layers: Sequence[Layer]) -> Iterator[CompressedLayer]:
        """Compress the layers, one by one."""
        ranks = self._ranks(layers)
        try:
            for number, problem in enumerate(self._problems(layers)):
                self._say(f"{number + 1} of {len(layers)}: {problem.layer.name}")
                yield self._compressed(problem, ranks.get(problem.layer.name))
        finally:
            self._say.end()

    def _problems(self, layers: Sequence[Layer]) -> Iterator[_Problem]:
        for group in groups_of(layers):
            moments = {} if self._calls is None else moments_of(self._model, group, self._calls)
            for layer in group:
                yield _Problem(layer, layer.weight.double(), moments.pop(layer.name, None))

    def _ranks(self, layers: Sequence[Layer]) -> Mapping[str, int]:
        """The rank of each layer by its name; none where a layer's own error says."""
        config = self._config
        if config.rank is not None:
            return dict.fromkeys((layer.name for layer in layers), config.rank)
        if config.budget is None or not layers:
            return {}
        if isinstance(config, BlastLinearConfig):
            return {layer.name: _blast_rank(layer, config) for layer in layers}
        curves = []
        for number, problem in enumerate(self._problems(layers)):
            self._say(f"rank of {number + 1} of {len(layers)}: {problem.layer.name}")
            lost = Spectrum.of(problem.weight, config.num_blocks, problem.moment).lost()
            whole = float(lost[0]) or 1.0
            out_features, in_features = problem.weight.shape
            each = size_of(config.kind, in_features, out_features, config.num_blocks, config.step)
            shares = [float(x) / whole for x in lost]
            curves.append(Curve(problem.layer.name, shares, config.step, each, problem.layer.size))
        return ranks_within(curves, config.budget)

    def _compressed(self, problem: _Problem, rank: int | None) -> CompressedLayer:
        layer, config = problem.layer, self._config
        fit = fitter(config.kind, problem.weight, problem.moment, config.num_blocks, config.iterations)
        if rank is None:
            rank = self._least_rank(problem, fit)
        factors = fit(rank)
        module = block_module(layer, MODULES[config.kind], config.num_blocks, rank)
        fill(module, factors)
        stored = stored_weight(module)
        out_features, in_features = problem.weight.shape
        done = CompressedLayer(
            name=layer.name,
            kind=config.kind,
            in_features=in_features,
            out_features=out_features,
            num_blocks=config.num_blocks,
            rank=rank,
            dtype=layer.weight.dtype,
            device=layer.weight.device.type,
            weight_error=_Problem(layer, problem.weight, None).error(stored),
            output_error=None if problem.moment is None else problem.error(stored),
            parameters=module.num_factor_parameters,
        )
        layer.replace_by(module)
        logger.info("compressed %s: rank %d, %d parameters", done.name, rank, done.parameters)
        return done

    def _least_rank(self, problem: _Problem, fit: Any) -> int:
        """The least rank whose error is small enough, by bisection; the largest where none is."""
        step, bound = self._config.step, self._config.max_error
        assert bound is not None
        low, high = 1, _most(problem.layer, self._config) // step
        while low < high:
            middle = (low + high) // 2
            if problem.error(fit(middle * step).weight) <= bound:
                high = middle
            else:
                low = middle + 1
        return low * step


def _blast_rank(layer: Layer, config: BlastLinearConfig) -> int:
    out_features, in_features = layer.weight.shape
    each = size_of(config.kind, in_features, out_features, config.num_blocks, 1)
    assert config.budget is not None
    rank = int(config.budget * layer.size) // each
    if rank < 1:
        raise InputError(f"budget={config.budget} is below {each / layer.size:.4f}, which rank 1 of {layer.name} takes")
    return rank
