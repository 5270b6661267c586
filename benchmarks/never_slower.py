"""Is policy "auto" ever slower than plain torch.compile?

    python -m benchmarks.never_slower result.json [--preset h100] [--only vit-b] [--jobs 14]

Whole models and attention alone, inference and training steps, plain calls and mode "reduce-overhead": the model under
backend="monarch" and under stock Inductor, in turns, each with its own graph. The ratio of a case is the median over
rounds; at most `BOUND` is asked for. With --jobs, other processes fill the compile caches first. What a file holds of
other cases, measured with the same versions on the same device, is kept.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.models.architectures import Architecture
from benchmarks.resumable import machine, opened, write
from benchmarks.speed.problems import Problem, inputs
from monarch_compile.backend import monarch as backend  # by name it would have to be installed
from monarch_compile.tools.timing import Timing, timing_of

BOUND = 1.03
ROUNDS = 30
MORE = 4
"""Times as many rounds for a case that seems slower: where the host is the limit, 30 rounds are off by 5%."""
ROUND_S = 0.02
"""Seconds of the calls of one form in a round, about."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """A model on (batch, tokens), or attention alone: 12 heads of 64."""

    name: str
    batch: int
    tokens: int
    architecture: Architecture | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.name} {self.batch}x{self.tokens}"

    def prepared(self, place: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The function, its inputs, and the tensors that training wants the gradients of."""
        dtype = getattr(torch, self.dtype)
        if self.architecture is None:
            given = inputs(Problem(self.batch, self.tokens, dtype=self.dtype), place)
            leaves = tuple(x.detach().requires_grad_() for x in (given.q, given.k, given.v))
            return scaled_dot_product_attention, leaves, leaves
        model = self.architecture.model(place, dtype)
        return model, self.architecture.inputs(self.batch, self.tokens, place, dtype), tuple(model.parameters())


@dataclass(frozen=True)
class Case:
    """One subject, called in one way."""

    subject: Subject
    mode: str | None
    trains: bool

    def __str__(self) -> str:
        return f"{self.subject}, {'step' if self.trains else 'inference'}, {self.mode or 'plain calls'}"


@dataclass(frozen=True)
class Row:
    """A case, timed. ratio: of policy "auto" to exact attention. codes: why sites stayed exact, and how many did."""

    case: Case
    exact: Timing
    auto: Timing
    ratio: float
    lowered: int
    codes: dict[str, int]

    @property
    def holds(self) -> bool:
        """Whether "auto" is not slower, within the bound."""
        return self.ratio <= BOUND


VIT_B = Architecture("vit-b", depth=12, width=768, num_heads=12, modulated=False)
VIT_S = Architecture("vit-s", depth=12, width=384, num_heads=6, modulated=False)
BERT = Architecture("bert-base", depth=12, width=768, num_heads=12, modulated=False)
TINY = Architecture("tiny", depth=1, width=32, num_heads=2, modulated=False)

PRESETS: dict[str, tuple[str, tuple[Subject, ...], tuple[str | None, ...]]] = {
    "h100": (
        "cuda",
        (
            Subject("vit-b, 512 px,", 1, 1025, VIT_B),
            Subject("vit-b, 512 px,", 16, 1025, VIT_B),
            Subject("vit-s with registers, 896 px,", 4, 4101, VIT_S),
            Subject("bert-base", 1, 512, BERT),
            Subject("bert-base", 16, 512, BERT),
            Subject("attention", 4, 1024),
            Subject("attention", 4, 4096),
            Subject("attention", 1, 16384),
        ),
        (None, "reduce-overhead"),
    ),
    "tiny": ("cpu", (Subject("tiny", 1, 48, TINY, "float32"),), (None,)),
}
"""The device, the subjects, and the modes of torch.compile."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 1 where a case is slower than the bound allows."""
    args = _arguments(argv)
    place, subjects, modes = PRESETS[args.preset]
    if place == "cuda" and not torch.cuda.is_available():
        sys.exit(f"preset {args.preset!r} needs a CUDA device")
    cases = [Case(*x) for x in itertools.product(subjects, modes, (False, True)) if args.only in str(x[0])]
    if args.warm:
        for case in cases[args.warm[0] :: args.warm[1]]:
            for call in calls(case, place)[0].values():
                call()
        return 0
    started = time.monotonic()
    _fill_caches(args)
    print(f"[{time.monotonic() - started:.0f} s] caches filled", flush=True)
    empty = {"environment": machine(place), "clocks": ["calls in turns"], "bound": BOUND, "rows": []}
    content = opened(args.output, empty, fresh=False)
    for case in cases:
        row = timed(case, place, args.rounds)
        if not row.holds:
            print(f"[{time.monotonic() - started:.0f} s] {line(row)}, again with more rounds", flush=True)
            row = timed(case, place, MORE * args.rounds)
        print(f"[{time.monotonic() - started:.0f} s] {line(row)}", flush=True)
        found = asdict(row) | {"holds": row.holds}
        content["rows"] = [held for held in content["rows"] if held["case"] != found["case"]] + [found]
        write(args.output, content)
    rows = content["rows"]
    slower = sum(not row["holds"] for row in rows)
    print(f"{len(rows) - slower} of {len(rows)} cases are not slower than exact attention, within {BOUND}")
    return int(slower > 0)


def line(row: Row) -> str:
    """A row of the table."""
    sites = row.lowered + sum(row.codes.values())
    why = ", ".join(row.codes)
    verdict = "" if row.holds else "  SLOWER"
    times = f"{row.exact.p50:9.3f} ms exact, {row.auto.p50:9.3f} auto, {row.ratio:5.3f}"
    return f"{row.case!s:<62}{times}, {row.lowered} of {sites} lowered {why}{verdict}"


def timed(case: Case, place: str, rounds: int = ROUNDS) -> Row:
    """Time both forms of a case in turns."""
    forms, found = calls(case, place)
    for call in forms.values():
        for _ in range(3):  # compiles, and records CUDA graphs
            call()
    codes = {name.removeprefix("exact: "): n for name, n in found.items() if name.startswith("exact: ")}
    number = max(1, round(ROUND_S / _seconds(forms["exact"], 2, place)))
    times: dict[str, list[float]] = {name: [] for name in forms}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in list(forms)[:: 1 if turn % 2 else -1]:
                times[name].append(1e3 * _seconds(forms[name], number, place))
    finally:
        gc.enable()
    ratio = statistics.median(a / b for a, b in zip(times["auto"], times["exact"], strict=True))
    return Row(case, timing_of(times["exact"]), timing_of(times["auto"]), ratio, found["lowered"], codes)


def calls(case: Case, place: str) -> tuple[dict[str, Call], Any]:
    """The two forms of a case, and the counters that compiling the second one fills."""
    torch._dynamo.reset()
    counters.clear()
    function, given, leaves = case.subject.prepared(place)
    options = {"policy": "auto"} | ({} if case.mode is None else {"mode": case.mode})
    compiled = {
        "exact": torch.compile(_fresh(function), mode=case.mode, dynamic=False),
        "auto": torch.compile(_fresh(function), backend=backend, options=options, dynamic=False),
    }
    call = functools.partial(_step, leaves) if case.trains else _infer
    return {name: functools.partial(call, form, given) for name, form in compiled.items()}, counters["monarch"]


def _fresh(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function behind a code object of its own: Dynamo's caches, and the time to look into them, hang on code."""

    def run(*args: Tensor) -> Tensor:
        return function(*args)

    return types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)


def _infer(form: Callable[..., Tensor], given: Sequence[Tensor]) -> Any:
    with torch.no_grad():
        torch.compiler.cudagraph_mark_step_begin()
        return form(*given)


def _step(leaves: Sequence[Tensor], form: Callable[..., Tensor], given: Sequence[Tensor]) -> Any:
    torch.compiler.cudagraph_mark_step_begin()
    output = form(*given)
    return torch.autograd.grad(output, leaves, torch.ones_like(output))


def _seconds(call: Call, number: int, place: str) -> float:
    """Seconds of a call among `number`, the device's work included."""
    wait = torch.cuda.synchronize if place == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    for _ in range(number):
        call()
    wait()
    return (time.perf_counter() - start) / number


def _fill_caches(args: argparse.Namespace) -> None:
    """Compile the cases in other processes; what fails there fails here again, and is told here."""
    command = [sys.executable, "-m", "benchmarks.never_slower", str(args.output), "--preset", args.preset]
    command += ["--only", args.only, "--warm"]
    running = [
        subprocess.Popen([*command, str(n), str(args.jobs)], stderr=subprocess.DEVNULL) for n in range(args.jobs)
    ]
    for process in running:
        process.wait()


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--preset", choices=PRESETS, default="h100")
    parser.add_argument("--only", default="", metavar="TEXT", help="only subjects in whose name TEXT occurs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="processes that fill the compile caches first")
    parser.add_argument("--warm", type=int, nargs=2, metavar=("I", "N"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
