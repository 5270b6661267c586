"""What runs of a model change, saved and put back: runs that are compared must start alike."""

from __future__ import annotations

import enum
import functools
import logging
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)

MAX_NESTED = 3
"""Plain objects are followed this deep: a cache that holds caches that hold layers is three."""
NO_STATE = {"torch", *sys.stdlib_module_names}
"""Packages whose plain objects and functions hold nothing that a run of a model reads again."""
ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, enum.Enum)

Undo = Callable[[], None]
Saved = tuple[Iterable[Any], Undo | None]
"""What an object leads to, and what puts its own contents back."""


class Snapshot:
    """The state of models and arguments as it was when the snapshot was made; as a context, restored at its end.

    Saved are

    - the global generators of PyTorch (CPU, and CUDA once it is initialized), of NumPy and of Python's `random`, and
      every torch.Generator that is found;
    - the values of all tensors that are found, except parameters: buffers, plain attributes, caches, arguments;
    - the attributes of modules and plain objects, the elements of lists, dicts, sets and deques, and the variables of
      closures, so that a step counter or a list that grows is put back too.

    Found is what the roots lead to: modules, containers, functions (their closures, defaults, and the globals that they
    name, of functions only those of the same file), bound methods, partials, and plain objects up to `MAX_NESTED` deep.

    Not saved are parameters, for their size (`restore` warns of one that was written to), globals that are assigned
    to, attributes of classes, what hooks hold, objects without a `__dict__`, and anything outside the process.
    """

    def __init__(self, *roots: Any) -> None:
        self._undo: list[Undo] = list(_global_generators())
        self._found: dict[int, Any] = {}  # keeps what it holds alive, so that no id is given twice
        pending = deque((root, MAX_NESTED) for root in roots)
        while pending:
            item, depth = pending.popleft()
            if id(item) in self._found or isinstance(item, ATOMS):
                continue
            self._found[id(item)] = item
            rule = next((rule for kinds, rule in RULES if isinstance(item, kinds)), None)
            if rule is None and depth and _is_plain(item):
                rule, depth = _save_attributes, depth - 1
            if rule is not None:
                children, undo = rule(item)
                pending += [(child, depth) for child in children]
                self._undo += [undo] if undo is not None else []

    def __enter__(self) -> Snapshot:
        """The snapshot, made already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Restore, whether or not something was raised."""
        self.restore()

    def restore(self) -> None:
        """Put everything back; may be called any number of times."""
        for undo in self._undo:
            undo()


def kept(output: Any) -> Any:
    """An output whose tensors later runs and `restore` do not write to."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)


def _global_generators() -> Iterator[Undo]:
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    yield lambda: torch.set_rng_state(cpu)
    yield lambda: random.setstate(python)
    yield lambda: np.random.set_state(numpy)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        cuda = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(cuda)


# ---- a rule for each kind of object ----------------------------------------------------------------------------------


def _save_parameter(parameter: nn.Parameter) -> Saved:
    if is_lazy(parameter) or parameter.is_inference():  # has no values yet, or no version
        return (), None
    version, shape = parameter._version, list(parameter.shape)

    def warn() -> None:
        nonlocal version
        if parameter._version != version:
            version = parameter._version
            logger.warning("the model wrote to a parameter of shape %s, which is not put back: runs differ", shape)

    return (), warn


def _save_tensor(tensor: Tensor) -> Saved:
    if is_lazy(tensor):
        return (), None
    memory = tensor.data  # of the same storage, without autograd, and with a version of its own
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    distinct = memory
    for dim, stride in enumerate(strides):  # an expanded dim cannot be written to
        distinct = distinct.narrow(dim, 0, min(1, distinct.shape[dim])) if stride == 0 else distinct
    values = distinct.clone()

    def undo() -> None:
        with torch.no_grad():
            distinct.copy_(values)
            if type(tensor) is Tensor and (tensor.shape != memory.shape or tensor.data_ptr() != memory.data_ptr()):
                tensor.data = memory

    return (), undo


def _save_generator(generator: torch.Generator) -> Saved:
    state = generator.get_state()

    def undo() -> None:
        generator.set_state(state)

    return (), undo


def _save_module(module: nn.Module) -> Saved:
    attributes = vars(module)
    children = [value for name, value in attributes.items() if "_hooks" not in name]
    made_by_its_first_run = isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    return (*children, *module.buffers(recurse=False)), None if made_by_its_first_run else _put_back(attributes)


def _save_attributes(owner: Any) -> Saved:
    return vars(owner).values(), _put_back(vars(owner))


def _save_dict(mapping: dict[Any, Any]) -> Saved:
    return mapping.values(), _put_back(mapping)


def _put_back(mapping: dict[Any, Any]) -> Undo:
    """Puts the items back, past what a subclass forbids."""
    saved = list(mapping.items())
    base = OrderedDict if isinstance(mapping, OrderedDict) else dict

    def undo() -> None:
        if len(mapping) == len(saved) and all(
            name is key and value is item for (name, value), (key, item) in zip(mapping.items(), saved, strict=True)
        ):
            return
        base.clear(mapping)
        for name, value in saved:
            base.__setitem__(mapping, name, value)

    return undo


def _save_sequence(sequence: list[Any] | deque[Any]) -> Saved:
    saved = list(sequence)

    def undo() -> None:
        if len(sequence) != len(saved) or any(x is not y for x, y in zip(sequence, saved, strict=True)):
            sequence.clear()
            sequence.extend(saved)

    return saved, undo


def _save_set(elements: set[Any]) -> Saved:
    saved = set(elements)

    def undo() -> None:
        if elements != saved:
            elements.clear()
            elements.update(saved)

    return saved, undo


def _save_cell(cell: types.CellType) -> Saved:
    try:
        contents = cell.cell_contents
    except ValueError:  # assigned later
        return (), None

    def undo() -> None:
        cell.cell_contents = contents

    return (contents,), undo


def _enter_function(function: types.FunctionType) -> Saved:
    original = getattr(function, "_torchdynamo_orig_callable", None)
    if original is not None:
        return (original,), None
    if _top_level(function.__module__) in NO_STATE:
        return (), None
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    named = [function.__globals__[name] for name in sorted(names) if name in function.__globals__]
    ours = [x for x in named if not isinstance(x, types.FunctionType) or x.__module__ == function.__module__]
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return (*(function.__closure__ or ()), *defaults, *ours), None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and those of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _enter_method(method: types.MethodType) -> Saved:
    return (method.__self__, method.__func__), None


def _enter_partial(partial: functools.partial[Any]) -> Saved:
    return (partial.func, partial.args, partial.keywords), None


def _enter_elements(elements: Iterable[Any]) -> Saved:
    return elements, None


RULES: tuple[tuple[Any, Callable[[Any], Saved]], ...] = (
    (nn.Parameter, _save_parameter),
    (Tensor, _save_tensor),
    (torch.Generator, _save_generator),
    (nn.Module, _save_module),
    (dict, _save_dict),
    ((list, deque), _save_sequence),
    (set, _save_set),
    ((tuple, frozenset), _enter_elements),
    (types.CellType, _save_cell),
    (types.FunctionType, _enter_function),
    (types.MethodType, _enter_method),
    (functools.partial, _enter_partial),
)
"""The first that fits an object is taken."""


def _is_plain(item: Any) -> bool:
    """Whether it is an instance with attributes, of a class that may hold a model's state."""
    return isinstance(getattr(item, "__dict__", None), dict) and _top_level(type(item).__module__) not in NO_STATE


def _top_level(module: str | None) -> str:
    return (module or "").partition(".")[0]
