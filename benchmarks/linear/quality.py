"""Quality of compressed models: ``python -m benchmarks.linear.quality``.

The linear layers of pretrained models become block linears that keep 75%, 50% and 25% of the parameters, beside plain
products of low rank with as many. Judged is the relative error of the model's output on inputs that no fit has seen.
Results go to a JSON file after each row, with a Markdown table beside it; rows that the file holds are skipped, so that
an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from benchmarks.linear.pretrained import MODELS, Pretrained
from benchmarks.resumable import machine, opened, write
from benchmarks.tables import markdown_table
from monarch_compile import BlastLinearConfig, MonarchLinearConfig, compress_, refine_
from monarch_compile.calibration.metrics import relative_error
from monarch_compile.linear.compression.factors import damped
from monarch_compile.linear.compression.layers import find_layers
from monarch_compile.linear.compression.moments import moments_of

NUM_BLOCKS = 4
BUDGETS = (0.5, 0.25, 0.75)
RETRAINED = "retrained"
RESULTS = Path(__file__).parents[1] / "results"

Method = Callable[[Pretrained, float, int], nn.Module]
"""From a model, the share of parameters to keep and the steps of training, to a compressed copy of it."""


def low_rank(pretrained: Pretrained, budget: float, *, with_calls: bool) -> nn.Module:
    """Every linear's weight as a plain product of low rank: the best one for the weight, or for its output.

    The copy holds the products: its numbers count, not its speed.
    """
    model = copy.deepcopy(pretrained.model)
    layers, _ = find_layers(model, None)
    moments = moments_of(model, layers, pretrained.fit) if with_calls else {}
    with torch.no_grad():
        for layer in layers:
            weight = layer.weight.double()
            rank = int(budget * weight.numel() / sum(weight.shape))
            weighed = weight
            if layer.name in moments:
                weighed = weight @ torch.linalg.cholesky(damped(moments[layer.name]))
            kept = torch.linalg.svd(weighed, full_matrices=False).U[:, :rank]
            layer.weight.copy_(kept @ (kept.mT @ weight))
    return model


def block_linears(pretrained: Pretrained, budget: float, make: Any, *, with_calls: bool) -> nn.Module:
    """What `compress_` makes."""
    model = copy.deepcopy(pretrained.model)
    calls = list(pretrained.fit) if with_calls else None
    compress_(model, make(num_blocks=NUM_BLOCKS, budget=budget), calls=calls)
    return model


def refined(pretrained: Pretrained, budget: float, make: Any, steps: int) -> nn.Module:
    """What `refine_` makes of that."""
    model = block_linears(pretrained, budget, make, with_calls=False)
    print(refine_(model, pretrained.model, list(pretrained.fit), steps=steps), flush=True)
    return model


def _of_kind(name: str, make: Any) -> dict[str, Method]:
    return {
        name: lambda p, budget, steps: block_linears(p, budget, make, with_calls=False),
        f"{name}, data-aware": lambda p, budget, steps: block_linears(p, budget, make, with_calls=True),
        f"{name}, closed forms in turn": lambda p, budget, steps: refined(p, budget, make, 0),
        f"{name}, {RETRAINED}": lambda p, budget, steps: refined(p, budget, make, steps),
    }


LOW_RANK = "low rank"
METHODS: Mapping[str, Method] = {
    LOW_RANK: lambda p, budget, steps: low_rank(p, budget, with_calls=False),
    f"{LOW_RANK}, data-aware": lambda p, budget, steps: low_rank(p, budget, with_calls=True),
    **_of_kind("monarch", MonarchLinearConfig),
    **_of_kind("blast", BlastLinearConfig),
}


@torch.no_grad()
def error_of(pretrained: Pretrained, model: nn.Module, references: Sequence[Tensor]) -> float:
    """Mean relative error of the model's outputs, each input's by itself, on inputs that no fit has seen."""
    errors = [
        relative_error(wanted, found)
        for (args, kwargs), reference in zip(pretrained.judged, references, strict=True)
        for wanted, found in zip(reference, model(*args, **kwargs), strict=True)
    ]
    return sum(errors) / len(errors)


def run(names: Sequence[str], budgets: Sequence[float], methods: Sequence[str], steps: int, path: Path) -> Any:
    """Measure the rows that `path` does not hold yet; its content after the last of them. Rows of training with another
    number of steps are measured anew."""
    content = opened(path, {"environment": machine("cpu"), "clocks": [], "rows": []}, fresh=False)
    content["rows"] = [row for row in content["rows"] if not _is_of_other_steps(row, names, budgets, methods, steps)]
    held = {(row["model"], row["budget"], row["method"]) for row in content["rows"]}
    for name in names:
        wanted = [(b, m) for b in budgets for m in methods if (name, b, m) not in held]
        if not wanted:
            continue
        pretrained = MODELS[name]()
        with torch.no_grad():
            references = [pretrained.model(*args, **kwargs) for args, kwargs in pretrained.judged]
        for budget, method in wanted:
            start = time.perf_counter()
            model = METHODS[method](pretrained, budget, steps)
            seconds = time.perf_counter() - start
            row = {"model": name, "budget": budget, "method": method}
            row |= {"error": error_of(pretrained, model, references), "seconds": seconds}
            row |= {"fit": pretrained.num_fit, "judged": pretrained.num_judged, "inputs": pretrained.inputs}
            row |= {"steps": steps if method.endswith(RETRAINED) else 0}
            content["rows"].append(row)
            write(path, content)
            print(f"{name}, {budget:.0%}, {method}: error {row['error']:.4f}, {seconds:.0f} s", flush=True)
    return content


def _is_of_other_steps(
    row: Mapping[str, Any], names: Sequence[str], budgets: Sequence[float], methods: Sequence[str], steps: int
) -> bool:
    is_asked = row["model"] in names and row["budget"] in budgets and row["method"] in methods
    return is_asked and row["method"].endswith(RETRAINED) and row["steps"] != steps


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for each model: methods by budgets, with the share of plain low rank's error in brackets."""
    lines = []
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {(row["method"], row["budget"]): row for row in rows if row["model"] == name}
        budgets = sorted({budget for _, budget in own}, reverse=True)
        first = next(iter(own.values()))
        lines += [f"### {name}: {first['inputs']}; fitted on {first['fit']}, judged on {first['judged']}", ""]
        table = []
        for method in METHODS:
            cells = [_cell(own.get((method, budget)), own.get((LOW_RANK, budget))) for budget in budgets]
            table.append([method, *cells])
        lines += [*markdown_table(("relative error", *(f"{budget:.0%}" for budget in budgets)), table), ""]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any] | None, plain: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return f"{row['error']:.3f}" + ("" if plain is None else f" ({row['error'] / plain['error']:.2f})")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear.quality", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(BUDGETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--steps", type=int, default=40, help="of training, for each layer of a model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "linear_quality_cpu.json", metavar="PATH")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    content = run(args.models, args.budgets, args.methods, args.steps, args.output)
    table = markdown(content["rows"])
    args.output.with_suffix(".md").write_text(table, encoding="utf-8")
    print(f"\n{table}")


if __name__ == "__main__":
    main()
