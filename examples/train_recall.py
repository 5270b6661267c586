"""Train a small causal Hyena on associative recall, compiled by Inductor and by backend="monarch", side by side.

    python -m examples.train_recall [--steps 600] [--length 512] [--output recall.json]

A sequence is made of pairs, a key and its value, which is drawn anew for each sequence. Keys come back, and from the
second time on the model is to predict the value: it must have looked it up. Both runs start from the same weights and
see the same sequences. Writes losses as JSON and, beside it, as an SVG.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # started as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.curves import svg
from examples.mixer.models import HyenaLM, Size, num_parameters
from examples.monarch_mixer import verdict
from examples.progress import step, table
from monarch_compile.backend import monarch
from monarch_compile.report.explainer import explain
from monarch_compile.tools.timing import environment

NUM_KEYS = 16
IGNORED = -100
"""Target where there is nothing to predict; `cross_entropy` leaves it out."""

BACKENDS: dict[str, Any] = {"inductor": "inductor", "monarch": monarch}
"""Of torch.compile. Where the package is installed, the name "monarch" does as well."""

WARM_UP_STEPS = 3
EVALUATED_BATCHES = 8

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained on; `dtype` of the activations is autocast's, parameters are float32."""

    batch: int
    length: int
    dtype: str
    device: str
    seed: int = 0

    def batches(self, seed: int) -> Batches:
        """A stream of batches, the same for the same seed."""
        return Batches(self, torch.Generator(self.device).manual_seed(seed))

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, getattr(torch, self.dtype))


@dataclass(frozen=True)
class Batches:
    """Random sequences of a task."""

    task: Task
    generator: torch.Generator

    def next(self) -> tuple[Tensor, Tensor]:
        """Tokens and targets, (batch, length) each: keys are 0, ..., NUM_KEYS - 1, values NUM_KEYS and above."""
        batch, device = self.task.batch, self.task.device
        value_of = torch.randint(NUM_KEYS, (batch, NUM_KEYS), generator=self.generator, device=device) + NUM_KEYS
        keys = torch.randint(NUM_KEYS, (batch, self.task.length // 2), generator=self.generator, device=device)
        values = value_of.gather(1, keys)
        counts = F.one_hot(keys, NUM_KEYS).cumsum(1).gather(2, keys[..., None])[..., 0]
        targets = torch.where(counts > 1, values, IGNORED)
        nothing = torch.full_like(targets, IGNORED)
        return torch.stack((keys, values), -1).flatten(1), torch.stack((targets, nothing), -1).flatten(1)


@dataclass(frozen=True)
class Run:
    """What training under one backend gave. losses: of every step. accuracy: share of right values in new sequences.

    first_step_s: with compilation. step_ms: median of a later step.
    """

    backend: str
    losses: tuple[float, ...]
    accuracy: float
    first_step_s: float
    step_ms: float


def main(argv: Sequence[str] | None = None) -> int:
    """Train under each backend; print and write what came out."""
    args = parse_arguments(argv)
    task = Task(args.batch, args.length, args.dtype, args.device, args.seed)
    size = Size(args.width, args.depth, vocab_size=2 * NUM_KEYS, filter_hidden=64, max_length=args.length)
    print(
        f"torch {torch.__version__} on {task.device}; {num_parameters(new_model(task, size)) / 1e6:.2f}M parameters\n"
    )
    print_report(task, size, args.policy)
    runs = []
    for name, backend in BACKENDS.items():
        model = new_model(task, size)
        options = {"policy": args.policy} if name == "monarch" else None
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, options=options, dynamic=False)
        with step(f"{name}: {args.steps} steps"):
            runs.append(train(name, model, compiled, task, args.steps, args.learning_rate))
    print(f"\n{summary(runs)}")
    if args.output:
        write(args.output, task, size, runs)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m examples.train_recall", description="Associative recall.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, keys and values")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of autocast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--policy", choices=("auto", "always"), default="auto", help="of the monarch backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="PATH.json", help="write losses here, and an SVG beside it")
    return parser.parse_args(argv)


def new_model(task: Task, size: Size) -> HyenaLM:
    """The model, with the same weights at each call."""
    torch.manual_seed(task.seed)
    return HyenaLM(size).to(task.device)


def print_report(task: Task, size: Size, policy: str) -> None:
    """What the monarch backend does with the forward pass of a training step."""
    tokens, _ = task.batches(task.seed).next()
    with task.autocast():
        report = explain(new_model(task, size), tokens, options={"policy": policy})
    print(f"{report}\n{verdict(report)}\n")


def train(backend: str, model: nn.Module, compiled: Model, task: Task, steps: int, learning_rate: float) -> Run:
    """Train `model`, called as `compiled`, for `steps` steps of AdamW after a short warm-up."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=min(20, steps))
    batches = task.batches(task.seed + 1)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        tokens, targets = batches.next()
        with task.autocast():
            logits = compiled(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    later = seconds[WARM_UP_STEPS:] or seconds
    return Run(backend, tuple(losses), accuracy(compiled, task), seconds[0], 1e3 * statistics.median(later))


def accuracy(compiled: Model, task: Task) -> float:
    """Share of right values in sequences that were not trained on.

    Gradients stay enabled, for without them the model would be compiled once more.
    """
    batches = task.batches(task.seed + 2)
    right, total = 0, 0
    for _ in range(EVALUATED_BATCHES):
        tokens, targets = batches.next()
        with task.autocast():
            predicted = compiled(tokens).argmax(-1)
        asked = targets != IGNORED
        right += int((predicted == targets)[asked].sum())
        total += int(asked.sum())
    return right / total


def summary(runs: Sequence[Run]) -> str:
    """A table of the runs, and how far apart their losses are."""
    rows = [["backend", "first loss", "last loss", "accuracy", "ms a step", "first step, s"]]
    for run in runs:
        cells = [f"{run.losses[0]:.4f}", f"{run.losses[-1]:.4f}", f"{run.accuracy:.4f}"]
        rows.append([run.backend, *cells, f"{run.step_ms:.2f}", f"{run.first_step_s:.1f}"])
    apart = [max(losses) - min(losses) for losses in zip(*(run.losses for run in runs), strict=True)]
    return f"{table(rows)}\nlosses differ by {apart[0]:.2e} in the first step, by {max(apart):.2e} at most"


def write(path: Path, task: Task, size: Size, runs: Sequence[Run]) -> None:
    """Write `runs` to `path`, and their losses as a picture beside it."""
    gpu = {"gpu": torch.cuda.get_device_name()} if task.device == "cuda" else {}
    content: Mapping[str, Any] = {
        "environment": gpu | environment(),
        "task": asdict(task),
        "size": asdict(size),
        "runs": [asdict(run) for run in runs],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    title = f"Associative recall, {task.length} tokens, {task.dtype}"
    curves = {f"{run.backend}, accuracy {run.accuracy:.3f}": run.losses for run in runs}
    picture = path.with_suffix(".svg")
    picture.write_text(svg(curves, title, "step", "loss"), encoding="utf-8")
    print(f"wrote {path} and {picture}")


if __name__ == "__main__":
    raise SystemExit(main())
