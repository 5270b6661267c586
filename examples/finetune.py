"""Fine-tune DINOv2 on labelled pictures with exact and with Monarch attention, side by side.

    python -m examples.finetune                # DINOv2 ViT-S/14 on Tux Paint's stamps, 64 x 64 patches; for a GPU
    python -m examples.finetune --pack FOLDER  # the same from one file (python -m examples.stamps.pack FOLDER)
    python -m examples.finetune --tiny         # a tiny model on generated pictures, not compiled: seconds on a CPU

Both runs start from the same weights and see the same pictures. Printed at the end: accuracy and loss on pictures that
were not trained on, milliseconds of a step, peak memory; and what the weights that were trained with exact attention
give under Monarch attention. With --output, results go to a JSON file, and losses to an SVG beside it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # started as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.curves import svg
from examples.packages import PackagesMissing
from examples.progress import step, table
from examples.stamps.classifier import SMALL, TINY, Classifier, dinov2, load_weights, pixels
from examples.stamps.pack import installed_weights, read_pack
from examples.stamps.pictures import Pictures, decoded, generated, read_stamps
from monarch_compile.backend import monarch
from monarch_compile.calibration.instrument import monarch as monarch_form
from monarch_compile.calibration.instrument import with_attention
from monarch_compile.report.explainer import explain
from monarch_compile.tools.timing import environment

EXACT, MONARCH = "exact", "monarch"
SWAPPED = "exact weights, monarch"
TINY_PICTURES, TINY_SIZE = 64, 56
WARM_UP_STEPS = 3
HEAD_FACTOR = 10.0
"""How much faster the head learns, which starts from nothing."""
SMOOTHING = 0.9
"""Of the curves: the share of the past in a moving mean of losses."""

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """What is trained: a model in its first weights, pictures, and how batches of them become inputs."""

    model: Classifier = field(repr=False)
    pictures: Pictures = field(repr=False)
    side: int
    batch: int
    device: torch.device
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of a picture: its patches and the class token."""
        return self.side**2 + 1

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass: bfloat16 on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and classes to learn from, in an order that the seed decides, without an end."""
        generator = torch.Generator().manual_seed(self.seed)
        learned = (~self.pictures.unseen).nonzero().flatten()
        while True:
            order = learned[torch.randperm(len(learned), generator=generator)]
            for places in order.split(self.batch):
                if len(places) == self.batch:
                    yield self.inputs(places)

    def inputs(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures of some places as the model takes them, and their classes."""
        images = pixels(self.pictures.images[places], self.side, self.device)
        return images, self.pictures.labels[places].to(self.device)


@dataclass(frozen=True)
class Judged:
    """Share of right classes, and mean cross-entropy, of unseen pictures."""

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Run:
    """What training gave. losses: of every step. first_step_s: with compilation. step_ms: median of a later step.

    peak_mib: of device memory in a later step, with weights and optimizer; None on a CPU.
    """

    name: str
    losses: tuple[float, ...]
    judged: Judged
    first_step_s: float
    step_ms: float
    peak_mib: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Train with both forms of attention; print and write what came out. 2 where packages are missing."""
    args = parse_arguments(argv)
    try:
        with step("loading"):
            problem = tiny_problem(args) if args.tiny else stamps_problem(args)
    except PackagesMissing as error:
        print(error, file=sys.stderr)
        return 2
    unseen = int(problem.pictures.unseen.sum())
    print(
        f"torch {torch.__version__} on {device_name(problem.device)}; {len(problem.pictures.names)} classes, "
        f"{len(problem.pictures.labels) - unseen} pictures to learn from, {unseen} others; "
        f"{problem.batch} x {problem.tokens} tokens a step"
    )
    options = {"policy": "always" if args.tiny else args.policy}
    print_report(problem, options)
    runs, swapped = compare(problem, options, args)
    print(f"\n{summary(runs, swapped)}")
    if args.output:
        write(args.output, problem, options, runs, swapped)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m examples.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model on generated pictures")
    parser.add_argument("--pack", type=Path, metavar="DIR", help="read weights and stamps from the file of a folder")
    parser.add_argument("--side", type=int, help="patches along a side of a picture (default: 64; tiny: 8)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, help="(default: 300; tiny: 30)")
    parser.add_argument("--learning-rate", type=float, help="(default: 3e-5; tiny: 1e-3)")
    parser.add_argument("--policy", choices=("auto", "always"), default="auto", help="of the monarch backend")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="PATH.json", help="write results here, and an SVG beside it")
    args = parser.parse_args(argv)
    args.side = args.side or (8 if args.tiny else 64)
    args.steps = args.steps or (30 if args.tiny else 300)
    args.learning_rate = args.learning_rate or (1e-3 if args.tiny else 3e-5)
    return args


def tiny_problem(args: argparse.Namespace) -> Problem:
    """A tiny model in random weights, on generated pictures."""
    pictures = generated(TINY_PICTURES, TINY_SIZE, args.seed)
    torch.manual_seed(args.seed)
    model = Classifier(dinov2(TINY, args.side), TINY["hidden_size"], len(pictures.names))
    return _problem(model, pictures, args)


def stamps_problem(args: argparse.Namespace) -> Problem:
    """DINOv2 ViT-S/14 and the stamps, of a pack or of installed packages.

    Raises:
        PackagesMissing: there is no pack, and a package is not installed.
    """
    weights, stamps = read_pack(args.pack) if args.pack else (installed_weights(), read_stamps())
    pictures = decoded(stamps)
    torch.manual_seed(args.seed)
    model = Classifier(dinov2(SMALL, args.side), SMALL["hidden_size"], len(pictures.names))
    load_weights(model.backbone, weights, args.side)
    return _problem(model, pictures, args)


def _problem(model: Classifier, pictures: Pictures, args: argparse.Namespace) -> Problem:
    device = torch.device(args.device)
    return Problem(model.to(device), pictures, args.side, args.batch, device, args.seed)


def print_report(problem: Problem, options: Mapping[str, Any]) -> None:
    """What the monarch backend does with the forward pass of a training step."""
    images, _ = next(problem.batches())
    with step("explaining the compilation"), problem.autocast():
        report = explain(copy.deepcopy(problem.model), images, options=options)
    print(f"{report}\n")


def compare(problem: Problem, options: Mapping[str, Any], args: argparse.Namespace) -> tuple[tuple[Run, Run], Judged]:
    """Train with each form of attention; then judge exact attention's weights under Monarch attention."""
    exact_model = copy.deepcopy(problem.model)
    exact_run = train(EXACT, exact_model, _called(exact_model, None, args), problem, args)
    weights = {name: x.cpu() for name, x in exact_model.state_dict().items()}
    del exact_model  # and what Dynamo holds of it, so that it is no part of the other run's memory
    torch._dynamo.reset()
    gc.collect()
    model = copy.deepcopy(problem.model)
    called = _called(model, options, args)
    run = train(MONARCH, model, called, problem, args)
    model.load_state_dict(weights)
    with step(f"{SWAPPED}: judging"):
        swapped = judge(called, problem)
    return (exact_run, run), swapped


def _called(model: nn.Module, options: Mapping[str, Any] | None, args: argparse.Namespace) -> Model:
    """`model` with exact attention (`options` None) or with Monarch attention; compiled, unless it is tiny.

    Where the package is installed, backend="monarch" does as well.
    """
    if args.tiny:
        return model if options is None else with_attention(model, monarch_form, options)
    backend: Any = "inductor" if options is None else monarch
    called: Model = torch.compile(model, backend=backend, options=options, dynamic=False)
    return called


def train(name: str, model: Classifier, called: Model, problem: Problem, args: argparse.Namespace) -> Run:
    """Train `model`, called as `called`, by AdamW under a rate that rises for a tenth of the steps, then falls."""
    groups = [
        {"params": list(model.backbone.parameters()), "lr": args.learning_rate},
        {"params": list(model.head.parameters()), "lr": HEAD_FACTOR * args.learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda place: _rate(place, args.steps))
    losses: list[float] = []
    seconds: list[float] = []
    batches = problem.batches()
    for place in range(args.steps):
        if place == min(WARM_UP_STEPS, args.steps - 1) and problem.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        images, labels = next(batches)
        with problem.autocast():
            scores = called(images)
        loss = F.cross_entropy(scores.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        if place % max(1, args.steps // 5) == 0:
            print(f"{name}: step {place}, loss {losses[-1]:.3f}, {sum(seconds):.1f} s", flush=True)
    peak = torch.cuda.max_memory_allocated() / 2**20 if problem.device.type == "cuda" else None
    with step(f"{name}: judging"):
        judged = judge(called, problem)
    step_ms = 1e3 * statistics.median(seconds[WARM_UP_STEPS:] or seconds)
    return Run(name, tuple(losses), judged, seconds[0], step_ms, peak)


def _rate(place: int, steps: int) -> float:
    rising = max(1, steps // 10)
    return min((place + 1) / rising, (steps - place) / max(1, steps - rising))


def judge(called: Model, problem: Problem) -> Judged:
    """What the model gives for unseen pictures.

    Gradients stay enabled, and the last batch is filled up: else the model would be compiled once more.
    """
    right, total, number = 0, 0.0, 0
    for places in problem.pictures.unseen.nonzero().flatten().split(problem.batch):
        filled = places.repeat(problem.batch)[: problem.batch]
        images, labels = problem.inputs(filled)
        with problem.autocast():
            scores = called(images).detach().float()[: len(places)]
        labels = labels[: len(places)]
        right += int((scores.argmax(-1) == labels).sum())
        total += F.cross_entropy(scores, labels, reduction="sum").item()
        number += len(places)
    return Judged(right / number, total / number)


def summary(runs: Sequence[Run], swapped: Judged) -> str:
    """A table of the runs, and of exact attention's weights under Monarch attention."""
    rows = [["attention", "accuracy, unseen", "loss, unseen", "ms a step", "faster", "peak MiB", "first step, s"]]
    for run in runs:
        cells = [f"{run.judged.accuracy:.3f}", f"{run.judged.loss:.3f}", f"{run.step_ms:.1f}"]
        cells += [f"{runs[0].step_ms / run.step_ms:.2f}x", "-" if run.peak_mib is None else f"{run.peak_mib:.0f}"]
        rows.append([run.name, *cells, f"{run.first_step_s:.1f}"])
    rows.append([SWAPPED, f"{swapped.accuracy:.3f}", f"{swapped.loss:.3f}", *["-"] * 4])
    return table(rows)


def write(path: Path, problem: Problem, options: Mapping[str, Any], runs: Sequence[Run], swapped: Judged) -> None:
    """Write results to `path`, and the losses as a picture beside it."""
    content = {
        "environment": {"device": device_name(problem.device)} | environment(),
        "problem": {"tokens": problem.tokens, "batch": problem.batch, "classes": problem.pictures.names},
        "options": options,
        "runs": [asdict(run) for run in runs],
        SWAPPED: asdict(swapped),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    curves = {
        f"{run.name}: unseen {run.judged.accuracy:.3f}, {run.step_ms:.1f} ms": _smooth(run.losses) for run in runs
    }
    picture = path.with_suffix(".svg")
    title = f"Fine-tuning at {problem.batch} x {problem.tokens} tokens, {device_name(problem.device)}"
    picture.write_text(svg(curves, title, "step", "loss, moving mean"), encoding="utf-8")
    print(f"wrote {path} and {picture}")


def _smooth(losses: Sequence[float]) -> list[float]:
    found: list[float] = []
    for loss in losses:
        found.append(loss if not found else SMOOTHING * found[-1] + (1 - SMOOTHING) * loss)
    return found


def device_name(device: torch.device) -> str:
    """What results are told by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["cpu"]


if __name__ == "__main__":
    raise SystemExit(main())
