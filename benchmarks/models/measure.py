"""Rows: a model with one form of attention on one problem, timed, beside how wrong it is and what it takes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config

from benchmarks.clocks import Clock, reason, synchronize, tidy
from benchmarks.models.found import grouped
from benchmarks.models.problems import Preset, Problem
from benchmarks.resumable import FORWARD, STEP
from benchmarks.speed.problems import Inputs, inputs
from benchmarks.speed.subjects import EXACT, Call, monarch, step_of
from monarch_compile.backend import monarch as backend  # by name it would have to be installed
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.cost.devices import Device
from monarch_compile.report.explainer import explain
from monarch_compile.tools.timing import Timing

EXACT_WORD = "exact"


@dataclass(frozen=True)
class Bench:
    """What every row has in common.

    clocks: of whole models, "graph" (CUDA-graph replays) and "eager" (plain calls), in that order.
    alone: the clock of attention alone.
    slack: an exact kernel runs in a whole model where it takes, alone, at most this many times what the fastest does.
    backward: a call is a step of training, the gradients of all parameters included; of attention alone those of q, k
    and v.
    """

    place: str
    device: Device
    clocks: Mapping[str, Clock]
    alone: Clock
    slack: float = 1.0
    backward: bool = False

    @property
    def timed_pass(self) -> str:
        """What a call is."""
        return STEP if self.backward else FORWARD


@dataclass(frozen=True)
class Subject:
    """A form of attention: `alone` prepares a call of it, `options` are the backend's (None: stock Inductor)."""

    name: str
    alone: Callable[[Inputs], Call]
    options: Mapping[str, Any] | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def exact(self) -> bool:
        """Whether it is the baseline."""
        return self.options is None


@dataclass(frozen=True)
class Row:
    """One form on one problem; what could not be measured is None, and `failures` says why.

    attention_ms: median of the attention of one block, alone. times: of the whole model, by clock. error: relative, of
    the output against the same weights in float32 with exact attention. peak_mib: of device memory in one plain call,
    weights and inputs included. lowered, sites: attention sites that the backend lowered, of how many. found: what it
    found of them, by groups of equal sites (`benchmarks.models.found`). first_call_s: with compilation.
    """

    problem: Problem
    form: str
    attention_ms: float | None
    times: dict[str, Timing]
    failures: dict[str, str]
    lowered: int = 0
    sites: int = 0
    error: float | None = None
    peak_mib: float | None = None
    first_call_s: float | None = None
    found: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def subjects(bench: Bench, problem: Problem, preset: Preset) -> list[Subject]:
    """Exact attention by every kernel that SDPA has here, then the Monarch forms."""
    found = [Subject(f"{EXACT_WORD} {s.name}", s.prepare, None, s.around) for s in _kernels(bench)]
    for form in preset.forms:
        alone = functools.partial(monarch, form.ir(problem, bench.device))
        found.append(Subject(str(form), alone, form.options(preset.policy)))
    return found


def _kernels(bench: Bench) -> list[Any]:
    return [s for s in EXACT[bench.place] if s.name != "flex"]  # which SDPA never picks


def rows(bench: Bench, problem: Problem, preset: Preset, wanted: Collection[str]) -> Iterator[Row]:
    """A row for each form of `wanted`; of the exact kernels only those run in the model that are fast alone."""
    every = subjects(bench, problem, preset)
    asked = [s for s in every if s.name in wanted or (s.exact and any(x.name in wanted for x in every if x.exact))]
    alone = {s.name: _alone(bench, problem, s) for s in asked}
    fastest = min((ms for s in asked if s.exact and (ms := alone[s.name][0]) is not None), default=0.0)
    model = Prepared.of(problem, bench.place)
    for subject in asked:
        ms, failures = alone[subject.name]
        if subject.name not in wanted:
            continue
        if subject.exact and (ms is None or ms > bench.slack * fastest):
            why = failures or {"model": "not the fastest exact attention alone: not compiled"}
            yield Row(problem, subject.name, ms, {}, why)
        else:
            yield _whole(bench, problem, subject, model, Row(problem, subject.name, ms, {}, failures))


@dataclass(frozen=True)
class Prepared:
    """A model with its inputs, and the output of the same weights in float32 with exact attention, on the CPU."""

    model: torch.nn.Module
    inputs: tuple[Tensor, ...]
    reference: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, problem: Problem, place: str) -> Prepared:
        """The model of `problem`."""
        architecture, dtype = problem.architecture, problem.torch_dtype
        model = architecture.model(place, dtype)
        given = architecture.inputs(problem.batch, problem.tokens, place, dtype)
        reference: Tensor = deepcopy(model).float()(*(x.float() for x in given))
        return cls(model, given, reference.cpu())


def _alone(bench: Bench, problem: Problem, subject: Subject) -> tuple[float | None, dict[str, str]]:
    """Milliseconds of the attention of one block, or why not."""
    try:
        with subject.around(), torch.set_grad_enabled(bench.backward):
            given = inputs(problem.attention, bench.place)
            given = given.trained() if bench.backward else given
            call = subject.alone(given)
            return bench.alone(step_of(call, given) if bench.backward else call).p50, {}
    except Exception as error:
        return None, {"alone": reason(error)}
    finally:
        tidy(bench.place)


def _whole(bench: Bench, problem: Problem, subject: Subject, model: Prepared, row: Row) -> Row:
    """`row` with what the model as a whole gives; a form may fail in any way without taking the others with it."""
    found: dict[str, Any] = asdict(row) | {"problem": problem}
    # The cache of AOTAutograd does not know which kernel SDPA may pick.
    cached = functorch_config.patch(enable_autograd_cache=not subject.exact)
    with subject.around(), cached, torch.set_grad_enabled(bench.backward):
        try:
            if not subject.exact:
                found["found"] = _sites(model, subject)
            call = _compiled(model, subject)
            call = _step_of(call, model) if bench.backward else call
            found |= _first(bench, model, call)
        except Exception as error:
            found["failures"]["model"] = reason(error)
            return Row(**found)
        for name, clock in bench.clocks.items():
            try:
                found["times"][name] = clock(call)
            except Exception as error:
                found["failures"][name] = reason(error)
            finally:
                tidy(bench.place)
    return Row(**found)


def _step_of(call: Call, model: Prepared) -> Call:
    """A call and its backward pass, as of a loss whose gradient is one everywhere. Gives the output."""
    parameters = tuple(model.model.parameters())

    def step() -> Tensor:
        output = call()
        torch.autograd.grad(output, parameters, torch.ones_like(output), allow_unused=True)
        return output.detach()

    return step


def _sites(model: Prepared, subject: Subject) -> tuple[dict[str, Any], ...]:
    torch._dynamo.reset()
    return grouped(explain(model.model, *model.inputs, options=subject.options).sites)


def _compiled(model: Prepared, subject: Subject) -> Call:
    torch._dynamo.reset()
    counters.clear()
    if subject.exact:
        compiled = torch.compile(model.model, dynamic=False)
    else:
        compiled = torch.compile(model.model, backend=backend, options=dict(subject.options or {}), dynamic=False)
    return functools.partial(compiled, *model.inputs)


def _first(bench: Bench, model: Prepared, call: Call) -> dict[str, Any]:
    """Compile, look at the output, and see what memory a second call takes."""
    start = time.perf_counter()
    output = call()
    synchronize(bench.place)
    seconds = time.perf_counter() - start
    error = relative_error(model.reference, output.cpu())
    del output
    peak = None
    if bench.place == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        synchronize(bench.place)
        peak = torch.cuda.max_memory_allocated() / 2**20
    lowered, exact = (counters["monarch"][name] for name in ("lowered", "exact"))
    return {"first_call_s": seconds, "error": error, "peak_mib": peak, "lowered": lowered, "sites": lowered + exact}
