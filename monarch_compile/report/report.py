"""What the compiler did with each site of a model, and what it expects to gain: a value to print or save."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch

from monarch_compile.cost.devices import installed
from monarch_compile.cost.prediction import Cost
from monarch_compile.decision import LOWERED, Change, Decision
from monarch_compile.errors import InputError
from monarch_compile.family import family, kinds_in_words, lowered_in_words
from monarch_compile.ir import Dim
from monarch_compile.refusal import remedy_for
from monarch_compile.report.kernels import Capability, Kernel, Kernels, kernels_of_site, lines_of
from monarch_compile.version import __version__


@dataclass(frozen=True)
class Site:
    """One site: a place in the model that a family of operators may lower.

    name: module path and source line. family: of operators. status: "lowered" or "exact".
    code: a short stable identifier of the outcome.
    reason: one sentence. ir, block_size: the lowered form; also where a legal site was kept exact by choice.
    shape: its sizes in words of its family; "" where the site was not understood.
    q_shape, k_shape, v_shape: (batch, num_heads, seq_len, head_dim) of attention that was understood; else empty.
    exact, monarch: `Cost` of each form, None where unknown. exact_s, monarch_s: predicted seconds on `device`.
    node, source: the FX node that decided, and its line of Python.
    kernels: what a CUDA device runs for this site; kernel_note: why there are none, or when they run.
    backward_kernels: what it runs for the gradients of a site that trains; backward_note: why there are none.
    graph: index of the captured graph that holds the site.
    error: measured relative error of the site's output; None where it was not measured, as where the lowered form is
        exact up to rounding.
    blocking: the token grid that blocks follow and where it was found, or why they are pieces of the sequence.
    """

    family: str
    name: str
    status: str
    code: str
    reason: str
    ir: Any = None
    block_size: int | None = None
    shape: str = ""
    q_shape: tuple[Dim, ...] = ()
    k_shape: tuple[Dim, ...] = ()
    v_shape: tuple[Dim, ...] = ()
    dtype: torch.dtype | None = None
    device: str = "cpu"
    mask: str = "none"
    exact: Cost | None = None
    monarch: Cost | None = None
    exact_s: float | None = None
    monarch_s: float | None = None
    node: str = ""
    source: str = ""
    kernels: tuple[Kernel, ...] = ()
    kernel_note: str = ""
    backward_kernels: tuple[Kernel, ...] = ()
    backward_note: str = ""
    graph: int = 0
    error: float | None = None
    blocking: str = ""

    @property
    def lowered(self) -> bool:
        """Whether the site runs in its lowered form."""
        return self.status == LOWERED

    @property
    def noun(self) -> str:
        """What the family calls such a site, e.g. "attention site"."""
        return family(self.family).noun

    @property
    def remedy(self) -> str:
        """What would make the site lower; '' where it does."""
        return remedy_for(self.code)

    @property
    def predicted_speedup(self) -> float | None:
        """Predicted exact time over predicted time of the lowered form, None where unknown."""
        return self.exact_s / self.monarch_s if self.exact_s and self.monarch_s else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form; symbolic sizes and costs become strings."""
        return {
            "name": self.name,
            "family": self.family,
            "status": self.status,
            "code": self.code,
            "reason": self.reason,
            "remedy": self.remedy,
            "ir": None if self.ir is None else str(self.ir),
            "block_size": self.block_size,
            "shape": self.shape,
            "q_shape": list(self.q_shape),
            "k_shape": list(self.k_shape),
            "v_shape": list(self.v_shape),
            "dtype": dtype_name(self.dtype),
            "device": self.device,
            "mask": self.mask,
            "exact": _cost_dict(self.exact),
            "monarch": _cost_dict(self.monarch),
            "exact_s": self.exact_s,
            "monarch_s": self.monarch_s,
            "predicted_speedup": self.predicted_speedup,
            "node": self.node,
            "source": self.source,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
            "kernel_note": self.kernel_note,
            "backward_kernels": [kernel.to_dict() for kernel in self.backward_kernels],
            "backward_note": self.backward_note,
            "graph": self.graph,
            "error": self.error,
            "blocking": self.blocking,
        }


@dataclass(frozen=True, eq=False)
class GraphPair:
    """The captured graphs before and after lowering; a node is labelled with its `target`, `shape` and `role`.

    A node's key is "graph index/node name". Roles: "input", "output", "op", "replaced" (gone after lowering),
    "monarch" (the operator of a lowered site) and "new" (added around it).
    """

    before: nx.DiGraph
    after: nx.DiGraph


@dataclass(frozen=True, eq=False)
class Report:
    """What `explain` found: the sites, the graphs, and the failures of whole graphs (message per graph).

    output_error: measured relative error of the model's output, None where it was not measured.
    changes: what was changed beside the sites, for their sake.
    """

    sites: tuple[Site, ...]
    graph: GraphPair
    num_graphs: int = 1
    failures: tuple[str, ...] = ()
    output_error: float | None = None
    changes: tuple[Change, ...] = ()

    @property
    def summary(self) -> str:
        """One line: how many sites of each family were lowered, in how many graphs."""
        nothing = f"no {kinds_in_words()} found"
        graphs = f"{self.num_graphs} graph{'' if self.num_graphs == 1 else 's'}"
        if not self.num_graphs:
            return f"{nothing}: no graph was captured"
        found = f"{lowered_in_words((site.family, site.lowered) for site in self.sites)} lowered"
        failed = f"; the passes failed on {len(self.failures)}: all in them stays exact" if self.failures else ""
        error = "" if self.output_error is None else f"; relative error of the output {self.output_error:.3g}"
        return f"{found if self.sites else nothing} in {graphs}{failed}{error}"

    def __str__(self) -> str:
        changes = (f"changed: {change.name}: {change.reason}" for change in self.changes)
        failures = (f"failed: {failure}" for failure in self.failures)
        return "\n".join([*_table(self.sites), *changes, *failures, self.summary])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return {
            "monarch_compile": __version__,
            "torch": torch.__version__,
            "summary": self.summary,
            "num_graphs": self.num_graphs,
            "failures": list(self.failures),
            "output_error": self.output_error,
            "changes": [asdict(change) for change in self.changes],
            "sites": [site.to_dict() for site in self.sites],
        }

    def save(self, path: str | Path) -> Path:
        """Write one self-contained HTML page to `path` and return the path."""
        from monarch_compile.report.page import render

        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(self), encoding="utf-8")
        return target


def site_of(
    decision: Decision,
    hints: Mapping[str, int] | None = None,
    graph: int = 0,
    capability: Capability | None = None,
) -> Site:
    """The site that a decision is about, with costs, predicted times and kernels.

    hints: values of symbolic sizes. capability: what kernels are compiled for to tell what they take; None: nothing is
    compiled.
    """
    ir, own = decision.ir, family(decision.family)
    exact_s, monarch_s = _predicted(decision, hints)
    kernels, note = Kernels(), ""
    if ir is not None and decision.status == LOWERED:
        kernels = kernels_of_site(ir, decision.calls.trains, hints, capability)
        note = kernels.note
    if kernels.forward and decision.device != "cuda":
        note = f"On {decision.device} the reference runs instead; on CUDA these run. {note}".strip()
    return Site(
        family=decision.family,
        name=decision.name,
        status=decision.status,
        code=decision.code,
        reason=decision.reason,
        ir=ir,
        block_size=None if ir is None else own.block_size(ir),
        shape=own.shape(decision),
        q_shape=decision.q_shape,
        k_shape=decision.k_shape,
        v_shape=decision.v_shape,
        dtype=decision.dtype,
        device=decision.device,
        mask=decision.mask,
        exact=own.exact_cost(decision),
        monarch=None if ir is None else own.cost(ir),
        exact_s=exact_s,
        monarch_s=monarch_s,
        node=decision.node,
        source=decision.source,
        kernels=kernels.forward,
        kernel_note=note,
        backward_kernels=kernels.backward,
        backward_note=kernels.backward_note,
        graph=graph,
        blocking=decision.blocking,
    )


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name without "torch."; empty where unknown."""
    return "" if dtype is None else str(dtype).removeprefix("torch.")


def _predicted(decision: Decision, hints: Mapping[str, int] | None) -> tuple[float | None, float | None]:
    if decision.ir is None:
        return None, None
    try:
        prediction = family(decision.family).predict(decision.ir, installed(decision.device), hints, decision.calls)
    except InputError:  # a size without a hint, or a device that the cost model does not describe
        return None, None
    return prediction.exact_s, prediction.monarch_s


def _cost_dict(cost: Cost | None) -> dict[str, int | str] | None:
    if cost is None:
        return None
    values = {"flops": cost.flops, "bytes": cost.bytes, "exps": cost.exps}
    return {name: value if isinstance(value, int) else str(value) for name, value in values.items()}


COLUMNS = ("site", "status", "shape", "dtype", "blocks", "predicted", "error", "code")


def _table(sites: Sequence[Site]) -> list[str]:
    """An aligned row for each site; a site that stays exact is followed by its reason."""
    if not sites:
        return []
    rows = [COLUMNS, *(_cells(site) for site in sites)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    result = [lines[0], "-" * max(map(len, lines))]
    for site, line in zip(sites, lines[1:], strict=True):
        result += [line] if site.lowered else [line, *_why_exact(site)]
    used = [Kernels(site.kernels, site.backward_kernels) for site in sites]
    return [*result, *_how_cut(sites), *lines_of(used)]


def _how_cut(sites: Sequence[Site]) -> list[str]:
    """What the blocks of lowered sites follow: a line for all that are told alike."""
    told = Counter(site.blocking for site in sites if site.lowered and site.blocking)
    return [f"blocks of {count} {'site' if count == 1 else 'sites'}: {text}" for text, count in told.items()]


def _why_exact(site: Site) -> list[str]:
    """The reason, the node and line that decided it, and what would make the site lower."""
    place = f" [{site.node}{f', {site.source}' if site.source else ''}]" if site.node else ""
    remedy = [f"    would lower with: {site.remedy}"] if site.remedy else []
    return [f"    exact because: {site.reason}{place}", *remedy]


def _cells(site: Site) -> tuple[str, ...]:
    ir = site.ir
    blocks = "-" if ir is None else family(site.family).blocks(ir)
    gain = "-" if site.predicted_speedup is None else f"{site.predicted_speedup:.2f}x"
    error = "-" if site.error is None else f"{site.error:.3f}"
    dtype = dtype_name(site.dtype) or "-"
    return (site.name, site.status, site.shape or "-", dtype, blocks, gain, error, site.code)
