"""IR and Schedule to Triton source: one readable file per kernel, a function of nothing else."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from monarch_compile.codegen.facts import MAX_POSITION, UNKNOWN, Facts
from monarch_compile.codegen.schedule import (
    ALL,
    DTYPE_BYTES,
    Schedule,
    Tiling,
    can_fuse,
    check_schedule,
    check_supported,
    padded,
)
from monarch_compile.codegen.source import KernelSource
from monarch_compile.groups import HIDDEN
from monarch_compile.ir import MaskKind, MonarchAttention
from monarch_compile.version import __version__

PITCH_MULTIPLE = 16
"""Rows of the intermediates are padded to this many elements, so that they load as whole aligned vectors."""
COPIED_ROWS = 16
"""Rows of the prefix that a program copies at once: enough that each thread loads several numbers side by side."""
MAX_WINDOW_KEYS = 2**30
"""Positions in a sequence are 32-bit numbers in the kernels, sums with a window included."""

SIZES = ("num_heads", "seq_len", "seq_len_q", "seq_len_k", "num_blocks", "block_q")
"""What a kernel may be told at run time; it takes what it reads. seq_len: where queries are as many as keys. block_q:
queries in a block, where they are not."""
STRIDES = {
    "q": ("q_batch", "q_head", "q_row", "q_dim"),
    "k": ("k_batch", "k_head", "k_row", "k_dim"),
    "v": ("v_batch", "v_head", "v_row", "v_dim"),
    "key_mask": ("mask_batch", "mask_row"),
    "qhat": ("qhat_head", "qhat_block", "qhat_offset"),
    "rows": ("rows_batch", "rows_head", "rows_row", "rows_dim"),
}
"""A tensor's strides as kernel parameters; a tensor without an entry is laid out by us."""
OUTER = ("q", "k", "v", "rows")
"""Tensors of rows that are laid out by others: `Facts.apart` is of their strides but the last."""


@dataclass(frozen=True)
class Role:
    """What one kernel is to its IR.

    tensors: its tensor parameters, in order, without those that masks and exact groups add.
    values: whether it also carries values.
    from_sequence: whether stage 1 reads its queries from the sequence itself or from `qhat`.
    near: whether it computes the exact groups.
    """

    name: str
    template: str
    tensors: tuple[str, ...]
    values: bool = False
    from_sequence: bool = True
    near: bool = False


LEAST_SCALE = 2.0**-126
"""The least scale that commutes with the largest score: a smaller one may be 0 in float32."""

FAR_FIELD = ("attend", "exchange")
"""Templates of kernels that weigh the far field against the exact groups."""

MEAN = Role("monarch_mean_query", "mean_query", ("q", "qhat"))
ONLY = Role("monarch_summarize", "summarize", ("q", "k", "v", "a", "y", "c"), values=True)
FUSED = Role("monarch_summarize_near", "summarize", ("q", "k", "v", "a", "y", "c", "near", "z"), values=True, near=True)
FIRST = Role("monarch_summarize_first", "summarize", ("q", "k", "a", "c"))
NEXT = Role("monarch_summarize_next", "summarize", ("qhat", "k", "a", "c"), from_sequence=False)
LAST = Role("monarch_summarize_last", "summarize", ("qhat", "k", "v", "a", "y", "c"), values=True, from_sequence=False)
EXACT = Role("monarch_exact", "exact", ("q", "k", "v", "near", "z"), values=True, near=True)
WEIGH = Role("monarch_weigh", "attend", ("q", "a", "c", "unlog"))
REPRESENT = Role("monarch_represent", "represent", ("q", "a", "unlog", "qhat"))
EXCHANGE = Role("monarch_exchange", "exchange", ("q", "a", "c", "qhat"))
ATTEND = Role("monarch_attend", "attend", ("q", "a", "y", "c", "z"), values=True)


def steps(ir: MonarchAttention, schedule: Schedule) -> tuple[Role, ...]:
    """The kernels of one attention, in the order in which they are launched (a role may repeat)."""
    near, identity = ir.form.has_exact_keys, ir.form.init == "identity"
    fused = near and schedule.fused and can_fuse(ir)
    sequence = [EXACT] if near and not fused else []
    if not identity:
        sequence.append(MEAN)
    for step in range(ir.form.num_iters - 1):
        sequence.append(FIRST if identity and step == 0 else NEXT)
        sequence += [EXCHANGE] if schedule.exchange else [WEIGH, REPRESENT]
    last = FUSED if fused else ONLY if identity and ir.form.num_iters == 1 else LAST
    return (*sequence, last, ATTEND)


def canonical(ir: MonarchAttention) -> MonarchAttention:
    """`ir` with the sizes that kernels take at run time replaced by their names."""
    heads = "H" if ir.group == 1 else f"{ir.group}*H"
    rows, keys = ("N_q", "N_k") if ir.is_cross else ("N", "N")
    return replace(ir, batch="B", num_heads=heads, num_kv_heads="H", seq_len_q=rows, seq_len_k=keys)


def emit(ir: MonarchAttention, schedule: Schedule, facts: Facts = UNKNOWN) -> tuple[KernelSource, ...]:
    """The kernels of `ir` under `schedule`, each once, in the order in which they are first launched.

    The text does not depend on batch, num_heads or seq_len, but for what `facts` tells of them.

    Raises:
        CodegenError: `ir` is outside what kernels exist for, or `schedule` outside what it allows.
    """
    check_supported(ir)
    check_schedule(schedule, ir)
    return tuple(_emit(role, canonical(ir), schedule, facts) for role in dict.fromkeys(steps(ir, schedule)))


def pitch(size: int) -> int:
    """Elements from one row of an intermediate to the next."""
    return -(-size // PITCH_MULTIPLE) * PITCH_MULTIPLE


def _emit(role: Role, ir: MonarchAttention, schedule: Schedule, facts: Facts) -> KernelSource:
    tiling = role_tiling(role, schedule)
    template = role.template
    if template == "summarize":
        template += "_whole" if ir.form.block_size <= tiling.step else "_stream"
    unmasked = ir.mask is MaskKind.NONE and ir.scale * math.log2(math.e) >= LEAST_SCALE
    render = functools.partial(
        _environment().get_template(f"{template}.py.jinja").render,
        name=role.name,
        header=_header(role, ir, schedule, facts),
        values=role.values,
        from_sequence=role.from_sequence,
        dot_precision=schedule.dot_precision if DTYPE_BYTES[ir.dtype] == 4 else "",
        summarizes=role.template == "summarize",
        near=role.near or (role.template in FAR_FIELD and ir.form.has_exact_keys),
        plain=unmasked,
        near_aligned=not (facts.cut or ir.form.block_size % (schedule.near or tiling).step),
        resident=tiling.turns == ALL,
        walks=tiling.turns > 1,
        num_stages=tiling.num_stages,
        window=ir.form.window,
        prefix=ir.form.prefix,
        group=ir.group,
        cross=ir.is_cross,
        **_names(ir),
        whole=schedule.whole,
        **asdict(facts),
        **_masks(role, ir, tiling, facts),
    )
    strides = tuple(_strides(role, ir))
    outer = [name for x in OUTER for name in STRIDES[x][:-1] if STRIDES[x] in strides]
    render = functools.partial(render, strides_apart=outer if facts.apart > 1 else [])
    used = set(re.findall(r"\w+", render(constants={}, parameter_groups=()).partition("@triton.jit")[2]))
    constants = {name: value for name, value in _constants(role, ir, schedule, facts).items() if name in used}
    groups = (_tensors(role, ir), *strides, tuple(size for size in SIZES if size in used))
    text = render(constants=constants, parameter_groups=groups)
    return KernelSource(role.name, text, tuple(name for group in groups for name in group))


def _names(ir: MonarchAttention) -> dict[str, str]:
    """How the text calls the lengths, the queries in a block, and the tiles of these."""
    if ir.is_cross:
        return {"q_len": "seq_len_q", "k_len": "seq_len_k", "q_block": "block_q", "tiles": "tiles"}
    return {"q_len": "seq_len", "k_len": "seq_len", "q_block": "BLOCK", "tiles": "TILES_J"}


def role_tiling(role: Role, schedule: Schedule) -> Tiling:
    """The tiling of a role's kernel."""
    tilings = {
        "summarize": schedule.summarize,
        "exact": schedule.near or schedule.summarize,
        "attend": schedule.attend,
    }
    return tilings.get(role.template, schedule.represent)


def _header(role: Role, ir: MonarchAttention, schedule: Schedule, facts: Facts) -> str:
    return "\n".join(
        (
            f"# {role.name}: generated by monarch_compile {__version__}; do not edit.",
            f"# ir: {ir}",
            f"# schedule: {schedule}",
            f"# facts: {facts}",
        )
    )


def _strides(role: Role, ir: MonarchAttention) -> Iterator[tuple[str, ...]]:
    """The strides of each tensor parameter that has them."""
    for tensor in _tensors(role, ir):
        if tensor in STRIDES and not (tensor == "qhat" and role.from_sequence):
            yield STRIDES[tensor]


def _tensors(role: Role, ir: MonarchAttention) -> tuple[str, ...]:
    """Inputs first, then what is written."""
    added: tuple[str, ...] = ()
    if role.template in FAR_FIELD and ir.form.has_exact_keys:
        added = ("near", "rows") if ir.form.prefix and role.values else ("near",)
        place = len(role.tensors) - 1
    elif "k" in role.tensors and ir.mask is not MaskKind.NONE:
        added = ("key_mask",)
        place = role.tensors.index("near" if role is EXACT else "a")
    return (*role.tensors[:place], *added, *role.tensors[place:]) if added else role.tensors


def _constants(role: Role, ir: MonarchAttention, schedule: Schedule, facts: Facts) -> dict[str, Any]:
    """What may stand as a literal at the top of a kernel; its text uses some."""
    tiling, near = role_tiling(role, schedule), schedule.near or schedule.summarize
    dims: dict[str, Any] = {"BLOCK": ir.form.block_size, "GROUP": ir.group, "APART": facts.apart}
    for name, size in (("HEAD", ir.head_dim), ("VALUE", ir.value_dim)):
        dims |= {f"{name}_DIM": size, f"{name}_TILE": padded(size), f"{name}_PITCH": pitch(size)}
    window, prefix = ir.form.window or 0, ir.form.prefix
    dims |= {"WINDOW": min(window, MAX_WINDOW_KEYS // ir.form.block_size), "PREFIX": min(prefix, MAX_POSITION)}
    tiles = {"TILE_L": tiling.step}
    if role.template in ("summarize", "exact"):
        tiles = {"TILE_J": tiling.rows, "TILE_I": tiling.step, "TILES_J": -(-ir.form.block_size // tiling.rows)}
        tiles |= {"TILE_N": near.step, "TILE_P": min(near.step, padded(prefix))}
    elif role.template == "represent":
        tiles = {"TILE_B": tiling.rows, "TILE_L": tiling.step}
    elif role.template == "attend":
        tiles = {"TILE_L": tiling.rows, "TILE_B": tiling.step, "TURNS": tiling.turns, "TILE_R": COPIED_ROWS}
    elif role.template == "exchange":
        tiles = {"TILE": tiling.rows}
    return {**dims, **tiles, "SCALE": repr(ir.scale * math.log2(math.e)), "LOG2E": math.log2(math.e), "HIDDEN": HIDDEN}


def _masks(role: Role, ir: MonarchAttention, tiling: Tiling, facts: Facts) -> dict[str, Any]:
    """Where masks are needed at all: the names of those that are, "" for those that are not."""
    head, value = ir.head_dim, ir.value_dim
    masked, stores = ir.mask is not MaskKind.NONE, role.template != "exact"
    ragged_j = ir.is_cross or ir.form.block_size % tiling.rows != 0
    ragged_i = ir.form.block_size % tiling.step != 0
    partial = ragged_j if role.template in ("summarize", "exact") else facts.rest
    inside = "is_key" if ragged_i or facts.cut else ""
    return {
        "masked": masked,
        "biased": ir.mask is MaskKind.KEY_BIAS,
        "pre": ir.form.pad == "pre" and facts.cut,
        "ragged_j": ragged_j,
        "ragged_i": ragged_i,
        "in_block": "in_block" if ragged_j else "",
        "real_mask": "is_real" if partial or facts.cut else "",
        "inside_mask": inside,
        "hides": bool(masked or inside),
        "block_mask": "is_block" if facts.rest else "",
        "head_mask": "is_head" if padded(head) != head else "",
        "head_stored_mask": "is_head_stored" if stores and padded(head) != pitch(head) else "",
        "value_mask": "is_value" if padded(value) != value else "",
        "value_stored_mask": "is_value_stored" if stores and padded(value) != pitch(value) else "",
    }


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
