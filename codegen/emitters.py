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
    shared_bytes: shared memory of one program under a tiling, an upper estimate.
    inputs: what `run` takes after the launcher, for an IR of known sizes, on a device.
    small: an IR that is quickly checked, of the same kernels.
    expected: the float64 reference of some inputs.
    bound: the largest relative Frobenius error that is right.
    """

    applies: Callable[[IR], bool]
    sized: Callable[[IR], IR]
    stages: Callable[[IR], tuple[str, ...]]
    variants: Callable[[Any, str, IR], Iterator[Any]]
    shared_bytes: Callable[[Tiling, IR], int]
    inputs: Callable[[IR, Any], tuple[Any, ...]]
    small: Callable[[IR], IR]
    expected: Callable[[IR, tuple[Tensor | None, ...]], Tensor]
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
    run: Callable[..., Tensor]
    tuning: Tuning
    meaning: tuple[ModuleType, ...] = ()

    def program_of(self, ir: IR, schedule: Any, specialization: Specialization) -> Program:
        """The program of any IR of the family; it depends on no size that kernels take at run time.

        Raises:
            CodegenError: `ir` is outside what kernels exist for, or `schedule` outside what it allows.
        """
        self.check(ir)
        self.check_schedule(schedule, ir)
        return self.program(self.canonical(ir), schedule, specialization)


@functools.cache
def emitter(family: str) -> Emitter:
    """The emitter of a family.

    Raises:
        CodegenError: no family has this name.
    """
    if family not in FAMILIES:
        raise CodegenError(f"no kernels for family {family!r}; families are {', '.join(FAMILIES)}")
    found: Emitter = importlib.import_module(FAMILIES[family].emitter).EMITTER
    return found
