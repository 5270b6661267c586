"""The program of Monarch attention: its kernels and the buffers between them, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from typing import Any

import torch

from monarch_compile.attention.form import MAX_AXES
from monarch_compile.attention.groups import HIDDEN
from monarch_compile.attention.ir import SHARED_PREFIX, MaskKind, MonarchAttention
from monarch_compile.codegen.attention.cache import SIZES_AFTER_CACHE, row_blocks_of
from monarch_compile.codegen.attention.places import axes_of, ends_of, keys_of_neighbours, windows_of
from monarch_compile.codegen.attention.roles import (
    ATTEND_WITH_LSE,
    FAR,
    FUSED,
    MEAN,
    PREFIX_SHARES,
    Role,
    roles,
    shares_prefix,
)
from monarch_compile.codegen.attention.schedule import WORD, Schedule
from monarch_compile.codegen.attention.specialization import MAX_POSITION, STRIDED_ROWS, Specialization, pitch
from monarch_compile.codegen.program import Buffer, Kernel, Program, Size, Tiles, header_of
from monarch_compile.codegen.tiling import ALL, DTYPE_BYTES, Tiling, feature_tiles, padded

COPIED_ROWS = SHARED_PREFIX
"""Rows of the prefix that a program has at once: enough that each thread loads several numbers side by side."""
WARPGROUP, WARPGROUP_ROWS = 4, 64
"""Warps and rows of the widest matrix instruction of Hopper: it is faster with rows of zeros than the narrow one."""
CHOICE_STEP = 1024
"""Masses that are looked at at once where blocks are chosen."""
JOINED_SHARES = 64
"""Blocks whose shares of a row of the prefix stage 2 joins at once."""
LEAST_SCALE = 2.0**-126
"""The least scale that commutes with the largest score: a smaller one may be 0 in float32."""

GRID_SIZES = tuple(f"{name}_{axis}" for name in ("grid", "counts") for axis in range(MAX_AXES))
"""Tokens along each axis of a grid, and tiles along each."""
_LENGTHS = ("num_heads", "seq_len", "seq_len_q", "seq_len_k", "num_blocks", "num_words", "block_q")
SIZES = (*_LENGTHS, *GRID_SIZES, *SIZES_AFTER_CACHE)
"""What a kernel may be told at run time; it takes what it reads. seq_len: where queries are as many as keys. block_q:
queries in a block, where they are not. num_words: that hold a bit for each block."""


def canonical(ir: MonarchAttention) -> MonarchAttention:
    """`ir` with the sizes that kernels take at run time replaced by their names."""
    heads = "H" if ir.group == 1 else f"{ir.group}*H"
    rows, keys = ("N_q", "N_k") if ir.is_cross or ir.follows_cache else ("N", "N")
    grid = None if ir.form.tile is None else tuple(f"N_{axis}" for axis in range(len(ir.form.tile)))
    named = replace(ir, batch="B", num_heads=heads, num_kv_heads="H", seq_len_q=rows, seq_len_k=keys, grid=grid)
    return replace(named, form=ir.simplest)


def program(ir: MonarchAttention, schedule: Schedule, specialization: Specialization) -> Program:
    """The kernels of a canonical IR, and what they pass to each other."""
    return _program(roles(ir, schedule), ir, schedule, specialization)


def program_with_lse(ir: MonarchAttention, schedule: Schedule, specialization: Specialization) -> Program:
    """The same, whose last kernel also writes `lse`, which gradients are computed from: of no row of the prefix."""
    return _program((*roles(ir, schedule)[:-1], ATTEND_WITH_LSE), ir, schedule, specialization)


def program_of_summaries(ir: MonarchAttention, schedule: Schedule, specialization: Specialization) -> Program:
    """Stage 1 of one iteration from the identity start: summaries, and the exact groups if there are any."""
    of_groups = ("near", "z") if ir.has_exact_keys else ()
    found = _program(roles(ir, schedule)[:-1], ir, schedule, specialization)
    return replace(found, outputs=("a", "y", "c", *of_groups))


def program_of_far_field(ir: MonarchAttention, schedule: Schedule, specialization: Specialization) -> Program:
    """Stage 2 of summaries that are given, without the exact groups: mean values of the far field, and its lse."""
    return _program((FAR,), ir, schedule, specialization)


def _program(
    sequence: tuple[Role, ...], ir: MonarchAttention, schedule: Schedule, specialization: Specialization
) -> Program:
    buffers, kernels = buffers_of(ir), []
    one, each = (replace(buffers["qhat"], dims=_dims_of_qhat(ir, count)) for count in (1, "num_blocks"))
    for role in sequence:
        if "qhat" in role.writes:
            buffers["qhat"] = one if role is MEAN else each
        kernels.append(kernel_of(role, ir, schedule, specialization, buffers))
    return Program(tuple(kernels), sequence[-1].writes)


def rows_of(ir: MonarchAttention) -> Size:
    """Queries in a block; a size of the launch where they are not as many as keys."""
    return "block_q" if ir.is_cross else ir.form.block_size


def _dims_of_qhat(ir: MonarchAttention, count: Size) -> tuple[Size, ...]:
    return "heads", rows_of(ir), count, pitch(ir.head_dim)


def buffers_of(ir: MonarchAttention) -> dict[str, Buffer]:
    """Every tensor that a kernel may read or write, by the name of its parameter. "heads" are those of all batches."""
    head, value, dtype, f32 = ir.head_dim, ir.value_dim, ir.dtype, torch.float32
    row_blocks = row_blocks_of(ir)
    per_row: tuple[Size, ...] = ("heads", rows_of(ir), row_blocks)
    per_block: tuple[Size, ...] = ("heads", "num_summaries") if ir.follows_cache else per_row
    mask_dtype = f32 if ir.mask is MaskKind.KEY_BIAS else torch.bool  # a bias is centred in float32
    found = (
        Buffer(
            "q", dtype, ("batch", "num_heads", "seq_len_q", head), strides_of("q_batch", "q_head", "q_row", "q_dim")
        ),
        Buffer(
            "k", dtype, ("batch", "num_kv_heads", "seq_len_k", head), strides_of("k_batch", "k_head", "k_row", "k_dim")
        ),
        Buffer(
            "v", dtype, ("batch", "num_kv_heads", "seq_len_k", value), strides_of("v_batch", "v_head", "v_row", "v_dim")
        ),
        Buffer("key_mask", mask_dtype, ("batch", "seq_len_k"), strides_of("mask_batch", "mask_row")),
        Buffer(
            "rows",
            dtype,
            ("batch", "num_heads", ir.form.prefix, value),
            strides_of("rows_batch", "rows_head", "rows_row", "rows_dim"),
        ),
        Buffer("z", dtype, ("batch", "seq_len_q", "num_heads", value)),
        Buffer("lse", f32, ("batch", "num_heads", "seq_len_q")),
        Buffer("prefix_sum", f32, ("heads", ir.form.prefix, "num_blocks", pitch(value))),
        Buffer("prefix_total", f32, ("heads", ir.form.prefix, "num_blocks")),
        Buffer("prefix_top", f32, ("heads", ir.form.prefix, "num_blocks")),
        Buffer("a", dtype, (*per_block, pitch(head))),
        Buffer("y", dtype, (*per_block, pitch(value))),
        Buffer("c", f32, per_block),
        Buffer("near", f32, per_row),
        Buffer("neg_lse", f32, per_row),
        Buffer("masses", f32, ("heads", row_blocks, "num_blocks")),
        Buffer("taken", torch.int32, ("heads", row_blocks, ir.form.chosen)),
        Buffer("left", torch.int64, ("heads", row_blocks, "num_words")),
        Buffer(
            "qhat",
            dtype,
            _dims_of_qhat(ir, "num_blocks"),
            (("qhat_head", 0), ("qhat_block", 2), ("qhat_offset", 1)),
        ),
    )
    return {buffer.name: buffer for buffer in found}


def strides_of(*parameters: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, dim) for dim, name in enumerate(parameters))


def kernel_of(
    role: Role, ir: MonarchAttention, schedule: Schedule, specialization: Specialization, buffers: dict[str, Buffer]
) -> Kernel:
    tiling: Tiling = getattr(schedule, role.tiling) or schedule.summarize
    template = role.template
    if role.summarizes:
        template += "_whole" if ir.form.block_size <= tiling.step else "_stream"
    updates = ("z",) if role.far and role.values and ir.has_exact_keys else ()
    shared = shares_prefix(ir, schedule)
    reads = tuple(buffers[name] for name in _reads(role, ir, shared))
    written = (*role.writes, *(PREFIX_SHARES if shared and role is FUSED else ()))
    aligned = [name for x in reads if x.name in STRIDED_ROWS for name, dim in x.strides if dim < len(x.dims) - 1]
    variables = {
        **_choices(role, ir, schedule, tiling, specialization),
        **_masks(role, ir, tiling, specialization),
        **asdict(specialization),
        "strides_of_multiples": tuple(aligned) if specialization.stride_multiple > 1 else (),
    }
    return Kernel(
        family="attention",
        name=role.name,
        template=f"{template}.py.jinja",
        reads=reads,
        writes=tuple(buffers[name] for name in written if name not in updates),
        updates=tuple(buffers[name] for name in updates),
        sizes=SIZES,
        constants=tuple(_constants(role, ir, schedule, tiling, specialization).items()),
        variables=tuple(variables.items()),
        grid=("heads", *_grid(role, tiling, rows_of(ir), row_blocks_of(ir))),
        tiling=tiling,
        header=header_of(role.name, ir, schedule, specialization),
    )


def _reads(role: Role, ir: MonarchAttention, shared: bool) -> tuple[str, ...]:
    mask = ("key_mask",) if role.reads_keys and ir.mask is not MaskKind.NONE else ()
    near = ("near",) if weighs_exact_groups(role, ir) else ()
    listed = {"exact": ("taken",), "attend": ("left",)}.get(role.template, ()) if ir.form.chosen else ()
    rows = (PREFIX_SHARES if shared else ("rows",)) if near and role.values and ir.form.prefix else ()
    return (*role.reads, *mask, *near, *(() if role.choosing else listed), *rows)


def weighs_exact_groups(role: Role, ir: MonarchAttention) -> bool:
    """Whether a kernel weighs the far field against the exact groups, of which there are some."""
    return role.far and not role.choosing and ir.has_exact_keys


def _grid(role: Role, tiling: Tiling, rows: Size, row_blocks: str) -> tuple[Size | Tiles, ...]:
    """Programs of a head."""
    if role.reads_keys:
        blocks = "num_blocks" if role.summarizes else row_blocks
        return (blocks,) if tiling.turns == ALL else (blocks, Tiles(rows, tiling.rows))
    if role.template == "masses":
        return Tiles(row_blocks, tiling.rows), Tiles("num_blocks", tiling.step)
    if role.template == "choose":
        return (row_blocks,)
    if role.template in ("mean_query", "exchange") or tiling.turns == ALL:
        return (rows,)
    return Tiles(rows, tiling.turns), Tiles(row_blocks, tiling.rows)


def _choices(
    role: Role, ir: MonarchAttention, schedule: Schedule, tiling: Tiling, specialization: Specialization
) -> dict[str, Any]:
    """What decides which text a template gives, every field of the schedule that is no tiling among it."""
    tiled, steps_of_near = {"near", *(name for name, _ in schedule.tilings())}, (schedule.near or tiling).step
    names = {"q_block": "BLOCK", "tiles": "TILES_J"}
    if ir.is_cross:
        names = {"q_block": "block_q", "tiles": "tiles"}
    return {
        **{field.name: getattr(schedule, field.name) for field in fields(schedule) if field.name not in tiled},
        "values": role.values,
        "writes_lse": "lse" in role.writes,
        "from_sequence": "qhat" not in role.reads,
        "dot_precision": schedule.dot_precision if DTYPE_BYTES[ir.dtype] == 4 else "",
        "summarizes": role.summarizes,
        "near": role.near or weighs_exact_groups(role, ir),
        "choosing": role.choosing,
        "chosen": ir.form.chosen,
        "plain": ir.mask is MaskKind.NONE and ir.scale * math.log2(math.e) >= LEAST_SCALE,
        "near_aligned": not (specialization.partial_block or ir.form.block_size % steps_of_near),
        "listed_aligned": ir.form.block_size % steps_of_near == 0,
        "ragged_near": keys_of_neighbours(ir, role.summarizes) % steps_of_near != 0,
        **axes_of(ir),
        "shares_prefix": shares_prefix(ir, schedule),
        "writes_prefix": shares_prefix(ir, schedule) and role is FUSED,
        "several_tiles": tiling.turns != ALL and ir.form.block_size > tiling.rows,
        "resident": tiling.turns == ALL,
        "walks": tiling.turns > 1,
        "window": ir.form.window,
        "group": ir.group,
        "cross": ir.is_cross,
        **names,
        **ends_of(ir),
    }


def _constants(
    role: Role, ir: MonarchAttention, schedule: Schedule, tiling: Tiling, specialization: Specialization
) -> dict[str, Any]:
    """What may stand as a literal at the top of a kernel; its text uses some."""
    near, block, prefix = schedule.near or schedule.summarize, ir.form.block_size, ir.form.prefix
    tiles = {"TILE_L": tiling.step}
    if role.reads_keys:
        tiles = {"TILE_J": tiling.rows, "TILE_I": tiling.step, "TILES_J": -(-block // tiling.rows)}
        widens = ir.dtype.itemsize == 2 and tiling.num_warps % WARPGROUP == 0
        tiles |= {"TILE_R": WARPGROUP_ROWS if widens else COPIED_ROWS}
        tiles |= {"TILE_N": near.step, "TILE_P": min(near.step, padded(prefix))}
    elif role.template == "represent":
        tiles = {"TILE_B": tiling.rows, "TILE_L": tiling.step}
    elif role.template == "attend":
        tiles = {"TILE_L": tiling.rows, "TILE_B": tiling.step, "TURNS": tiling.turns, "TILE_R": COPIED_ROWS}
        tiles["TILE_S"] = JOINED_SHARES
    elif role.template == "masses":
        tiles = {"TILE_L": tiling.rows, "TILE_B": tiling.step}
    elif role.template == "choose":
        tiles = {"TILE_B": CHOICE_STEP, "TILE_W": CHOICE_STEP // WORD}
    elif role.template == "exchange":
        tiles = {"TILE": tiling.rows}
    return constants_of(ir, specialization, tiles, keys_of_neighbours(ir, role.summarizes))


def constants_of(
    ir: MonarchAttention, specialization: Specialization, tiles: dict[str, int], keys_near: int
) -> dict[str, Any]:
    """What may stand as a literal at the top of a kernel, whose tiles and `keys_of_neighbours` these are."""
    block = ir.form.block_size
    dims: dict[str, Any] = {"BLOCK": block, "GROUP": ir.group, "STRIDE_MULTIPLE": specialization.stride_multiple}
    head_tile, value_tile = feature_tiles(ir.head_dim, ir.value_dim, ir.dtype)
    for name, size, tile in (("HEAD", ir.head_dim, head_tile), ("VALUE", ir.value_dim, value_tile)):
        dims |= {f"{name}_DIM": size, f"{name}_TILE": tile, f"{name}_PITCH": pitch(size)}
    dims |= {f"EXTENT_{axis}": extent for axis, extent in enumerate(ir.form.tile or ())}
    dims |= {"NEIGHBOURS": keys_near // block, "CHOSEN": ir.form.chosen, "WORD": WORD}
    dims |= {**windows_of(ir), "PREFIX": min(ir.form.prefix, MAX_POSITION)}
    return {
        **dims,
        **tiles,
        "SCALE": repr(ir.scale * math.log2(math.e)),
        "NATURAL_SCALE": repr(ir.scale),
        "LOG2E": math.log2(math.e),
        "LN2": math.log(2.0),
        "HIDDEN": HIDDEN,
    }


def _masks(role: Role, ir: MonarchAttention, tiling: Tiling, specialization: Specialization) -> dict[str, Any]:
    """Where masks are needed at all: the names of those that are, "" for those that are not."""
    head, value, partial_block = ir.head_dim, ir.value_dim, specialization.partial_block
    head_tile, value_tile = feature_tiles(head, value, ir.dtype)
    masked, stores = ir.mask is not MaskKind.NONE, role.template != "exact"
    ragged_j = ir.is_cross or ir.follows_cache or ir.form.block_size % tiling.rows != 0
    ragged_i = ir.form.block_size % tiling.step != 0
    partial_rows = ragged_j if role.reads_keys else specialization.partial_tile or ir.follows_cache
    inside = "is_key" if ragged_i or partial_block else ""
    return {
        "masked": masked,
        "biased": ir.mask is MaskKind.KEY_BIAS,
        "pre": ir.form.pad == "pre" and partial_block,
        "ragged_j": ragged_j,
        "ragged_i": ragged_i,
        "in_block": "in_block" if ragged_j else "",
        "real_mask": "is_real" if partial_rows or partial_block else "",
        "inside_mask": inside,
        "hides": bool(masked or inside),
        "block_mask": "is_block" if specialization.partial_tile else "",
        "head_mask": "is_head" if head_tile != head else "",
        "head_stored_mask": "is_head_stored" if stores and head_tile != pitch(head) else "",
        "value_mask": "is_value" if value_tile != value else "",
        "value_stored_mask": "is_value_stored" if stores and value_tile != pitch(value) else "",
    }
