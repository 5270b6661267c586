"""Throughput of Monarch Mixer encoders: backend="monarch", plain torch.compile, and a BERT of the same width and depth.

    python -m benchmarks.mixer [--size 80m] [--lengths 512 1024 4096] [--json benchmarks/results/mixer_h100.json]

Random weights and tokens, inference. The BERT, with scaled_dot_product_attention, is compiled by Inductor. Results go
to the JSON file after each row; rows that it holds already, measured with the same versions on the same device, are
skipped.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks.clocks import Clock, cpu_clocks, cuda_clocks
from benchmarks.resumable import machine, opened, write
from examples.mixer.convolution import cast_activations
from examples.mixer.models import SIZES, Bert, MonarchMixerEncoder, Size, num_parameters
from examples.progress import table
from monarch_compile.backend import monarch as backend  # by name it would have to be installed
from monarch_compile.calibration.metrics import relative_error

LENGTHS = [512, 1024, 2048, 4096, 8192]
TOKENS = 65536
"""Tokens of a batch where its size is not given."""


@dataclass(frozen=True)
class Problem:
    """One forward pass of a model of `size` on (batch, length) tokens."""

    size: str
    batch: int
    length: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.size}, {self.batch} x {self.length}, {self.dtype}"

    @property
    def sizes(self) -> Size:
        """Of the model, for sequences of this length."""
        return replace(SIZES[self.size], max_length=self.length)

    def tokens(self, place: str) -> Tensor:
        """The same random tokens at each call."""
        generator = torch.Generator(place).manual_seed(self.length)
        shape = (self.batch, self.length)
        return torch.randint(self.sizes.vocab_size, shape, device=place, generator=generator)


@dataclass(frozen=True)
class Subject:
    """A model under a backend of torch.compile."""

    name: str
    architecture: Callable[[Size], nn.Module]
    backend: Any = "inductor"

    def compiled(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """`model` for the shapes that it meets and no others."""
        return torch.compile(model, backend=self.backend, dynamic=False)


BASELINE = "mixer, inductor"
SUBJECTS = (
    Subject("mixer, monarch", MonarchMixerEncoder, backend),
    Subject(BASELINE, MonarchMixerEncoder),
    Subject("bert, inductor", Bert),
)


@dataclass(frozen=True)
class Row:
    """One subject on one problem; what could not be measured is None, and `failures` says why.

    ms, tokens_per_s: medians, by clock. error: relative, of the first sequence's output, against the same weights in
    float32. lowered, exact: sites of the graph, by what the backend did. peak_mib: of device memory in a plain call.
    """

    problem: Problem
    subject: str
    parameters: int
    ms: dict[str, float]
    tokens_per_s: dict[str, float]
    failures: dict[str, str]
    lowered: int = 0
    exact: int = 0
    error: float | None = None
    peak_mib: float | None = None
    first_call_s: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mixer", description="Throughput of Monarch Mixers.")
    add_arguments(parser)
    measure(parser.parse_args(argv))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `measure` reads."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--size", choices=tuple(SIZES), default="80m")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--batch", type=int, help=f"sequences; default: as many as make {TOKENS} tokens")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--json", type=Path, metavar="PATH", help="keep rows here, and go on from those in it")


def measure(args: argparse.Namespace) -> None:
    """Measure and print a table for each length."""
    clocks = cuda_clocks() if args.device == "cuda" else cpu_clocks()
    for length in args.lengths:
        problem = Problem(args.size, args.batch or max(1, TOKENS // length), length, args.dtype)
        print(f"\n{problem}")
        print(shown(list(rows(problem, args.device, clocks, args.json))), flush=True)


def rows(problem: Problem, place: str, clocks: Mapping[str, Clock], path: Path | None) -> Iterator[dict[str, Any]]:
    """A row for each subject, as JSON has it; those that `path` holds are not measured again."""
    empty: dict[str, Any] = {"environment": machine(place), "clocks": list(clocks), "rows": []}
    content = opened(path, empty, fresh=False) if path else empty
    for subject in SUBJECTS:
        held = [r for r in content["rows"] if r["problem"] == asdict(problem) and r["subject"] == subject.name]
        if held:
            yield held[0]
            continue
        row = asdict(row_of(problem, subject, place, clocks))
        content["rows"].append(row)
        if path:
            write(path, content)
        yield row


@torch.no_grad()
def row_of(problem: Problem, subject: Subject, place: str, clocks: Mapping[str, Clock]) -> Row:
    """Compile and measure; whatever fails is a part of the row."""
    _forget(place)
    torch.manual_seed(0)
    with torch.device(place):
        model = subject.architecture(problem.sizes).eval()
    tokens = problem.tokens(place)
    row = Row(problem, subject.name, num_parameters(model), {}, {}, {})
    try:
        reference = model(tokens[:1])
        cast_activations(model, getattr(torch, problem.dtype))
        call = functools.partial(subject.compiled(model), tokens)
        row = replace(row, **_first(call, reference, place))
    except Exception as error:
        return replace(row, failures={"model": _words(error)})
    for name, clock in clocks.items():
        try:
            row.ms[name] = ms = clock(call).p50
            row.tokens_per_s[name] = tokens.numel() / ms * 1e3
        except Exception as error:
            row.failures[name] = _words(error)
    return row


def _forget(place: str) -> None:
    """Free what the row before compiled, and the memory that it holds."""
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    if place == "cuda":
        torch.cuda.empty_cache()


def _first(call: Callable[[], Tensor], reference: Tensor, place: str) -> dict[str, Any]:
    """Compile, compare the output with `reference`, and see what memory a second call takes."""
    start = time.perf_counter()
    error = relative_error(reference, call()[:1])
    seconds = time.perf_counter() - start
    peak = None
    if place == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**20
    sites = {name: counters["monarch"][name] for name in ("lowered", "exact")}
    return {"first_call_s": seconds, "error": error, "peak_mib": peak, **sites}


def shown(found: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one problem as a table, ratios against the mixer under plain torch.compile; then what failed."""
    clocks = list(dict.fromkeys(name for row in found for name in row["ms"]))
    baseline: Mapping[str, float] = next((row["ms"] for row in found if row["subject"] == BASELINE), {})
    head = ["model, backend", "parameters"]
    for clock in clocks:
        head += [f"{clock}: tokens/s", "ms", "speed-up"]
    body = []
    for row in found:
        cells = [row["subject"], f"{row['parameters'] / 1e6:.1f}M"]
        for clock in clocks:
            cells += _timing(row, clock, baseline.get(clock))
        body.append([*cells, f"{row['lowered']} of {row['lowered'] + row['exact']}", _number(row["error"], ".1e")])
        body[-1].append(_number(row["peak_mib"], ".0f"))
    failures = [f"{row['subject']}, {where}: {why}" for row in found for where, why in row["failures"].items()]
    return "\n".join([table([[*head, "lowered", "error", "peak MiB"], *body]), *failures])


def _timing(row: Mapping[str, Any], clock: str, baseline_ms: float | None) -> list[str]:
    ms = row["ms"].get(clock)
    if ms is None:
        return ["-"] * 3
    speedup = "-" if baseline_ms is None else f"{baseline_ms / ms:.2f}x"
    return [f"{row['tokens_per_s'][clock]:,.0f}", f"{ms:.2f}", speedup]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _words(error: BaseException) -> str:
    """The first line of an error, with its kind."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


if __name__ == "__main__":
    raise SystemExit(main())
