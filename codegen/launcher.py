"""Run time of the emitted kernels: a launcher per IR, built once, called inside the body of an operator."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from monarch_compile.codegen.emitters import IR, Emitter, Schedule, Specialization, emitter
from monarch_compile.codegen.program import Kernel, Program, extent
from monarch_compile.codegen.render import render
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.codegen.tiling import TUNED_ON, Capability
from monarch_compile.errors import CodegenError

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)


class Step(NamedTuple):
    """One kernel as it is launched.

    parameters: the names of its arguments. released: buffers that no kernel reads after it, and that no one is given.
    """

    kernel: Kernel
    function: Any
    parameters: tuple[str, ...]
    released: tuple[str, ...]


class Loaded(NamedTuple):
    """A program as it is launched. given: the caller's tensors whose strides its kernels take, all of them in order.
    outputs: what the caller gets. between: buffers that kernels alone use, contiguous ones."""

    steps: tuple[Step, ...]
    given: tuple[tuple[str, tuple[str, ...]], ...]
    outputs: tuple[str, ...]
    between: frozenset[str]


class Launcher:
    """The loaded kernels of one IR under one schedule, and the order in which they run.

    own: the emitter whose program they are; None: that of the IR's family.
    """

    def __init__(self, ir: IR, schedule: Any, own: Emitter | None = None) -> None:
        self.ir = ir
        self.schedule = schedule
        self._emitter = own or emitter(ir.family)
        self._wrap = _wrapper()
        self._loaded: dict[Specialization, Loaded] = {}

    def load(self, specialization: Specialization) -> Loaded:
        """The program for a specialization; emitted and loaded once."""
        if specialization not in self._loaded:
            program = self._emitter.program_of(self.ir, self.schedule, specialization)
            rendered = [(kernel, render(kernel)) for kernel in program.kernels]
            steps = tuple(
                Step(kernel, source.load(), source.parameters, released)
                for (kernel, source), released in zip(rendered, _released(program), strict=True)
            )
            self._loaded[specialization] = Loaded(steps, _strides(program), program.outputs, _between(program))
        return self._loaded[specialization]

    def __call__(self, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Run every kernel in turn on the buffers that are given; the others are allocated beside the first of these.

        sizes: those that buffers, grids and kernels name; they may be symbolic.
        """
        loaded = self.load(self._emitter.specialize(self.ir, self.schedule, tensors, sizes))
        values = {**sizes, **tensors}
        like = next(iter(tensors.values()))
        for name, strides in loaded.given:
            values.update(zip(strides, tensors[name].stride(), strict=True))
        for kernel, function, parameters, released in loaded.steps:
            for buffer in kernel.writes:  # spelled out: a call of eager code waits for it
                shape = [sizes[size] if size.__class__ is str else size for size in buffer.dims]
                if buffer.name in loaded.between:  # Inductor need not prove strides of symbolic sizes to be equal
                    shape = [math.prod(shape)]
                values[buffer.name] = _allocate(like, shape, buffer.dtype)
                if buffer.strides:
                    values.update(buffer.stride_values(values[buffer.name].stride()))
            programs: Any = 1
            for size in kernel.grid:
                programs *= sizes[size] if size.__class__ is str else extent(size, sizes)
            arguments = [values[name] for name in parameters]
            tiling = kernel.tiling
            self._wrap(function)[programs,](*arguments, num_warps=tiling.num_warps, num_stages=tiling.num_stages)
            del arguments
            for name in released:
                del values[name]
        return tuple(values[name] for name in loaded.outputs)


def _released(program: Program) -> tuple[tuple[str, ...], ...]:
    """Of each kernel, the buffers between kernels that it is the last to use: their memory is free after it."""
    written = {buffer.name for kernel in program.kernels for buffer in kernel.writes}
    kept, released = set(program.outputs), []
    for kernel in reversed(program.kernels):
        used = {buffer.name for buffer in kernel.buffers}
        released.append(tuple(sorted((used & written) - kept)))
        kept |= used
    return tuple(reversed(released))


def _between(program: Program) -> frozenset[str]:
    """Buffers that no one is given, and whose strides no kernel takes."""
    written = {buffer.name for kernel in program.kernels for buffer in kernel.writes if not buffer.strides}
    return frozenset(written - set(program.outputs))


def _strides(program: Program) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((buffer.name, tuple(name for name, _ in buffer.strides)) for buffer in program.given)


@functools.cache
def build(ir: IR, capability: Capability | None, interpreted: bool) -> Launcher:
    """The launcher of a bucketed IR; emits and loads its kernels once.

    `interpreted` says how Triton is running: it only keeps compiled and interpreted launchers separate.
    """
    return Launcher(ir, _CHOSEN.get((ir, capability)) or emitter(ir.family).choose_schedule(ir, capability))


def build_other(ir: IR, own: Emitter, capability: Capability | None, interpreted: bool) -> Launcher:
    """As `build`, of another program of the IR than its family's, under the schedule that `build` takes."""
    return _other(ir, own, build(ir, capability, interpreted).schedule, interpreted)


@functools.cache
def _other(ir: IR, own: Emitter, schedule: Schedule, interpreted: bool) -> Launcher:
    return Launcher(ir, schedule, own)


_CHOSEN: dict[tuple[IR, Capability | None], Schedule] = {}


def use(ir: IR, capability: Capability | None, schedule: Schedule) -> None:
    """From now on, in this process, launch `ir`, and what shares its bucket, with `schedule`."""
    place = emitter(ir.family).bucketed(ir), capability
    if _CHOSEN.get(place) != schedule:
        _CHOSEN[place] = schedule
        build.cache_clear()


def schedule_for(ir: IR, capability: Capability | None = None) -> Schedule:
    """What this process launches `ir` with: a tuned schedule, or the one shipped for a device of this capability (None:
    any).

    Raises:
        CodegenError: no kernel exists for `ir`.
    """
    own = emitter(ir.family)
    bucketed = own.bucketed(ir)
    tuned = (schedule for (known, _), schedule in _CHOSEN.items() if known == bucketed)
    return next(tuned, None) or own.choose_schedule(ir, capability)


def untraced(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with its kernels launched without tracing, as the operator launches them in eager mode."""
    from torch._library.triton import set_wrap_triton_enabled

    def launched() -> Any:
        with set_wrap_triton_enabled(False):
            return call()

    return launched


def _wrapper() -> Callable[[Any], Any]:
    """What makes a kernel visible to tracing, applied at every call; the interpreter has no tracing."""
    return (lambda kernel: kernel) if is_interpreted() else torch.library.wrap_triton


def _allocate(like: Tensor, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Every buffer that a kernel writes comes from here, uninitialised."""
    return like.new_empty(tuple(shape), dtype=dtype)


def capability_of(device: torch.device) -> Capability | None:
    """Compute capability of a CUDA device; None where there is none to ask (the interpreter, fake tensors)."""
    return None if device.type == "cpu" and is_interpreted() else _capability_of(device)


@functools.cache
def _capability_of(device: torch.device) -> Capability | None:
    if device.type != "cuda" or torch.version.hip is not None:
        raise CodegenError(f"kernels run on NVIDIA devices, or on the CPU under TRITON_INTERPRET=1; found {device}")
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        raise CodegenError(f"kernels need compute capability {MIN_CAPABILITY} or later; {device} has {capability}")
    name = torch.cuda.get_device_name(device)
    if name not in TUNED_ON:
        logger.info(
            "schedules ship for %s; those for %s come from a heuristic: `monarch-compile tune` or "
            'options={"autotune": True} looks for better ones',
            ", ".join(TUNED_ON),
            name,
        )
    return capability


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    index = tensor.device.index
    if index is None or tensor.device.type != "cuda" or not torch.cuda.is_available():
        return contextlib.nullcontext()
    return contextlib.nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)
