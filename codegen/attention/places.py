"""What the templates of kernels are told of where things lie: the prefix, the blocks, and the blocks of a window."""

from __future__ import annotations

from typing import Any

from monarch_compile.attention.blocking import along_axes, steps_to_neighbours
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.codegen.attention.cache import row_blocks_of

MAX_WINDOW_KEYS = 2**30
"""Positions in a sequence are 32-bit numbers in the kernels, sums with a window included."""


def ends_of(ir: MonarchAttention) -> dict[str, Any]:
    """The prefix, where it lies (leads: before the blocks), and the names of lengths, of where blocks end, and of how
    many hold queries; cached: whether keys of a cache come before the queries."""
    q_len, k_len = ("seq_len_q", "seq_len_k") if ir.is_cross or ir.follows_cache else ("seq_len",) * 2
    at_end = ir.form.prefix_at_end
    return {
        "prefix": ir.form.prefix,
        "leads": ir.form.prefix > 0 and not at_end,
        "prefix_at_end": at_end,
        "q_len": q_len,
        "q_end": f"({q_len} - PREFIX)" if at_end else q_len,
        "cached": ir.follows_cache,
        "row_blocks": row_blocks_of(ir),
        "k_end": f"({k_len} - PREFIX)" if at_end else k_len,
    }


def axes_of(ir: MonarchAttention) -> dict[str, Any]:
    """The axes of the tiles that blocks are, and the names of what is known along them; axes: 0 where there is none.

    windows: for each axis the tiles of a window on each side of a row's own; window_names: the same for a comment.
    steps_before: for each axis how many steps a plus has along the axes before it.
    """
    axes, names = range(len(ir.form.tile or ())), tuple(windows_of(ir))
    per_axis = len(names) > 1
    return {
        "axes": len(axes),
        "causal": ir.is_causal,
        "window_shape": ir.form.window_shape,
        "windows": names if per_axis else names * len(axes),
        "window_names": f"{', '.join(names):<10}",
        "steps_before": tuple(
            f"2 * ({' + '.join(('0', *names[:axis]))})" if per_axis else f"{axis} * 2 * WINDOW" for axis in axes
        ),
        "window_per_axis": per_axis,
        "counts": tuple(f"counts_{axis}" for axis in axes),
        "extents": tuple(f"EXTENT_{axis}" for axis in axes),
        "corners": tuple(f"corner_{axis}" for axis in axes),
        "from_corner": tuple(f"from_{axis}" for axis in axes),
    }


def windows_of(ir: MonarchAttention) -> dict[str, int]:
    """The blocks on each side of a row's own that are in its window, by the name that they have in a kernel.

    One name for all axes of a grid, once, where they are as many along each; a name for each axis else.
    """
    window, axes, most = ir.form.window or 0, len(ir.form.tile or ()), MAX_WINDOW_KEYS // ir.form.block_size
    if isinstance(window, int):
        return {"WINDOW": min(window, most)}
    return {f"WINDOW_{axis}": min(reach, most) for axis, reach in enumerate(along_axes(window, axes))}


def keys_of_neighbours(ir: MonarchAttention, apart: bool) -> int:
    """Keys of the tiles in a window, without the tile itself where its keys are met `apart`, as in stage 1."""
    form = ir.form
    if form.tile is None or form.window is None:
        return 0
    tiles = len(steps_to_neighbours(form.window, form.window_shape, len(form.tile))) - apart
    return tiles * form.block_size
