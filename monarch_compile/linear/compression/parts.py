"""Parts of a model that are refined one after the other, and what they are given in calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
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
IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""Arguments that no run of a module changes."""


@dataclass(frozen=True)
class Part:
    """A module of a model by its path, and the paths in it of its block linears; "" of the module itself."""

    name: str
    layers: tuple[str, ...]


def parts_of(model: nn.Module, called: Container[str]) -> list[Part]:
    """The block linears that run, by parts: the outermost elements of lists and sequences of modules that run as a
    whole; single block linears elsewhere.

    called: paths of the modules that run, among which a list of modules is not.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BlockLinearModule) and name in called:
            part = _part_of(model, name, called)
            found.setdefault(part, []).append(name[len(part) :].lstrip("."))
    return [Part(name, tuple(layers)) for name, layers in found.items()]


def _part_of(model: nn.Module, name: str, called: Container[str]) -> str:
    path = name.split(".")
    is_in_list = False
    for depth in range(len(path)):
        above, place = (".".join(path[:end]) for end in (depth, depth + 1))
        is_in_list = is_in_list or isinstance(model.get_submodule(above), (nn.ModuleList, nn.Sequential))
        if is_in_list and place in called:
            return place
    return name


def run_on(function: Callable[..., Any], given: Given) -> Any:
    """What a function gives of arguments. What it writes to tensors reaches copies; other objects are put back."""
    objects = [x for x in pytree.tree_leaves(given) if not isinstance(x, (Tensor, *IMMUTABLE))]
    with Snapshot(*objects) if objects else nullcontext():
        args, kwargs = _copied(given)
        return function(*args, **kwargs)


def _copied(given: Given) -> Given:
    """The same with copies of tensors, each once; expanded ones, to which nothing can be written, stay."""
    copies: dict[int, Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        is_expanded = any(size > 1 and not step for size, step in zip(x.shape, x.stride(), strict=True))
        return copies.setdefault(id(x), x.detach() if is_expanded else x.detach().clone())

    made: Given = pytree.tree_map_only(Tensor, copied, given)
    return made


class _Enough(BaseException):
    """What was asked for has been seen: the rest of a run is not needed. No Exception, which a model may catch."""


@dataclass
class Seen:
    """A call of a module. output: None while it runs. versions: of the tensors that it is given, and gives."""

    given: Given
    versions: Sequence[int | None]
    output: Any = None
    output_versions: Sequence[int | None] = ()


def version_of(x: Any) -> int | None:
    """A tensor's number of writes; None where none is counted."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _versions(tree: Any) -> list[int | None]:
    return [version_of(x) for x in pytree.tree_leaves(tree)]


def seen_in(
    run: Callable[[], Any],
    modules: Mapping[str, nn.Module],
    most: int | None = None,
    take: Callable[[Given], Given] = lambda given: given,
) -> dict[str, list[Seen]]:
    """The calls of modules in a run, by their names, in the order of their first calls. The run ends, unfinished, where
    the last of `most` calls begins. take: what is kept of what a module is given."""
    found: dict[str, list[Seen]] = {}
    number = 0

    def before(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal number
            number += 1
            found.setdefault(name, []).append(Seen(take((args, kwargs)), _versions((args, kwargs))))
            if number == most:
                raise _Enough

        return note

    def after(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen = next(seen for seen in reversed(found[name]) if seen.output is None)
            seen.output, seen.output_versions = output, _versions(output)

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

    def called(self) -> set[str]:
        """The paths of the modules that the first call runs."""
        found: set[str] = set()

        def noting(name: str) -> Any:
            return lambda *_: found.add(name)

        with ExitStack() as stack, torch.no_grad():
            for name, module in self.models[0].named_modules():
                stack.callback(module.register_forward_pre_hook(noting(name)).remove)
            self._run(self.models[0], self.calls[0])()
        return found

    def over(self, parts: Sequence[Part]) -> Iterator[tuple[Part, list[list[Given]]]]:
        """The parts, in the order in which they run in the first call, which reaches all; for each model, what the part
        is given in all calls.

        A part may change before the next one is asked for: what follows it is given what it gives then.

        Raises:
            InputError: a part runs more often in one call than in another.
        """
        counts, links = self._order(parts)
        by_name = {part.name: part for part in parts}
        before = ""
        given: list[list[Given]] = []
        for name, count in counts.items():
            link = links.get(name)
            if link is None:
                given = []  # of the part before: is not needed any more
                given = [self._recorded(model, name, count) for model in self.models]
            else:
                pairs = zip(self.models, given, strict=True)
                given = [[_passed(model.get_submodule(before), one, link) for one in own] for model, own in pairs]
            yield by_name[name], given
            before = name

    def _order(self, parts: Sequence[Part]) -> tuple[dict[str, int], dict[str, _Link]]:
        """How often each part runs, in the order of the first call, and how it is fed where that is alike in all."""
        modules = {part.name: self.models[0].get_submodule(part.name) for part in parts}
        counts: dict[str, int] = {}
        links: dict[str, _Link | None] = {}
        for place, call in enumerate(self.calls):
            seen = seen_in(self._run(self.models[0], call), modules)  # of one call at a time, for its memory
            found = {after: _link(seen[before], seen[after]) for before, after in pairwise(seen)}
            if place == 0:
                counts, links = {name: len(runs) for name, runs in seen.items()}, found
            for name, count in counts.items():
                _require_as_often(name, count, len(seen.get(name, ())), place)
            links = {name: link for name, link in links.items() if found.get(name) == link and [*seen] == [*counts]}
        return counts, {name: link for name, link in links.items() if link is not None}

    def _run(self, model: nn.Module, call: Call) -> Callable[[], Any]:
        def run() -> None:
            self.state.restore()
            args, kwargs = call
            model(*args, **kwargs)

        return run

    def _recorded(self, model: nn.Module, name: str, number: int) -> list[Given]:
        module = {name: model.get_submodule(name)}
        found = [seen_in(self._run(model, call), module, number, _copied).get(name, []) for call in self.calls]
        for place, seen in enumerate(found):
            _require_as_often(name, number, len(seen), place)
        return [one.given for seen in found for one in seen]


def _require_as_often(name: str, first: int, found: int, place: int) -> None:
    if found != first:
        raise InputError(
            f"{name} must run as often in all calls; found {first} times in the first call, {found} times in call "
            f"{place + 1}"
        )


def _link(before: Sequence[Seen], after: Sequence[Seen]) -> _Link | None:
    """How a part that runs once is fed by the part before; None where it is not, or not by it alone."""
    if len(before) != 1 or len(after) != 1:
        return None
    leaves, spec = pytree.tree_flatten(before[0].given)
    now, own = pytree.tree_flatten(after[0].given)
    if spec != own:
        return None
    earlier, later = (list(zip(x, y.versions, strict=True)) for x, y in ((leaves, before[0]), (now, after[0])))
    outputs = list(zip(pytree.tree_leaves(before[0].output), before[0].output_versions, strict=True))
    changed = [place for place, pair in enumerate(zip(earlier, later, strict=True)) if not _is_same(*pair)]
    links = [
        _Link(i, j)
        for i in changed
        for j, x in enumerate(outputs)
        if isinstance(x[0], Tensor) and _is_same(x, later[i])
    ]
    return links[0] if len(changed) == len(links) == 1 else None


def _is_same(one: tuple[Any, int | None], other: tuple[Any, int | None]) -> bool:
    """Whether a value, with its version, is another one and cannot have changed in between."""
    (x, version), (y, now) = one, other
    if isinstance(x, Tensor):
        return x is y and version == now
    return type(x) is type(y) and isinstance(x, IMMUTABLE) and bool(x == y)


def _passed(module: nn.Module, given: Given, link: _Link) -> Given:
    """What the next part is given."""
    with torch.no_grad():
        output = pytree.tree_leaves(run_on(module, given))[link.output]
    leaves, spec = pytree.tree_flatten(given)
    leaves[link.given] = output
    passed: Given = pytree.tree_unflatten(leaves, spec)
    return passed
