"""The forms of a model that are compared: a table of them, and how each is made of a task's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

import monarch_compile
from benchmarks.quality import controls, row_choice
from benchmarks.quality.task import Entry, Model, Task
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.calibration.instrument import with_attention


@dataclass(frozen=True, eq=False)
class Built:
    """A replacement of a task's model.

    options: what the backend is given, None where nothing is compiled by it. plan: what calibration chose.
    timed: whether its speed means anything; a control's does not.
    """

    model: Model = field(repr=False)
    options: dict[str, Any] | None = None
    plan: monarch_compile.Plan | None = None
    timed: bool = True


Builder = Callable[[Task, Mapping[str, Any]], Built]


@dataclass(frozen=True)
class Variant:
    """One form: `build` makes it, given a task and `options`.

    on_grid: only for tasks whose tokens lie on a grid. causal: whether it is for causal tasks, or for others; None: for
    both.
    """

    name: str
    title: str
    build: Builder = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)
    must_fail: bool = False
    on_grid: bool = False
    causal: bool | None = False

    def fits(self, entry: Entry) -> bool:
        """Whether a task has this variant."""
        return (entry.on_grid or not self.on_grid) and self.causal in (None, entry.causal)


def exact(task: Task, options: Mapping[str, Any]) -> Built:
    """The model under stock Inductor."""
    return Built(torch.compile(task.model, dynamic=False))


def lowered(task: Task, options: Mapping[str, Any]) -> Built:
    """The model with every site lowered that can be, at the task's block size."""
    return _compiled(task, {"policy": "always", "block_size": task.block_size, **options})


def tiled(task: Task, options: Mapping[str, Any]) -> Built:
    """The model with every site lowered that can be; the grid and what the options leave open are found."""
    return _compiled(task, {"policy": "always", **options})


def calibrated(task: Task, options: Mapping[str, Any]) -> Built:
    """The model under the plan that calibration makes of the task's calibration inputs and budget."""
    plan = monarch_compile.calibrate(
        task.model, list(task.calibration_inputs), budget=task.budget, metric=task.metric, options=dict(options)
    )
    return _compiled(task, {"plan": plan}, plan)


def uniform(task: Task, options: Mapping[str, Any]) -> Built:
    """The model, eager, with uniform attention at every site that can be lowered."""
    return _instrumented(task, lambda call: controls.uniform(call.q, call.k, call.v, call.key_mask))


def block_diagonal(task: Task, options: Mapping[str, Any]) -> Built:
    """The model, eager, with only a block's own keys visible at every site that can be lowered."""

    def attention(call: AttentionCall) -> Tensor:
        scale = call.options["scale"]
        return controls.block_diagonal(call.q, call.k, call.v, call.key_mask, scale=scale, block_size=task.block_size)

    return _instrumented(task, attention)


def listed(task: Task, options: Mapping[str, Any]) -> Built:
    """The model, eager, whose causal sites see exactly some blocks and nothing else; see `controls.listed_blocks`."""
    size = task.block_size

    def attention(call: AttentionCall) -> Tensor:
        return controls.listed_blocks(call.q, call.k, call.v, scale=call.options["scale"], block_size=size, **options)

    return _instrumented(task, attention, causal=True)


def by_rows(task: Task, options: Mapping[str, Any]) -> Built:
    """The model, eager, whose causal sites are emulated: each row chooses its own far keys; see `row_choice.attend`."""
    size = task.block_size

    def attention(call: AttentionCall) -> Tensor:
        return row_choice.attend(call.q, call.k, call.v, scale=call.options["scale"], block_size=size, **options)

    return _instrumented(task, attention, causal=True)


def _chosen() -> tuple[Variant, ...]:
    """Causal forms with a window of one block before and the first block as attention sinks, and their controls."""
    sinks = {"causal": True, "window": 1, "prefix": 64}
    forms = (
        Variant(
            f"chosen_{count}",
            f"{count} chosen blocks, one before, the first",
            lowered,
            MappingProxyType({**sinks, "chosen": count}),
            causal=True,
        )
        for count in (0, 2, 4, 8, 16, 32)
    )
    rows = (
        Variant(
            f"rows_{count}",
            f"emulated: each row's own choice of as many keys as {count} blocks, one block before, the first",
            by_rows,
            MappingProxyType({"window": 1, "sinks": 1, "chosen": count, "piece": row_choice.PIECE}),
            causal=True,
        )
        for count in (4, 8, 16)
    )
    lists: dict[str, tuple[str, dict[str, int]]] = {
        "window_sinks": ("one block before and the first alone", {"window": 1, "sinks": 1}),
        "random_8": ("8 random blocks, one before, the first", {"window": 1, "sinks": 1, "random": 8}),
        "own_block": ("own block alone", {"window": 0, "sinks": 0}),
    }
    fail = (
        Variant(
            name, f"control: {title}", listed, MappingProxyType(options), must_fail=name == "own_block", causal=True
        )
        for name, (title, options) in lists.items()
    )
    return (*forms, *rows, *fail)


def _tiles() -> tuple[Variant, ...]:
    """Tiles of several shapes, each with the windows that are worth their price."""
    windows = {
        "own": (0, "box", "own tile exact"),
        "plus": (1, "plus", "plus of 5 exact"),
        "box": (1, "box", "3 x 3 exact"),
    }
    return tuple(
        Variant(
            f"tiles_{rows}x{columns}_{name}",
            f"tiles of {rows} x {columns}, {title}",
            tiled,
            MappingProxyType({"tile": (rows, columns), "window": window, "window_shape": shape}),
            on_grid=True,
        )
        for rows, columns in ((4, 4), (4, 8), (8, 8))
        for name, (window, shape, title) in windows.items()
    )


PAPER_TILES = MappingProxyType({"tile": (8, 8), "window": None})
ROWS = MappingProxyType({"grid": None, "prefix": 1, "window": 1})
VARIANTS: tuple[Variant, ...] = (
    Variant("exact", "exact", exact, causal=None),
    Variant("paper", "paper's form", lowered, MappingProxyType({"window": None})),
    Variant("paper_t2", "paper's form, two iterations", lowered, MappingProxyType({"window": None, "num_iters": 2})),
    Variant("window", "exact window of one block", lowered, MappingProxyType({"window": 1})),
    Variant("rows", "pieces of rows, window of one, class token exact", tiled, ROWS, on_grid=True),
    Variant("default", "defaults: the grid is found", tiled, on_grid=True),
    Variant("tiles_paper", "tiles of 8 x 8, paper's form", tiled, PAPER_TILES, on_grid=True),
    *_tiles(),
    Variant("calibrated", "calibrated", calibrated),
    Variant("uniform", "control: uniform attention", uniform, must_fail=True),
    Variant("block_diagonal", "control: block-diagonal attention", block_diagonal, must_fail=True),
    *_chosen(),
)


def _compiled(task: Task, options: dict[str, Any], plan: monarch_compile.Plan | None = None) -> Built:
    return Built(torch.compile(task.model, backend="monarch", options=options, dynamic=False), options, plan)


def _instrumented(task: Task, attention: Callable[[AttentionCall], Tensor], *, causal: bool = False) -> Built:
    options: dict[str, Any] = {"policy": "always", "block_size": task.block_size}
    if causal:
        options["causal"] = True
    return Built(with_attention(task.model, attention, options), options, timed=False)
