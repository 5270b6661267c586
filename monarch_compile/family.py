"""What a family gives the report, the cost model, calibration and the doctor: numbers and words for its IR values."""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from monarch_compile.calls import DEVICE_ALONE, Calls
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import Cost, Prediction
from monarch_compile.decision import Decision
from monarch_compile.registry import FAMILIES

Form = Any
"""How a lowered site approximates what it stands for: a frozen dataclass of options. `family` names its family."""


class SiteCall(Protocol):
    """One run of one lowered site."""

    @property
    def site(self) -> str:
        """The site's name."""

    def exact(self) -> Tensor:
        """What the site computes where it is not lowered."""

    def monarch(self, **changes: Any) -> Tensor:
        """What it computes in the form that it was lowered to, or with other options."""

    def reference(self) -> Tensor:
        """What it computes in the form that it was lowered to, by plain operators, for autograd to differentiate."""


@dataclass(frozen=True)
class Occurrence:
    """A site in one captured graph: its IR, whose `form` may be changed, and the values of its symbolic sizes."""

    ir: Any
    hints: tuple[tuple[str, int], ...]

    def seconds(self, device: Device, form: Form) -> tuple[float, float]:
        """Predicted seconds of the exact form and of `form`."""
        own = family(self.ir.family)
        prediction = own.predict(replace(self.ir, form=form), device, dict(self.hints), DEVICE_ALONE)
        return prediction.exact_s, prediction.monarch_s


def total_seconds(occurrences: Sequence[Occurrence], device: Device, form: Form) -> tuple[float, float]:
    """Predicted seconds of a site in all of its graphs: exact form, and `form`."""
    exact_s, monarch_s = zip(*(o.seconds(device, form) for o in occurrences), strict=True)
    return sum(exact_s), sum(monarch_s)


@dataclass(frozen=True)
class Forms:
    """What a family whose lowered form is an approximation offers to calibration and to plans.

    read: the form of some options. Raises IRError or TypeError where they are none.
    that_pay: the forms to try at a site on a device, with the options that the caller has fixed.
    call: a run of a site, by its name and the arguments of its operator.
    learned: those of the operator's arguments, each with a word for it, that decide how good the approximation is:
        distillation changes the weights that lead to them, and no others.
    """

    read: Callable[..., Form]
    that_pay: Callable[[Sequence[Occurrence], Device, Mapping[str, Any]], list[Form]]
    call: Callable[[str, Sequence[Any]], SiteCall]
    learned: Mapping[int, str]


@dataclass(frozen=True)
class Trial:
    """A small problem through the backend, which tells whether a machine is fit.

    what: of the family, what is tried; "" where it goes without saying.
    error: relative error against the float64 reference, on a device.
    bounds: the largest that passes, by type of device.
    """

    error: Callable[[str], float]
    bounds: Mapping[str, float]
    what: str = ""


@dataclass(frozen=True)
class Family:
    """A family of operators, as plain functions of its IR values and of decisions about its sites.

    noun: what a site is called in the singular, e.g. "attention site"; its plural ends in s.
    cost: work of the lowered form. exact_cost: that of what a site computes today; None where it is not known.
    predict: times on a device, with a value for each symbolic size, as the site is called.
        Raises InputError where a size has no value.
    shape: how the report says what sizes a site has, e.g. "1x8x2048x64"; "" where they are not known.
    blocks: how the report says what blocks the lowered form has, e.g. "64x64". block_size: their size, None for none.
    no_kernels: why CUDA devices run the operator of a site without the emitted kernels; "" where they run these.
    forms: None where the lowered form is exact up to rounding. trials: what the doctor runs.
    """

    name: str
    noun: str
    cost: Callable[[Any], Cost]
    exact_cost: Callable[[Decision], Cost | None]
    predict: Callable[[Any, Device, Mapping[str, int] | None, Calls], Prediction]
    shape: Callable[[Decision], str]
    blocks: Callable[[Any], str]
    block_size: Callable[[Any], int | None]
    no_kernels: Callable[[Any], str] = lambda ir: ""
    forms: Forms | None = None
    trials: tuple[Trial, ...] = ()


@functools.cache
def family(name: str) -> Family:
    """The family of a name.

    Raises:
        KeyError: no family has it.
    """
    found: Family = importlib.import_module(FAMILIES[name].family).FAMILY
    return found


def forms_of(name: str) -> Forms:
    """The forms of a family.

    Raises:
        KeyError: no family of this name has any.
    """
    forms = family(name).forms
    if forms is None:
        raise KeyError(f"the family {name!r} has no forms")
    return forms


def with_forms(decisions: Iterable[Decision]) -> list[Decision]:
    """Those about sites whose lowered form is an approximation."""
    return [decision for decision in decisions if family(decision.family).forms is not None]


def families() -> tuple[Family, ...]:
    """All of them."""
    return tuple(family(name) for name in FAMILIES)


def sites_in_words(sites: Iterable[str]) -> str:
    """How many sites there are, given the family of each: "1 attention site and 2 long convolutions"; "no site"."""
    found = Counter(sites)
    counts = [(found[own.name], own.noun) for own in families() if found[own.name]]
    return _listed([f"{number} {noun if number == 1 else f'{noun}s'}" for number, noun in counts])


def lowered_in_words(sites: Iterable[tuple[str, bool]]) -> str:
    """How many are lowered, given the family of each and whether it is: "2 of 3 attention sites"; "no site" of none."""
    found = list(sites)
    numbers, lowered = Counter(own for own, _ in found), Counter(own for own, is_lowered in found if is_lowered)
    counts = [(lowered[own.name], numbers[own.name], own.noun) for own in families() if numbers[own.name]]
    return _listed([f"{part} of {whole} {noun}s" for part, whole, noun in counts])


def kinds_in_words() -> str:
    """What a site may be: "attention site, long convolution or block linear"."""
    return _listed([own.noun for own in families()], "or")


def _listed(parts: Sequence[str], last: str = "and") -> str:
    """The parts as in a sentence: "a, b and c"."""
    return f" {last} ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "no site"
