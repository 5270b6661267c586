"""What a family gives the code generator."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

from torch import Tensor

from monarch_compile.codegen.program import Program
from monarch_compile.codegen.tiling import Capability, Tiling
from monarch_compile.errors import CodegenError
from monarch_compile.registry import FAMILIES


class Schedule(Protocol):
    """How the kernels of one IR are tiled: a frozen dataclass, printable and hashable."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    family: ClassVar[str]

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""


IR = Any
"""A frozen IR value; `family` names its emitter."""

Specialization = Any
"""What of the sizes and strides of a launch lets kernels do with less: a frozen value that the family alone reads."""


@dataclass(frozen=True)
class Tuning:
    """What the search for schedules needs to know of a family.

    applies: whether there is a search for an IR, which has a kernel.
    sized: an IR as it is tuned, all of its sizes known.
    stages: the fields of a schedule that matter to an IR, the costliest first.
    variants: schedules that differ from one in one stage, legal or not.
    shared_bytes: shared memory of one program of a kernel, by its name, under a tiling; an upper estimate.
    inputs: what `run` takes after the launcher, for an IR of known sizes, on a device.
    small: an IR that is quickly checked, of the same kernels.
    expected: what `run` gives for some inputs, by the float64 reference.
    bound: the largest relative Frobenius error that is right, of each tensor.
    """

    applies: Callable[[IR], bool]
    sized: Callable[[IR], IR]
    stages: Callable[[IR], tuple[str, ...]]
    variants: Callable[[Any, str, IR], Iterator[Any]]
    shared_bytes: Callable[[str, Tiling, IR], int]
    inputs: Callable[[IR, Any], tuple[Any, ...]]
    small: Callable[[IR], IR]
    expected: Callable[[IR, tuple[Tensor | None, ...]], Tensor | tuple[Tensor, ...]]
    bound: Callable[[IR], float]


@dataclass(frozen=True)
class Emitter:
    """A family's way from its IR to kernels, as plain functions.

    templates: the folder of its kernel templates.
    check: raises CodegenError where no kernel exists for an IR.
    bucketed: an IR as its launcher is made for it: sizes that are known only at run time by name, and each length the
        largest that shares a schedule with it.
    canonical: an IR with all sizes that kernels take at run time by name: their text depends on no more.
    describe: what a tuned schedule depends on of an IR, readable.
    choose_schedule: the shipped schedule. Raises CodegenError where no kernel exists.
    check_schedule: raises CodegenError where a schedule is outside what an IR allows.
    is_made_for: whether a schedule, as a file may hold it, has the kernels that an IR needs.
    read_schedule: the inverse of `dataclasses.asdict`. Raises CodegenError, KeyError or TypeError for anything else.
    program: kernels of a canonical IR under a schedule and a specialization.
    expected: the specialization of a launch of an IR on usual tensors, as far as its sizes are known.
    specialize: that of a launch on given tensors, with given sizes.
    run: launches a launcher on the family's tensors.
    gradients: an IR that stands for the gradients of an IR, of a family name with its own emitter (`emitter`); None
        where they have no kernels of their own.
    sizes: the sizes that programs of an IR name, with a value for each symbolic one. Raises KeyError where one has no
        value. None for a family that does not count them.
    meaning: modules outside of codegen by which kernels are emitted and launched: tuned schedules are of these, too.
    """

    family: str
    templates: Path
    check: Callable[[IR], None]
    bucketed: Callable[[IR], IR]
    canonical: Callable[[IR], IR]
    describe: Callable[[IR], str]
    choose_schedule: Callable[[IR, Capability | None], Any]
    check_schedule: Callable[[Any, IR], None]
    is_made_for: Callable[[Any, IR], bool]
    read_schedule: Callable[[Mapping[str, Any]], Any]
    program: Callable[[IR, Any, Specialization], Program]
    expected: Callable[[IR, Any], Specialization]
    specialize: Callable[[IR, Any, Mapping[str, Tensor], Mapping[str, Any]], Specialization]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    tuning: Tuning
    gradients: Callable[[IR], IR | None] = lambda ir: None
    sizes: Callable[[IR, Mapping[str, int]], Mapping[str, int]] | None = None
    meaning: tuple[ModuleType, ...] = ()

    def program_of(self, ir: IR, schedule: Any, specialization: Specialization) -> Program:
        """The program of any IR of the family; it depends on no size that kernels take at run time.

        Raises:
            CodegenError: `ir` is outside what kernels exist for, or `schedule` outside what it allows.
        """
        self.check(ir)
        self.check_schedule(schedule, ir)
        return self.program(self.canonical(ir), schedule, specialization)


OF_GRADIENTS = "/gradients"
"""What follows a family's name where the emitter of its gradients is meant."""


@functools.cache
def emitter(family: str) -> Emitter:
    """The emitter of a family, or of its gradients.

    Raises:
        CodegenError: no family has this name.
    """
    name = family.removesuffix(OF_GRADIENTS)
    if name not in FAMILIES or (name != family and not FAMILIES[name].gradients):
        raise CodegenError(f"no kernels for family {family!r}; families are {', '.join(FAMILIES)}")
    if name != family:
        of_gradients: Emitter = importlib.import_module(FAMILIES[name].gradients).GRADIENTS
        return of_gradients
    found: Emitter = importlib.import_module(FAMILIES[name].emitter).EMITTER
    return found


def launched(ir: IR, trains: bool) -> tuple[IR, ...]:
    """What kernels run for at the site of `ir`: it, and its gradients where the site trains and they have kernels."""
    gradients = emitter(ir.family).gradients(ir) if trains else None
    return (ir,) if gradients is None else (ir, gradients)
