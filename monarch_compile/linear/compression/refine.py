"""`refine_`: block linears of a compressed model learn to give what the dense model gives, part by part."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from monarch_compile import autocast
from monarch_compile.calibration.inputs import Call, calls_of
from monarch_compile.calibration.instrument import uncompiled
from monarch_compile.calibration.metrics import outputs_apart, ratio, squares_apart
from monarch_compile.calibration.snapshot import Snapshot, kept
from monarch_compile.distillation.descent import Descent, Schedule, in_eval_mode
from monarch_compile.distillation.widened import widened
from monarch_compile.errors import InputError
from monarch_compile.linear.compression.layers import is_linear
from monarch_compile.linear.compression.ownership import refinable
from monarch_compile.linear.compression.parts import Feeds, Given, Part, run_on
from monarch_compile.linear.compression.report import ModelErrors, RefinedPart, RefineReport
from monarch_compile.linear.compression.stages import fit_stage, stages_of
from monarch_compile.linear.modules import BlockLinearModule
from monarch_compile.progress import Progress

logger = logging.getLogger(__name__)


def refine_(
    model: nn.Module,
    teacher: nn.Module,
    calls: Any,
    *,
    held_out: Any = None,
    steps: int = 100,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> RefineReport:
    """Let the block linears of a compressed model learn, without labels, to give what the dense model gives.

    The model is taken part by part: the elements of its outermost lists or sequences of modules (the layers of a
    transformer), else its single block linears. What a part is given is what the compressed model gives it, so that it
    makes up for errors of the parts before; what it is to give is what the dense model gives there.

    First each block linear, in the order in which they run, is fitted by least squares to the outputs of the dense
    layer: in closed form, as in `compress_`. Its bias too, where it has one. Then all factors and biases of the part
    take `steps` of Adam together. What makes the part's error on the calls no smaller is not kept.

    The model changes in place, part by part; all else than factors and biases stays as it is. Models run in eval mode,
    eagerly; mode, random state, buffers and attributes are put back. Inputs and outputs of one part are in memory at a
    time, of all calls. Of 16-bit weights, copies in float32 learn. Where it is interrupted, the parts that are done
    stay refined, and all others are as they were; after an error, all are.

    Args:
        model: what `compress_` made of a copy of `teacher`. Block linears whose requires_grad is False learn too; those
            that the first call does not run, and those that share weights with other modules or parts, stay.
        teacher: the dense model.
        calls: what to learn from, as in `compress_`. A step learns from one of them.
        held_out: other calls, to measure the error of the model's output on only.
        steps: of Adam, for each part; 0: closed forms alone.
        lr: what the first step changes, as a share of the root mean square of a weight's elements; falls to 0 along
            half a cosine.
        seed: of the order of the calls. The same arguments give the same weights, on a CPU bit for bit.
        progress: say on stderr what is being done.

    Raises:
        InputError: an argument is not allowed, the teacher has no dense linear of the same sizes at the path of a block
            linear, a part runs more often in one call than in another, or gives no floating tensor.
        DistillationError: a loss, or what a layer is given, is not finite, or no gradient reaches the factors; it names
            the part.
    """
    model, teacher = _module_of(model, "model"), _module_of(teacher, "teacher")
    schedule = Schedule.of(steps, lr, seed, least_steps=0)
    given = calls_of(calls)
    unseen = calls_of(held_out) if isinstance(held_out, Tensor) or held_out else []
    _require_pair(model, teacher)
    eval_mode = in_eval_mode(nn.ModuleList([model, teacher]))
    with torch.inference_mode(False), eval_mode, Snapshot(model, teacher, given, unseen) as state:
        return _Run(model, teacher, given, unseen, state, schedule, Progress("refine_", progress)).report()


def _module_of(model: Any, what: str) -> nn.Module:
    """The module that was compiled, of one that was."""
    inner: Any = uncompiled(model)
    if not isinstance(inner, nn.Module):
        raise InputError(f"{what} must be a torch.nn.Module; found {type(model)}")
    return inner


def _require_pair(model: nn.Module, teacher: nn.Module) -> None:
    """Raise InputError unless a model is a teacher with block linears in place of some of its linears."""
    dense = dict(teacher.named_modules())
    found = False
    for name, module in model.named_modules():
        if not isinstance(module, BlockLinearModule):
            continue
        found, own = True, dense.get(name)
        weight: Any = own.weight if is_linear(own) else None
        sizes = None if weight is None else tuple(weight.shape)
        wanted = (module.out_features, module.in_features)
        if sizes != (wanted if isinstance(own, nn.Linear) else wanted[::-1]):
            raise InputError(
                f"the teacher must have a dense linear {module.in_features} -> {module.out_features} at {name!r}; "
                f"found {'nothing' if own is None else type(own).__name__}"
                + ("" if sizes is None else f" with a weight of {sizes}")
            )
    if not found:
        raise InputError("the model has no block linear: compress_ makes them")


class _Run:
    """One call of `refine_`."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        calls: Sequence[Call],
        unseen: Sequence[Call],
        state: Snapshot,
        schedule: Schedule,
        say: Progress,
    ) -> None:
        self._model, self._teacher, self._calls, self._unseen = model, teacher, calls, unseen
        self._state, self._schedule, self._say = state, schedule, say

    def report(self) -> RefineReport:
        """Refine all parts."""
        start = time.perf_counter()
        before = [self._error(calls) for calls in (self._calls, self._unseen)]
        feeds = Feeds((self._teacher, self._model), self._calls, self._state)
        parts, left = refinable(self._model, self._teacher, feeds.called())
        learned = [p for part in parts for p in _learned(self._model.get_submodule(part.name), part).values()]
        values = [p.detach().clone() for p in learned]
        try:
            done = tuple(self._refined(feeds, parts))
        except Exception:
            _write(learned, values)
            raise
        finally:
            self._say.end()
        after = [self._error(calls) for calls in (self._calls, self._unseen)]
        calls, held_out = (
            None if x is None or y is None else ModelErrors(x, y) for x, y in zip(before, after, strict=True)
        )
        assert calls is not None
        numbers, seconds = (len(self._calls), len(self._unseen)), time.perf_counter() - start
        return RefineReport(done, calls, held_out, *numbers, self._schedule.steps, seconds, tuple(left))

    def _refined(self, feeds: Feeds, parts: Sequence[Part]) -> Iterator[RefinedPart]:
        for number, (part, (theirs, ours)) in enumerate(feeds.over(parts)):
            place = f"{number + 1} of {len(parts)}: {part.name}"
            self._say(place)
            yield _Refining(part, self._teacher, self._model, theirs, ours, self._schedule).done(self._say, place)

    def _error(self, calls: Sequence[Call]) -> float | None:
        """Relative error of the model's output on some calls; None where there are none. One call's are in memory."""
        difference = norm = 0.0
        for call in calls:
            own, square = outputs_apart(self._output(self._teacher, call), self._output(self._model, call))
            difference, norm = difference + own, norm + square
        return ratio(difference, norm) if calls else None

    def _output(self, model: nn.Module, call: Call) -> Any:
        args, kwargs = call
        self._state.restore()
        with torch.no_grad():
            return kept(model(*args, **kwargs))


class _Refining:
    """A part while it is refined. theirs: what the dense model gives it in each call; ours: what the other one does."""

    def __init__(
        self,
        part: Part,
        teacher: nn.Module,
        model: nn.Module,
        theirs: Sequence[Given],
        ours: Sequence[Given],
        schedule: Schedule,
    ) -> None:
        self._part, self._schedule = part, schedule
        self._dense, self._module = teacher.get_submodule(part.name), model.get_submodule(part.name)
        self._theirs, self._ours = theirs, ours
        self._learned = _learned(self._module, part)
        with torch.no_grad():
            self._targets = [_floats(kept(run_on(self._dense, given))) for given in theirs]
        if not all(self._targets):
            raise InputError(f"{part.name} must give a floating tensor in all calls; found none in what it gives")

    def done(self, say: Progress, place: str) -> RefinedPart:
        """Refine it; where that is not finished, its weights are as they were."""
        start = time.perf_counter()
        values = [p.detach().clone() for p in self._learned.values()]
        errors = [self._error()]
        try:
            for improve in (self._fit, self._descend):
                before = [p.detach().clone() for p in self._learned.values()]
                improve(say, place)
                errors.append(self._error())
                if not errors[-1] < errors[-2]:
                    _write(self._learned.values(), before)
                    errors[-1] = errors[-2]
        except BaseException:
            _write(self._learned.values(), values)
            raise
        logger.info("refined %s: errors %s", self._part.name, errors)
        first, fitted, last = errors
        return RefinedPart(self._part.name, len(self._part.layers), first, fitted, last, time.perf_counter() - start)

    def _error(self) -> float:
        difference = norm = 0.0
        with torch.no_grad():
            for given, target in zip(self._ours, self._targets, strict=True):
                for x, y in zip(target, _floats(run_on(self._module, given)), strict=True):
                    own, square = squares_apart(x, y)
                    difference, norm = difference + own, norm + square
        return ratio(difference, norm)

    def _fit(self, say: Progress, place: str) -> None:
        """Fit each layer in closed form."""
        names = self._part.layers
        for stage in stages_of(self._module, names, self._ours[0]):
            say(f"{place}: {', '.join(stage)}")
            fit_stage(stage, self._dense, self._module, self._theirs, self._ours, self._part.name)

    def _descend(self, say: Progress, place: str) -> None:
        """Let factors and biases learn together."""
        if not self._schedule.steps:
            return
        state = {**dict(self._module.named_parameters()), **dict(self._module.named_buffers())}
        masters = {name: widened(value.detach()) for name, value in state.items()}
        for name in self._learned:
            masters[name] = masters[name].clone()
        descent = Descent(self._part.name, [masters[name] for name in self._learned], self._schedule)
        device = next(iter(masters.values())).device.type
        with autocast.switched_off(device):
            for step in range(self._schedule.steps):
                place_of = self._schedule.place(step, len(self._ours))
                loss = descent.take(step, lambda at=place_of: self._loss(masters, at))  # type: ignore[misc]
                say(f"{place}: step {step + 1} of {self._schedule.steps}, relative error {loss**0.5:.4f}")
        _write(self._learned.values(), [masters[name].detach() for name in self._learned])

    def _loss(self, masters: Mapping[str, Tensor], place: int) -> Tensor:
        def run(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._module, dict(masters), args, kwargs)

        outputs = _floats(run_on(run, pytree.tree_map(widened, self._ours[place])))
        targets = [widened(x) for x in self._targets[place]]
        missed = torch.stack([(x - y).square().sum() for x, y in zip(outputs, targets, strict=True)]).sum()
        norm = torch.stack([y.square().sum() for y in targets]).sum()
        return missed / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def _learned(module: nn.Module, part: Part) -> dict[str, nn.Parameter]:
    """The factors and biases of the block linears of a part, by their paths in its module."""
    own = [(name, module.get_submodule(name)) for name in part.layers]
    return {f"{name}.{key}".lstrip("."): p for name, layer in own for key, p in layer.named_parameters()}


def _write(parameters: Any, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)  # without a new version, of which a snapshot would warn


def _floats(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
