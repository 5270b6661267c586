"""The kernels that a CUDA device runs for a site: their text and, where it is asked for, what they take of the GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from monarch_compile.errors import CodegenError
from monarch_compile.family import family

if TYPE_CHECKING:
    from monarch_compile.codegen.program import Program
    from monarch_compile.codegen.tuning.resources import Resources

Capability = tuple[int, int]
USUAL = (9, 0)
"""The compute capability that kernels are compiled for on a machine without a GPU."""


@dataclass(frozen=True)
class Kernel:
    """An emitted Triton kernel: its file's name and text. resources: what it takes; None where that is not known."""

    file_name: str
    text: str
    resources: Resources | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        resources = None if self.resources is None else asdict(self.resources)
        return {"file_name": self.file_name, "text": self.text, "resources": resources}


@dataclass(frozen=True)
class Kernels:
    """Of one site. forward, backward: in the order of their launches; note: why there are none, or when they run.

    backward_note: why a site that trains has no kernels of gradients of its own.
    """

    forward: tuple[Kernel, ...] = ()
    backward: tuple[Kernel, ...] = ()
    note: str = ""
    backward_note: str = ""


def kernels_of_site(
    ir: Any, trains: bool, hints: Mapping[str, int] | None = None, capability: Capability | None = None
) -> Kernels:
    """The kernels of a lowered site, those of its gradients where it trains.

    capability: what they are compiled for to tell what they take; None: nothing is compiled.
    """
    from monarch_compile.codegen.emitters import launched

    forward, note = kernels_of(ir, capability)
    backward: tuple[Kernel, ...] = ()
    backward_note = ""
    if trains and forward:
        _, *gradients = launched(ir, trains)
        if gradients:
            backward, backward_note = _emitted(gradients[0], capability)
        else:
            backward_note = "Gradients have no kernels of their own: Inductor compiles the backward pass."
    found = Kernels(forward, backward, note, backward_note)
    return found if capability is None else _with_resources(found, launched(ir, trains), hints or {}, capability)


def kernels_of(ir: Any, capability: Capability | None = None) -> tuple[tuple[Kernel, ...], str]:
    """What a CUDA device runs for the forward pass of a site, or none and the reason."""
    missing = family(ir.family).no_kernels(ir)
    return ((), missing) if missing else _emitted(ir, capability)


@lru_cache(maxsize=256)
def _emitted(ir: Any, capability: Capability | None) -> tuple[tuple[Kernel, ...], str]:
    """The kernels of an IR, or none and the reason."""
    from monarch_compile.codegen.render import sources

    try:
        program = _program_of(ir, capability)
    except CodegenError as error:
        return (), str(error)
    return tuple(Kernel(source.file_name, source.text) for source in sources(program)), ""


def capability_here() -> Capability:
    """That of the GPU at hand; else `USUAL`."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else USUAL


def lines_of(sites: Sequence[Kernels]) -> list[str]:
    """What the kernels of lowered sites take: a paragraph for all that are told alike."""
    lines = []
    for told, count in Counter(tuple(_told(site)) for site in sites).items():
        if told:
            lines += [f"kernels of {count} {'site' if count == 1 else 'sites'}:", *told]
    return lines


def _told(site: Kernels) -> Iterator[str]:
    for word, kernels in (("forward", site.forward), ("backward", site.backward)):
        for kernel in kernels:
            if kernel.resources is not None:
                yield f"    {word} {kernel.resources} ({kernel.resources.capability})"


def _program_of(ir: Any, capability: Capability | None) -> Program:
    from monarch_compile.codegen.emitters import emitter
    from monarch_compile.codegen.launcher import schedule_for

    schedule, own = schedule_for(ir, capability), emitter(ir.family)
    return own.program_of(ir, schedule, own.expected(ir, schedule))


def _with_resources(found: Kernels, irs: Sequence[Any], hints: Mapping[str, int], capability: Capability) -> Kernels:
    parts, note = [], found.note
    for ir, kernels in zip((*irs, None), (found.forward, found.backward), strict=False):
        try:
            parts.append(_measured(ir, kernels, hints, capability) if kernels else ())
        except CodegenError as error:
            parts.append(kernels)
            note = f"{note} What kernels take is not known: {str(error).partition(chr(10))[0]}.".strip()
    return Kernels(parts[0], parts[1], note, found.backward_note)


def _measured(
    ir: Any, kernels: tuple[Kernel, ...], hints: Mapping[str, int], capability: Capability
) -> tuple[Kernel, ...]:
    from monarch_compile.codegen.render import render
    from monarch_compile.codegen.tuning.resources import resources_of

    program = _program_of(ir, capability)
    texts = [render(kernel).text for kernel in dict.fromkeys(program.kernels)]
    resources = dict(zip(texts, resources_of(program, ir, hints, capability), strict=True))
    return tuple(Kernel(kernel.file_name, kernel.text, resources[kernel.text]) for kernel in kernels)
