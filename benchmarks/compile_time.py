"""How long compiling takes: BERT-base at N = 2048, stock Inductor against backend="monarch", each in a fresh process.

python -m benchmarks.compile_time [--layers 12] [--seq-len 2048] [--repeats 3] [--json PATH]

Cold: an empty cache folder; warm: a new process with the folder that a cold one filled. A compilation is the first call
less the second, in one process with one thread, C++ compiler included. Imports of torch, Inductor and transformers are
not counted, those of monarch_compile are, from bytecode, which an installation makes. Of the repeats, made in turns,
the least counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import monarch_compile

BACKENDS = ("inductor", "monarch")
STATES = ("cold", "warm")
GOALS = {"cold": 1.25, "warm": 1.10}
"""The largest ratio of monarch's time to Inductor's that is wanted."""


@dataclass(frozen=True)
class Compilation:
    """Seconds of one compilation: by the clock, of processors (this process and its children), in our passes.

    hits: graphs that Inductor found in its cache. lowered: attention sites that run in Monarch form.
    """

    wall_s: float
    cpu_s: float
    passes_s: float
    hits: int
    lowered: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print every compilation and the ratios; write JSON."""
    parser = argparse.ArgumentParser(prog="monarch-compile bench compile", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)  # what a fresh process runs
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(asdict(compile_once(args.one, args.layers, args.seq_len))))
        return 0
    _make_bytecode()
    found: dict[str, list[Compilation]] = {f"{backend} {state}": [] for state in STATES for backend in BACKENDS}
    for _ in range(args.repeats):
        for backend in BACKENDS:
            for state, compilation in zip(STATES, cold_and_warm(backend, args.layers, args.seq_len), strict=True):
                found[f"{backend} {state}"].append(compilation)
                print(f"{backend:>8} {state}: {_line(compilation)}", flush=True)
    result = summary(found)
    for state in STATES:
        print(_verdict(state, result))
    if args.json:
        from monarch_compile.tools.timing import environment, one_thread

        with one_thread():
            model = {"name": "BERT-base, random weights", "layers": args.layers, "seq_len": args.seq_len}
            content = {"machine": environment(), "model": model, "repeats": args.repeats, **result}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


def summary(found: dict[str, list[Compilation]]) -> dict[str, Any]:
    """The least of each row, the ratios of processor and clock time, and every run."""
    least = {
        name: {key: min(getattr(run, key) for run in runs) for key in ("wall_s", "cpu_s", "passes_s")}
        for name, runs in found.items()
    }
    return {
        "least": least,
        "ratios": {s: least[f"monarch {s}"]["cpu_s"] / least[f"inductor {s}"]["cpu_s"] for s in STATES},
        "wall_ratios": {s: least[f"monarch {s}"]["wall_s"] / least[f"inductor {s}"]["wall_s"] for s in STATES},
        "passes_over_inductor": {
            s: least[f"monarch {s}"]["passes_s"] / least[f"inductor {s}"]["cpu_s"] for s in STATES
        },
        "goals": GOALS,
        "runs": {name: [asdict(run) for run in runs] for name, runs in found.items()},
    }


def _make_bytecode() -> None:
    """What pip does when it installs: a checkout may have none, where PYTHONDONTWRITEBYTECODE is set."""
    package = Path(monarch_compile.__path__[0])
    for folder in (package, package / "passes", package / "codegen"):
        command = [sys.executable, "-m", "compileall", "-q", str(folder.resolve())]
        subprocess.run(command, check=True)


def cold_and_warm(backend: str, layers: int, seq_len: int) -> tuple[Compilation, Compilation]:
    """Two fresh processes in turn, with one cache folder, empty at first."""
    command = [sys.executable, "-m", "benchmarks.compile_time", "--one", backend]
    command += ["--layers", str(layers), "--seq-len", str(seq_len)]
    with tempfile.TemporaryDirectory() as folder:
        alone = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        runs = []
        for _ in STATES:
            done = subprocess.run(command, env=os.environ | alone, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(Compilation(**json.loads(done.stdout.splitlines()[-1])))
    return runs[0], runs[1]


def compile_once(backend: str, layers: int, seq_len: int) -> Compilation:
    """Compile in this process, whose caches are taken to be empty."""
    import torch
    import torch._inductor.compile_fx
    from torch._dynamo.utils import counters
    from transformers import BertConfig, BertModel

    torch.set_num_threads(1)
    config = BertConfig(num_hidden_layers=layers, max_position_embeddings=seq_len)
    model = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(0, config.vocab_size, (1, seq_len))
    with torch.no_grad():
        start = _now()
        passes = _timed_passes() if backend == "monarch" else [0.0]
        call = torch.compile(model, backend=backend, dynamic=False)
        call(tokens)
        compiled = _now()
        call(tokens)
        end = _now()
    wall_s, cpu_s = (2 * b - a - c for a, b, c in zip(start, compiled, end, strict=True))
    return Compilation(
        wall_s, cpu_s, sum(passes), counters["inductor"]["fxgraph_cache_hit"], counters["monarch"]["lowered"]
    )


def _timed_passes() -> list[float]:
    """A list that receives the processor seconds of each run of the passes from now on."""
    from monarch_compile.passes import pipeline

    rewrite, seconds = pipeline.rewrite, []

    def timed(*args: Any) -> Any:
        start = time.process_time()
        try:
            return rewrite(*args)
        finally:
            seconds.append(time.process_time() - start)

    pipeline.rewrite = timed
    return seconds


def _now() -> tuple[float, float]:
    """The clock, and the processor time of this process and its children, in seconds."""
    return time.perf_counter(), sum(os.times()[:4])


def _verdict(state: str, result: dict[str, Any]) -> str:
    """Both readings of what compiling with monarch adds: all of it, and the passes alone."""
    whole, clock, passes = (result[name][state] for name in ("ratios", "wall_ratios", "passes_over_inductor"))
    return (
        f"{state}: whole compilation {whole:.3f} of Inductor's in processor time, {clock:.3f} by the clock; "
        f"our passes alone add {passes:.1%} to Inductor's (goal: at most {GOALS[state] - 1:.0%})"
    )


def _line(run: Compilation) -> str:
    counts = f"{run.hits} cache hits, {run.lowered} sites lowered"
    return f"{run.cpu_s:.2f} s of processors ({run.wall_s:.2f} s by the clock), passes {run.passes_s:.2f} s, {counts}"


if __name__ == "__main__":
    raise SystemExit(main())
