"""The program of the gradients of Monarch attention, as data: for one iteration from the identity start.

Summaries are made anew by stage 1. The kernels that follow give, in turn, the gradients of stage 2 with respect to the
queries and to the summaries, and those of stage 1 and of the exact groups with respect to the queries, and to the keys
and values. Sums over the queries that see a key are formed in one program, in the same order each time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from monarch_compile.attention.ir import SHARED_PREFIX, MaskKind, MonarchAttention
from monarch_compile.codegen.attention.gradient_schedule import GradientSchedule, without_exact_keys
from monarch_compile.codegen.attention.kernels import (
    SIZES,
    buffers_of,
    constants_of,
    kernel_of,
    strides_of,
)
from monarch_compile.codegen.attention.places import axes_of, ends_of, keys_of_neighbours
from monarch_compile.codegen.attention.roles import ONLY
from monarch_compile.codegen.attention.specialization import STRIDED_ROWS, Specialization, pitch
from monarch_compile.codegen.program import Buffer, Kernel, Program, Size, Tiles, header_of
from monarch_compile.codegen.tiling import DTYPE_BYTES, Tiling, feature_tiles

LEAD_TILE = SHARED_PREFIX
"""Places for the keys, or the queries, of a prefix: one tile of a product."""


@dataclass(frozen=True)
class BackwardRole:
    """What one kernel is to the gradients of its IR; also its template's name.

    tiling: the field of the schedule that tiles it.
    reads, writes, updates: names of its tensors, without those that masks and exact groups add.
    """

    name: str
    tiling: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    updates: tuple[str, ...] = ()

    @property
    def gives_keys(self) -> bool:
        """Whether it gives the gradients of keys."""
        return "dk" in self.writes

    @property
    def reads_keys(self) -> bool:
        """Whether it is of stage 1 and the exact groups, not of stage 2."""
        return "k" in self.reads


_STAGE_2 = ("q", "a", "y", "c", "dz", "lse")
_STAGE_1 = ("q", "k", "v", "da", "dy", "local")
_SUMMARIES = ("da", "dy", "local", "mean", "shift")

ATTEND_QUERIES = BackwardRole("attend_queries_backward", "attend", (*_STAGE_2, "z"), ("dq", "delta"))
ATTEND_SUMMARIES = BackwardRole("attend_summaries_backward", "represent", (*_STAGE_2, "delta"), _SUMMARIES)
ATTEND_ALL = BackwardRole("attend_summaries_backward", "represent", (*_STAGE_2, "z"), (*_SUMMARIES, "dq", "delta"))
QUERIES = BackwardRole("summarize_queries_backward", "queries", (*_STAGE_1, "mean"), (), ("dq",))
KEYS = BackwardRole("summarize_keys_backward", "keys", (*_STAGE_1, "shift"), ("dk", "dv"))
ALL_OF_BLOCK = BackwardRole("summarize_keys_backward", "keys", (*_STAGE_1, "mean", "shift"), ("dk", "dv"), ("dq",))

GRADIENTS = ("dq", "dk", "dv")

TILE_NAMES = {"attend": ("L", "B"), "represent": ("B", "L"), "queries": ("J", "I"), "keys": ("I", "J")}
"""Of the rows and of the steps of each tiling."""


def backward_roles(schedule: GradientSchedule) -> tuple[BackwardRole, ...]:
    """The kernels after those that make the summaries, in the order in which they are launched."""
    stage_2 = (ATTEND_ALL,) if schedule.whole else (ATTEND_QUERIES, ATTEND_SUMMARIES)
    stage_1 = (ALL_OF_BLOCK,) if schedule.fused else (QUERIES, KEYS)
    return stage_2 + stage_1


def backward_program(ir: MonarchAttention, schedule: GradientSchedule, specialization: Specialization) -> Program:
    """The kernels of the gradients of a canonical IR, and what they pass to each other.

    Its outputs are dq, dk, dv; dbias where the mask is a bias; and with a prefix, its tensors that are left to sum up.
    """
    buffers = {buffer.name: buffer for buffer in (*buffers_of(ir).values(), *_buffers(ir))}
    summarize = kernel_of(ONLY, without_exact_keys(ir), schedule.summaries, specialization, buffers)
    kernels = [_kernel(role, ir, schedule, specialization, buffers) for role in backward_roles(schedule)]
    outputs = (*GRADIENTS, *_of_bias(ir), *_of_prefix(ALL_OF_BLOCK, ir)[1])
    return Program((summarize, *kernels), outputs)


def _buffers(ir: MonarchAttention) -> tuple[Buffer, ...]:
    """Every tensor that the kernels of gradients have beside those of the forward pass."""
    head, value, dtype, f32 = ir.head_dim, ir.value_dim, ir.dtype, torch.float32
    rows: tuple[Size, ...] = ("batch", "num_heads", "seq_len_q")
    per_block: tuple[Size, ...] = ("heads", ir.form.block_size, "num_blocks")
    of_blocks: tuple[Size, ...] = ("heads", "num_blocks", ir.form.block_size)
    return (
        Buffer("z", dtype, (*rows, value), strides_of("z_batch", "z_head", "z_row", "z_dim")),
        Buffer("dz", dtype, (*rows, value), strides_of("dz_batch", "dz_head", "dz_row", "dz_dim")),
        Buffer("delta", f32, rows),
        Buffer("da", dtype, (*per_block, pitch(head))),
        Buffer("dy", dtype, (*per_block, pitch(value))),
        *(Buffer(name, f32, of_blocks) for name in ("local", "mean", "shift")),
        Buffer("dq", dtype, ("batch", "seq_len_q", "num_heads", head)),
        Buffer("dk", dtype, ("batch", "seq_len_k", "num_kv_heads", head)),
        Buffer("dv", dtype, ("batch", "seq_len_k", "num_kv_heads", value)),
        Buffer("dbias", f32, ("batch", "num_kv_heads", "seq_len_k")),
        Buffer("delta_of_prefix", f32, ("batch", "num_heads", ir.form.prefix)),
        *(Buffer(name, dtype, (*rows, LEAD_TILE)) for name in ("prefix_weights", "prefix_dscores")),
        Buffer("prefix_rows", dtype, ("batch", "num_heads", LEAD_TILE, "seq_len_k")),
    )


def _kernel(
    role: BackwardRole,
    ir: MonarchAttention,
    schedule: GradientSchedule,
    specialization: Specialization,
    buffers: dict[str, Buffer],
) -> Kernel:
    tiling: Tiling = getattr(schedule, role.tiling)
    near, prefix = _exact(role, ir), _of_prefix(role, ir)
    mask = ("key_mask",) if role.reads_keys and ir.mask is not MaskKind.NONE else ()
    reads = tuple(buffers[name] for name in (*role.reads, *near, *mask, *prefix[0]))
    writes = (*role.writes, *(_of_bias(ir) if role.gives_keys else ()), *prefix[1])
    aligned = [name for x in reads if x.name in STRIDED_ROWS for name, dim in x.strides if dim < len(x.dims) - 1]
    variables = {
        **_choices(ir, schedule),
        **_masks(role, ir, tiling, specialization),
        **asdict(specialization),
        "strides_of_multiples": tuple(aligned) if specialization.stride_multiple > 1 else (),
    }
    return Kernel(
        family="attention",
        name=f"monarch_{role.name}",
        template=f"{role.name}.py.jinja",
        reads=reads,
        writes=tuple(buffers[name] for name in writes),
        updates=tuple(buffers[name] for name in role.updates),
        sizes=SIZES,
        constants=tuple(_constants(role, ir, tiling, specialization).items()),
        variables=tuple(variables.items()),
        grid=_grid(role, ir, schedule, tiling),
        tiling=tiling,
        header=header_of(f"monarch_{role.name}", ir, schedule, specialization),
    )


def _exact(role: BackwardRole, ir: MonarchAttention) -> tuple[str, ...]:
    """What the exact groups need of the rows; the kernel of keys, where there is no window, of the prefix alone."""
    if not role.reads_keys or not ir.has_exact_keys:
        return ()
    of_rest = ir.form.window is not None or "dq" in role.updates
    return ("dz", "lse", "delta") if of_rest else ("dz", "lse")


def _of_bias(ir: MonarchAttention) -> tuple[str, ...]:
    return ("dbias",) if ir.mask is MaskKind.KEY_BIAS else ()


def _of_prefix(role: BackwardRole, ir: MonarchAttention) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a kernel reads and writes for a prefix."""
    if not ir.form.prefix or not role.reads_keys:
        return (), ()
    of_keys = ("prefix_weights", "prefix_dscores") if "dq" in role.updates else ()
    return (("delta_of_prefix",), (*of_keys, "prefix_rows")) if role.gives_keys else ((), of_keys)


def _grid(
    role: BackwardRole, ir: MonarchAttention, schedule: GradientSchedule, tiling: Tiling
) -> tuple[Size | Tiles, ...]:
    block = ir.form.block_size
    if role.reads_keys:
        return "key_heads" if role.gives_keys else "heads", "num_blocks", Tiles(block, tiling.rows)
    return ("heads", block) if schedule.whole else ("heads", block, Tiles("num_blocks", tiling.rows))


def _choices(ir: MonarchAttention, schedule: GradientSchedule) -> dict[str, Any]:
    """What decides which text a template gives, besides masks."""
    return {
        **axes_of(ir),
        "values": True,
        "summarizes": True,
        "near": ir.has_exact_keys,
        "whole": schedule.whole,
        "fused": schedule.fused,
        "dot_precision": schedule.dot_precision if DTYPE_BYTES[ir.dtype] == 4 else "",
        "window": ir.form.window,
        "group": ir.group,
        "q_block": "BLOCK",
        **ends_of(ir),
    }


def _constants(
    role: BackwardRole, ir: MonarchAttention, tiling: Tiling, specialization: Specialization
) -> dict[str, Any]:
    rows, steps = TILE_NAMES[role.tiling]
    tiles = {f"TILE_{rows}": tiling.rows, f"TILE_{steps}": tiling.step}
    tiles |= {f"TILES_{rows}": -(-ir.form.block_size // tiling.rows), "TILE_P": LEAD_TILE}
    return constants_of(ir, specialization, tiles, keys_of_neighbours(ir, apart=True))


def _masks(role: BackwardRole, ir: MonarchAttention, tiling: Tiling, specialization: Specialization) -> dict[str, Any]:
    """Where masks are needed at all: the names of those that are, "" for those that are not."""
    head, value, block = ir.head_dim, ir.value_dim, ir.form.block_size
    head_tile, value_tile = feature_tiles(head, value, ir.dtype)
    partial_block, partial_tile = specialization.partial_block, specialization.partial_tile
    rows, step = (tiling.step, tiling.rows) if role.gives_keys else (tiling.rows, tiling.step)
    ragged_j, ragged_i = block % rows != 0, block % step != 0
    partial_rows = ragged_j if role.reads_keys else partial_tile
    masked = ir.mask is not MaskKind.NONE
    inside = "is_key" if ragged_i or partial_block else ""
    return {
        "masked": masked,
        "biased": ir.mask is MaskKind.KEY_BIAS,
        "pre": ir.form.pad == "pre" and partial_block,
        "hides": masked or bool(inside),
        "ragged_j": ragged_j,
        "ragged_i": ragged_i,
        "several_tiles_j": block > rows,
        "several_tiles_i": block > step,
        "in_block": "in_block" if ragged_j else "",
        "real_mask": "is_real" if partial_rows or partial_block else "",
        "inside_mask": inside,
        "near_masked": partial_block or block % tiling.step != 0 or ir.form.tile is not None,
        "near_tile": "TILE_J" if role.gives_keys else "TILE_I",
        "block_mask": "is_block" if partial_tile else "",
        "head_mask": "is_head" if head_tile != head else "",
        "head_stored_mask": "is_head_stored" if head_tile != pitch(head) else "",
        "value_mask": "is_value" if value_tile != value else "",
        "value_stored_mask": "is_value_stored" if value_tile != pitch(value) else "",
    }
