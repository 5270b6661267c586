"""Parts of a model that are refined one after the other, and what they are given in calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from monarch_compile.calibration.inputs import Call
from monarch_compile.calibration.snapshot import Snapshot
from monarch_compile.errors import InputError
from monarch_compile.linear.modules import BlockLinearModule

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""What a module is given when it is called."""


@dataclass(frozen=True)
class Part:
    """A module of a model by its path, and the paths in it of its block linears; "" of the module itself."""

    name: str
    layers: tuple[str, ...]


def parts_of(model: nn.Module) -> list[Part]:
    """The outermost elements of lists and sequences of modules that hold block linears; single ones elsewhere."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BlockLinearModule):
            part = _part_of(model, name)
            found.setdefault(part, []).append(name[len(part) :].lstrip("."))
    return [Part(name, tuple(layers)) for name, layers in found.items()]


def _part_of(model: nn.Module, name: str) -> str:
    path = name.split(".")
    for depth in range(len(path)):
        if isinstance(model.get_submodule(".".join(path[:depth])), (nn.ModuleList, nn.Sequential)):
            return ".".join(path[: depth + 1])
    return name


class _Enough(BaseException):
    """What was asked for has been seen: the rest of a run is not needed. No Exception, which a model may catch."""


@dataclass
class Seen:
    """A call of a module. output: None while it runs."""

    given: Given
    output: Any = None


def seen_in(run: Callable[[], Any], modules: Mapping[str, nn.Module], most: int | None = None) -> dict[str, list[Seen]]:
    """The calls of modules in a run, by their names, in the order of their first calls. The run ends, unfinished, where
    the last of `most` calls begins."""
    found: dict[str, list[Seen]] = {}
    number = 0

    def before(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal number
            number += 1
            found.setdefault(name, []).append(Seen((args, kwargs)))
            if number == most:
                raise _Enough

        return note

    def after(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            next(seen for seen in reversed(found[name]) if seen.output is None).output = output

        return note

    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after(name)).remove)
        with suppress(_Enough):
            run()
    return found


@dataclass(frozen=True)
class _Link:
    """A part's input that is the output of the part before, while all others are those of that part: the numbers of
    the leaves."""

    given: int
    output: int


@dataclass(eq=False)
class Feeds:
    """What parts of some models of one structure are given in calls, in the order in which they run.

    What the next part is given comes from the part before where it is its output, and nothing else changes: the
    models then run once, else once for each part, up to it.
    """

    models: Sequence[nn.Module]
    calls: Sequence[Call]
    state: Snapshot

    def over(self, parts: Sequence[Part]) -> Iterator[tuple[Part, list[list[Given]]]]:
        """The parts that the first call reaches, in order; for each model, what the part is given in all calls.

        A part may change before the next one is asked for: what follows it is given what it gives then.
        """
        modules = {part.name: self.models[0].get_submodule(part.name) for part in parts}
        first = seen_in(self._run(self.models[0], self.calls[0]), modules)
        by_name = {part.name: part for part in parts}
        before: str | None = None
        given: list[list[Given]] = []
        for name in first:
            link = None if before is None else _link(first[before], first[name])
            if link is None or before is None:
                given = [self._recorded(model, name, len(first[name])) for model in self.models]
            else:
                pairs = zip(self.models, given, strict=True)
                given = [[_passed(model.get_submodule(before), one, link) for one in own] for model, own in pairs]
            yield by_name[name], given
            before = name

    def _run(self, model: nn.Module, call: Call) -> Callable[[], Any]:
        def run() -> None:
            self.state.restore()
            args, kwargs = call
            model(*args, **kwargs)

        return run

    def _recorded(self, model: nn.Module, name: str, number: int) -> list[Given]:
        module = {name: model.get_submodule(name)}
        found = [seen_in(self._run(model, call), module, number).get(name, []) for call in self.calls]
        if any(len(seen) != number for seen in found):
            raise InputError(f"{name} runs {number} times in the first call, but not in all")
        return [_detached(one.given) for seen in found for one in seen]


def _detached(given: Given) -> Given:
    detached: Given = pytree.tree_map_only(Tensor, Tensor.detach, given)
    return detached


def _link(before: Sequence[Seen], after: Sequence[Seen]) -> _Link | None:
    """How a part that runs once is fed by the part before; None where it is not, or not by it alone."""
    if len(before) != 1 or len(after) != 1:
        return None
    leaves, spec = pytree.tree_flatten(before[0].given)
    now, own = pytree.tree_flatten(after[0].given)
    outputs = pytree.tree_leaves(before[0].output)
    if spec != own:
        return None
    changed = [place for place, pair in enumerate(zip(leaves, now, strict=True)) if not _is_same(*pair)]
    links = [_Link(i, j) for i in changed for j, x in enumerate(outputs) if isinstance(x, Tensor) and x is now[i]]
    return links[0] if len(changed) == len(links) == 1 else None


def _is_same(x: Any, y: Any) -> bool:
    return x is y or (type(x) is type(y) and isinstance(x, (bool, int, float, str)) and x == y)


def _passed(module: nn.Module, given: Given, link: _Link) -> Given:
    """What the next part is given."""
    with torch.no_grad():
        output = pytree.tree_leaves(module(*given[0], **given[1]))[link.output]
    leaves, spec = pytree.tree_flatten(given)
    leaves[link.given] = output
    passed: Given = pytree.tree_unflatten(leaves, spec)
    return passed
