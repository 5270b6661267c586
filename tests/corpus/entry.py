"""One entry of the corpus, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from monarch_compile.config import MonarchConfig
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.passes.pipeline import rewrite

BLOCK_SIZE = 128
"""At least as long as any sequence of the corpus: one block, so that lowered attention is exact."""
OPTIONS = MonarchConfig(policy="always", block_size=BLOCK_SIZE)


class Absent(Exception):
    """What the entry needs is not installed."""


@dataclass(frozen=True)
class Entry:
    """A program with attention in it.

    make: gives the program and its inputs; raises Absent where a library, or a model in it, is missing.
    train: captured under grad mode (and, for a module, in training mode), else under no_grad.
    want: "lowered" for bidirectional attention without a bias (coverage.py names exceptions); "exact" for what must not
        be touched; "" where both occur, or it is of another family.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    want: str = LOWERED
    train: bool = False


@dataclass
class Outcome:
    """What the passes did with an entry's graphs, and the largest error of what was rewritten."""

    decisions: list[Decision] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    num_graphs: int = 0
    error: float = 0.0

    @property
    def num_lowered(self) -> int:
        return sum(d.status == LOWERED for d in self.decisions)

    def lines(self) -> list[str]:
        """The outcome as text, one line for each kind of site; a changed line is a changed outcome."""
        counted = Counter(_line(d) for d in self.decisions)
        graphs = [] if self.num_graphs == 1 else [f"{self.num_graphs} graphs"]
        return [*graphs, *(f"failed: {f}" for f in self.failures), *(f"{n} x {line}" for line, n in counted.items())]


def _line(decision: Decision) -> str:
    shown = decision.ir if decision.status == LOWERED else f"stage={decision.stage} mask={decision.mask}"
    return f"{decision.status} [{decision.code}] {shown}"


def run(entry: Entry) -> Outcome:
    """Capture the entry once and run the rewritten graphs beside the program itself.

    Raises:
        Absent: the entry needs something that is not installed.
    """
    torch.manual_seed(0)
    program, given = entry.make()
    outcome = Outcome()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome.num_graphs += 1
        try:
            result = rewrite(gm, example_inputs, OPTIONS)
        except Exception as error:
            outcome.failures.append(f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
            return gm.forward
        outcome.decisions += result.decisions
        return result.after.forward

    with torch.set_grad_enabled(entry.train):
        torch.manual_seed(1)
        expected = [t.detach().clone() for t in _tensors(program(*_copied(given)))]
        torch._dynamo.reset()
        torch.manual_seed(1)
        found = _tensors(torch.compile(program, backend=backend, dynamic=False)(*_copied(given)))
    outcome.error = max(map(_error, found, expected), default=0.0)
    return outcome


def _copied(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Fresh inputs: a program may write to them."""
    return tuple(
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in given
    )


def _tensors(output: Any) -> list[torch.Tensor]:
    """The float tensors in a program's output, whatever it is made of."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [t for value in output.values() for t in _tensors(value)]
    return [t for value in output for t in _tensors(value)] if isinstance(output, (list, tuple)) else []


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference where `expected` is finite, relative to its largest element (or 1, if that is larger).

    A row that sees no key is NaN in many spellings and 0 in the lowered form: nothing to compare.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    finite = expected.isfinite()
    found, expected = found.detach()[finite].double(), expected[finite].double()
    if not expected.numel():
        return 0.0
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    return float(error) if error.isfinite() else float("inf")
