"""What tuning tries for the gradients of attention, and what it checks and times a schedule with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.reference import reference
from monarch_compile.codegen.attention import search
from monarch_compile.codegen.attention.gradient_ir import GradientsOf
from monarch_compile.codegen.attention.gradient_schedule import GradientSchedule
from monarch_compile.codegen.attention.gradients import launch_with_lse
from monarch_compile.codegen.launcher import untraced
from monarch_compile.codegen.tiling import Tiling, padded

WARP_ROWS = (8, 64)
"""The least and the most rows of a tile that a warp owns."""


def applies(ir: GradientsOf) -> bool:
    """Whether `ir` is tuned: where its forward pass is."""
    return search.applies(ir.forward)


def sized(ir: GradientsOf) -> GradientsOf:
    """`ir` as it is tuned: symbolic counts of heads and batch entries become numbers."""
    return GradientsOf(search.sized(ir.forward))


def small(ir: GradientsOf) -> GradientsOf:
    """`ir` with one batch entry and few heads."""
    return GradientsOf(search.small(ir.forward))


def stages(ir: GradientsOf) -> tuple[str, ...]:
    """The fields of a schedule, the costliest kernel's first."""
    return "keys", "represent", "queries", "attend"


def variants(start: GradientSchedule, stage: str, ir: GradientsOf) -> Iterator[GradientSchedule]:
    """Schedules that differ from `start` in one stage; none where another kernel does its work."""
    blocks, block = ir.forward.num_blocks, ir.forward.form.block_size
    if (stage == "queries" and start.fused) or (stage == "attend" and start.whole):
        return
    for tiling in _tilings(block if stage in ("queries", "keys") else blocks or 1):
        changed: dict[str, Any] = {stage: tiling}
        if stage == "keys":
            yield from (replace(start, **changed, fused=fused) for fused in _both(block <= tiling.rows))
        elif stage == "represent":
            covers = blocks is not None and blocks <= tiling.rows
            yield from (replace(start, **changed, whole=whole) for whole in _both(covers))
        else:
            yield replace(start, **changed)


def _both(may: bool) -> tuple[bool, ...]:
    """Whether one kernel does the work of two: both ways where it `may`."""
    return (True, False) if may else (False,)


def _tilings(extent: int) -> Iterator[Tiling]:
    """Those worth trying for a kernel whose rows and steps both extend over `extent`."""
    largest = padded(extent)
    sizes = [size for size in search.SIZES if min(32, largest) <= size <= largest]
    for rows, step, num_warps in itertools.product(sizes, sizes, search.WARPS):
        if WARP_ROWS[0] * num_warps <= rows <= WARP_ROWS[1] * num_warps:
            yield from (Tiling(rows, step, num_warps, num_stages) for num_stages in search.STAGES)


def bound(ir: GradientsOf) -> float:
    """The largest relative error of a gradient: that of the forward pass."""
    return search.bound(ir.forward)


def inputs(ir: GradientsOf, device: torch.device) -> tuple[Any, ...]:
    """What `gradients.run` takes after the launcher: a normal gradient of the output, the inputs of the forward pass
    and what it keeps."""
    q, k, v, key_mask, grid = search.inputs(ir.forward, device)
    z, lse = untraced(lambda: launch_with_lse(q, k, v, key_mask, **ir.forward.options()))()
    generator = torch.Generator(device).manual_seed(1)
    dz = torch.randn(z.shape, device=device, dtype=z.dtype, generator=generator)
    return dz, q, k, v, key_mask, z, lse, grid


def expected(ir: GradientsOf, given: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """dq, dk and dv of the float64 reference, from `inputs`."""
    dz, q, k, v, key_mask = given[:5]

    def of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference(q, k, v, key_mask, **ir.forward.options())

    found: tuple[Tensor, ...] = torch.func.vjp(of, *(x.double() for x in (q, k, v)))[1](dz.double())
    return found
