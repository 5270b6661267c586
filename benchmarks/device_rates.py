"""What the cost model's descriptions of devices are fitted to.

    python -m benchmarks.device_rates result.json [--parts ceilings attention host training doors]
    python -m benchmarks.device_rates result.json --parts cpu

Device time of attention, exact and Monarch, and of training steps by CUDA-graph replays; time that calls take of the
host, compiled and eager; the device's ceilings. Of a CPU: training steps, and attention through the door of
`integrations`, on one thread. The rows of `monarch_compile/cost/devices.py` are fitted to these by hand, and
tests/attention/unit/test_calls.py holds them to it. With --warm I N, every N-th case is compiled and none is timed:
several processes fill the compile caches for the one that times.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.models.architectures import Architecture
from benchmarks.resumable import machine, write
from benchmarks.speed.problems import PRESETS, AutoForm, Problem, inputs
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.backend import monarch as backend
from monarch_compile.cost.devices import device_for
from monarch_compile.integrations import replace_sdpa
from monarch_compile.tools.timing import cuda_graph_times, time_interleaved

Call = Callable[[], Any]
EXACT = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FORMS: dict[str, dict[str, Any] | None] = {"exact": None, "window": {"window": 1}, "paper": {"window": None}}
MORE_FORMS = FORMS | {
    "two iterations": {"window": None, "num_iters": 2},
    "prefix": {"window": 1, "prefix": 1},
    "mean": {"window": None, "init": "mean"},
}
VIT = Architecture("vit-b", depth=12, width=768, num_heads=12, modulated=False)
DEPTHS = (1, 12)
SHORT = 512
"""Tokens of what is timed on the host: few, so that the device never makes it wait."""

_BF16 = [(1, 512), (4, 512), (16, 512), (4, 1024), (16, 1024), (4, 4096), (1, 2048), (1, 8192)]
PROBLEMS = (
    *PRESETS["h200"].problems,
    *(Problem(*shape, dtype="bfloat16") for shape in _BF16),
    *(Problem(4, 4096, 16, dim, "bfloat16") for dim in (32, 80, 128, 256)),
    Problem(4, 4097, 16, 64, "bfloat16"),
    *(Problem(*shape, dtype="float32") for shape in ((1, 1024), (4, 1024), (1, 4096), (4, 4096))),
)
STEPS = (
    *(Problem(*shape, dtype="bfloat16") for shape in itertools.product((1, 4, 16), (1024, 4096))),
    *(Problem(*shape, dtype="bfloat16") for shape in ((1, 8192), (1, 16384), (4, 16384), (1, 32768))),
    *(Problem(*shape, 16, 128, "bfloat16") for shape in ((1, 4096), (1, 16384))),
    *(Problem(*shape, dtype="float32") for shape in ((4, 1024), (4, 4096))),
)
CPU_SHAPES = ((1, 128), (1, 256), (1, 512), (4, 512), (1, 1024), (1, 2048), (1, 4096))
CPU_SECONDS = 4.0
DOORS = tuple(Problem(*shape, dtype="bfloat16") for shape in ((4, 1024), (4, 4096), (1, 16384)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "cpu"])
    parser.add_argument("--warm", type=int, nargs=2, metavar=("I", "N"), help="compile every N-th case from I on")
    arguments = parser.parse_args()
    if arguments.parts != ["cpu"] and not torch.cuda.is_available():
        sys.exit("all parts but 'cpu' need a CUDA device")
    torch._dynamo.config.cache_size_limit = 256
    if arguments.warm:
        warm(arguments.parts, *arguments.warm)
        return 0
    if arguments.parts == ["cpu"]:
        torch.set_num_threads(1)
    content: dict[str, Any] = {"environment": machine("cpu" if arguments.parts == ["cpu"] else "cuda")}
    started = time.monotonic()
    for part in arguments.parts:
        content[part] = []
        for row in PARTS[part]():
            content[part].append(row)
            write(arguments.output, content)
            print(f"[{time.monotonic() - started:.0f} s] {part}: {row}", flush=True)
    return 0


def warm(parts: list[str], first: int, every: int) -> None:
    """Compile a share of the cases."""
    cases = [case for part in parts for case in CASES.get(part, list)()]
    for case in cases[first::every]:
        try:
            case()
        except Exception as error:
            print(f"not compiled: {type(error).__name__}: {str(error)[:200]}", flush=True)
        torch.cuda.empty_cache()


# ---- ceilings --------------------------------------------------------------------------------------------------------


def ceilings() -> Iterator[dict[str, Any]]:
    """The device at its best."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    yield {"what": "copy", "bytes_per_s": 2 * x.nbytes / (1e-3 * median(events(functools.partial(y.copy_, x))))}
    del x, y
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        seconds = 1e-3 * median(events(functools.partial(torch.mm, a, b), 10))
        yield {"what": f"matmul {dtype}", "flops": 2 * 8192**3 / seconds}
    small = torch.zeros(1, device="cuda")
    yield {"what": "launch", "host_us": host_us(lambda: small.add_(1), 200)}
    side = torch.zeros(1024, device="cuda")
    yield {"what": "smallest kernel", "us": 1e3 * median(cuda_graph_times(lambda: side.add_(1), 10))}


# ---- attention alone, on the device ----------------------------------------------------------------------------------


def attention() -> Iterator[dict[str, Any]]:
    """Milliseconds of CUDA-graph replays: every exact kernel, and the Monarch forms as they are run eagerly."""
    for problem in PROBLEMS:
        given = inputs(problem, "cuda")
        for name, kernel in EXACT.items():
            call = functools.partial(scaled_dot_product_attention, given.q, given.k, given.v)
            with sdpa_kernel(kernel):
                yield {"problem": asdict(problem), "subject": name} | graph_ms(call)
        for form in _forms(problem):
            block, call = _monarch_call(problem, form)
            yield {
                "problem": asdict(problem), "subject": "monarch", "form": asdict(form), "block_size": block,
            } | graph_ms(call)  # fmt: skip
        torch.cuda.empty_cache()


def _forms(problem: Problem) -> tuple[AutoForm, ...]:
    return (AutoForm(1, None), AutoForm(1, 1), *([AutoForm(2, None)] if problem.seq_len >= 4096 else []))


def _monarch_call(problem: Problem, form: AutoForm) -> tuple[int, Call]:
    block = form.ir(problem, device_for("cuda")).form.block_size
    given = inputs(problem, "cuda")
    options = {"block_size": block, "num_iters": form.num_iters, "window": form.window, "prefix": form.prefix}
    return block, functools.partial(monarch_attention, given.q, given.k, given.v, **options)


def _attention_cases() -> list[Call]:
    return [lambda p=p, f=f: _monarch_call(p, f)[1]() for p in PROBLEMS for f in _forms(p)]


# ---- what calls take of the host -------------------------------------------------------------------------------------


def host() -> Iterator[dict[str, Any]]:
    """Microseconds of the host: for compiled attention once and in a chain, for a small model, and for eager calls."""
    with torch.no_grad():
        for name, depth in itertools.product(MORE_FORMS, DEPTHS):
            call = _chain(name, depth)
            yield {"what": "chain", "form": name, "sites": depth} | _host(call)
        for name, (batch, tokens) in itertools.product(FORMS, ((1, 256), (1, 1025), (16, 1025), (1, 4097))):
            call = _model(name, batch, tokens)
            row = {"what": "model", "form": name, "depth": VIT.depth, "batch": batch, "tokens": tokens}
            yield row | _host(call, 4) | graph_ms(call)
        given = inputs(Problem(1, SHORT, dtype="bfloat16"), "cuda")
        exact = functools.partial(scaled_dot_product_attention, given.q, given.k, given.v)
        yield {"what": "eager", "form": "exact"} | _host(exact)
        for name, options in MORE_FORMS.items():
            if options is not None:
                with replace_sdpa(policy="always", **options):
                    yield {"what": "eager", "form": name} | _host(exact)
        with replace_sdpa(policy="never"):
            yield {"what": "eager", "form": "exact, inside the door"} | _host(exact)


def _chain(form: str, depth: int) -> Call:
    def function(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(depth):
            x = scaled_dot_product_attention(x, k, v)
        return x

    given = inputs(Problem(1, SHORT, dtype="bfloat16"), "cuda")
    return functools.partial(compiled(function, form), given.q, given.k, given.v)


def _model(form: str, batch: int, tokens: int) -> Call:
    model = VIT.model("cuda", torch.bfloat16)
    return functools.partial(compiled(model, form), *VIT.inputs(batch, tokens, "cuda", torch.bfloat16))


def _host_cases() -> list[Call]:
    chains = [lambda n=n, d=d: _chain(n, d)() for n in MORE_FORMS for d in DEPTHS]
    shapes = ((1, 256), (1, 1025), (16, 1025), (1, 4097))
    return [torch.no_grad()(c) for c in [*chains, *(lambda n=n, s=s: _model(n, *s)() for n in FORMS for s in shapes)]]


def _host(call: Call, calls: int = 20) -> dict[str, float]:
    return {"host_us": host_us(call, calls), "wall_us": 1e3 * median(walls(call, 20))}


# ---- training steps --------------------------------------------------------------------------------------------------


def training() -> Iterator[dict[str, Any]]:
    """Milliseconds of a step of one compiled attention: on the device, in plain calls; and its peak memory."""
    for problem, name in itertools.product(STEPS, FORMS):
        call = _step(problem, name)
        row = {"problem": asdict(problem), "form": name}
        try:
            call()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            row |= {"peak_mib": (torch.cuda.max_memory_allocated() - held) / 2**20}
            row |= {"wall_ms": median(walls(call, 10)), "host_us": host_us(call, 5, 6)} | graph_ms(call)
        except Exception as error:
            row["failure"] = f"{type(error).__name__}: {str(error)[:200]}"
        yield row
        torch.cuda.empty_cache()


def _step(problem: Problem, form: str, attend: Callable[..., Tensor] | None = None, place: str = "cuda") -> Call:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)

    given = inputs(problem, place)
    leaves = [x.detach().requires_grad_() for x in (given.q, given.k, given.v)]
    grad = torch.randn_like(given.q)
    attend = attend or compiled(function, form)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, grad)

    return step


def _training_cases() -> list[Call]:
    return [lambda p=p, n=n: _step(p, n)() for p in STEPS for n in FORMS]


def doors() -> Iterator[dict[str, Any]]:
    """The same, eagerly: through the door of `integrations`."""
    for problem, (name, options) in itertools.product(DOORS, FORMS.items()):
        call = _step(problem, name, scaled_dot_product_attention)
        around: AbstractContextManager[Any] = contextlib.nullcontext()
        if options is not None:
            around = replace_sdpa(policy="always", **options)
        with around:
            yield {"problem": asdict(problem), "form": name, "wall_ms": median(walls(call, 10))} | _host(call, 4)


# ---- a CPU -----------------------------------------------------------------------------------------------------------


def cpu() -> Iterator[dict[str, Any]]:
    """Milliseconds of training steps, compiled, and of eager attention through the door, forward and as a step."""
    for batch, seq_len in CPU_SHAPES:
        problem = Problem(batch, seq_len, dtype="float32")
        given = inputs(problem, "cpu")
        forward = functools.partial(scaled_dot_product_attention, given.q, given.k, given.v)
        eager = _step(problem, "exact", scaled_dot_product_attention, "cpu")
        calls = {
            "training": {name: _step(problem, name, None, "cpu") for name in FORMS},
            "door": {name: _inside(options, torch.no_grad()(forward)) for name, options in FORMS.items()},
            "door, training": {name: _inside(options, eager) for name, options in FORMS.items()},
        }
        for what, forms in calls.items():
            found = time_interleaved(forms, CPU_SECONDS, min_runs=5)
            for name, timing in found.items():
                yield {"what": what, "problem": asdict(problem), "form": name, "ms": timing.p50, "p20": timing.p20}


def _inside(options: dict[str, Any] | None, call: Call) -> Call:
    """A call inside the door, every attention lowered in the form."""
    if options is None:
        return call
    door = replace_sdpa(policy="always", **options)

    def inside() -> Any:
        with door:
            return call()

    return inside


# ---- clocks ----------------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], form: str) -> Callable[..., Any]:
    """A function under the backend with every site lowered in the form, or under stock Inductor."""
    torch._dynamo.reset()
    options = MORE_FORMS[form]
    if options is None:
        return torch.compile(function, dynamic=False)
    return torch.compile(
        function, backend=backend, options={"policy": "always", "strict": True, **options}, dynamic=False
    )


def host_us(call: Call, calls: int = 20, rounds: int = 15) -> float:
    """Microseconds until a call returns, while the device has nothing else to do."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return median(found)


def walls(call: Call, rounds: int, calls: int = 5) -> list[float]:
    """Milliseconds of a call among others, the device's work included."""
    for _ in range(3):
        call()
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / calls * 1e3)
    return found


def events(call: Call, rounds: int = 20) -> list[float]:
    """Milliseconds of a call on the device."""
    for _ in range(3):
        call()
    found = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return found


def graph_ms(call: Call) -> dict[str, Any]:
    """Median milliseconds of replays, or why there are none."""
    try:
        return {"graph_ms": median(cuda_graph_times(call, 20))}
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {str(error)[:200]}"}


PARTS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "ceilings": ceilings,
    "attention": attention,
    "host": host,
    "training": training,
    "doors": doors,
    "cpu": cpu,
}
CASES: dict[str, Callable[[], list[Call]]] = {
    "attention": _attention_cases,
    "host": _host_cases,
    "training": _training_cases,
}

if __name__ == "__main__":
    raise SystemExit(main())
