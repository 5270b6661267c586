"""Monarch attention on its kernels: from tensors to the IR of a launcher, and the launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.blocking import count_tiles
from monarch_compile.attention.form import Form
from monarch_compile.attention.groups import centred, cut
from monarch_compile.attention.ir import MaskKind, MonarchAttention, begins_after_prefix, count_blocks, is_exact
from monarch_compile.codegen.attention.cache import sizes_after_cache
from monarch_compile.codegen.attention.roles import shares_prefix
from monarch_compile.codegen.attention.rows import exact_rows
from monarch_compile.codegen.attention.schedule import WORD
from monarch_compile.codegen.attention.specialization import is_known_to_be
from monarch_compile.codegen.launcher import Launcher, build, capability_of, on_device
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.codegen.tiling import padded
from monarch_compile.errors import CodegenError
from monarch_compile.ir import DTYPE_NAMES

MOST_BLOCKS = 1024
"""Schedules look no further than this number of blocks, so that few launchers serve all long sequences."""

MOST_ROWS = 128
"""Nor further than this number of queries in a block: no tile has more rows. Also what an unknown number is."""


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    *,
    scale: float,
    grid: Sequence[Any] | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Monarch attention by the emitted kernels; the meaning and the shapes are those of `reference.reference`.

    options: those of `Form`.

    q, k, v and key_mask are read through their strides, but for tensors whose features are not side by side in memory:
    see `with_adjacent_features`. Sizes may be symbolic. Works eagerly, under fake tensors and
    inside `torch.library.triton_op`, and on CPU tensors when TRITON_INTERPRET=1.

    Raises:
        CodegenError: no kernel exists for this dtype, head size or device, or triton is not installed.
    """
    form = form_of(causal=causal, **options)
    if is_exact(k.shape[2] if causal else q.shape[2], k.shape[2], form.block_size, form.prefix):
        cached = k.shape[2] - q.shape[2] if causal and q.shape[2] != k.shape[2] else 0
        rows = exact_rows(q, k, v, key_mask, scale, causal=causal, cached=cached)
        return rows.transpose(1, 2).contiguous().transpose(1, 2)
    ir, key_mask = site(q, k, v, key_mask, form, scale, grid, causal=causal)
    launcher = build(ir, capability_of(q.device), is_interpreted())
    with on_device(q):
        return run(launcher, q, k, v, key_mask, grid)


def site(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    form: Form,
    scale: float,
    grid: Sequence[Any] | None,
    *,
    causal: bool = False,
) -> tuple[MonarchAttention, Tensor | None]:
    """The bucketed IR of a call, and its mask as kernels read it."""
    num_blocks = _num_blocks(k, form, grid)
    blocks = _bucket(num_blocks) if isinstance(num_blocks, int) else None
    rows = None
    if q.shape[2] != k.shape[2]:
        rows = _bucket_after_cache(q.shape[2], form) if causal else _bucket_of_rows(_rows(q, num_blocks))
    mask = MaskKind.NONE
    if key_mask is not None:
        mask = MaskKind.KEY_BIAS if key_mask.is_floating_point() else MaskKind.KEY_PADDING
        key_mask = centred(key_mask) if mask is MaskKind.KEY_BIAS else key_mask
    group = 1 if q.shape[1] == k.shape[1] else int(q.shape[1] // k.shape[1])
    ir = _bucket_ir(int(q.shape[3]), int(v.shape[3]), q.dtype, form, scale, mask, group, blocks, rows, causal)
    return ir, key_mask


def run(
    launcher: Launcher, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, grid: Sequence[Any] | None = None
) -> Tensor:
    """q (E, H, N_q, D), k (E, H_kv, N_k, D), v (E, H_kv, N_k, D_v) -> (E, H, N_q, D_v), laid out (E, N_q, H, D_v).

    grid: sizes of the axes that the tokens outside of the prefix flatten, where the form has a tile.

    Raises:
        CodegenError: the schedule is for fewer blocks.
    """
    return outputs(launcher, q, k, v, key_mask, grid)[0].transpose(1, 2)


def outputs(
    launcher: Launcher, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, grid: Sequence[Any] | None
) -> tuple[Tensor, ...]:
    """What the launcher's program gives: first the output, (E, N_q, H, D_v).

    Raises:
        CodegenError: the schedule is for fewer blocks.
    """
    form, sizes = launcher.ir.form, sizes_of(launcher.ir, launcher.schedule.most_blocks, q, k, grid)
    q, k, v = with_adjacent_features(q, k, v)
    tensors = {"q": q, "k": k, "v": v}
    if key_mask is not None:
        tensors["key_mask"] = key_mask
    if form.prefix and not shares_prefix(launcher.ir, launcher.schedule):
        tensors["rows"] = _rows_of_prefix(launcher.ir, q, k, v, key_mask)
    return launcher(tensors, sizes)


def _rows_of_prefix(ir: MonarchAttention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """The exact rows of the prefix, (E, H, P, D_v); after a cache those that are left, then some of no meaning."""
    prefix = ir.form.prefix
    if not ir.follows_cache:
        of_prefix, _ = cut(q, 2, prefix, ir.form.prefix_at_end)
        return exact_rows(of_prefix, k, v, key_mask, ir.scale, causal=ir.is_causal)
    if begins_after_prefix(q.shape[2], k.shape[2], prefix):
        return q.new_empty(1, 1, 1, v.shape[3])  # which nothing reads
    cached = k.shape[2] - q.shape[2]
    q, k, v = (torch.ops.aten.slice.Tensor(x, 2, 0, prefix) for x in (q, k, v))
    key_mask = None if key_mask is None else torch.ops.aten.slice.Tensor(key_mask, 1, 0, prefix)
    return exact_rows(q, k, v, key_mask, ir.scale, causal=True, cached=cached)


def with_adjacent_features(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors whose features, the last dim, are side by side in memory; those of another layout are copied.

    A product of 32 keys that were loaded along the sequence, as these would be, gave wrong numbers on an H100 with
    Triton 3.6; 64 keys at a time were right. `tiling.feature_tiles` has what is known of the cause.
    tests/attention/kernel/test_gpu.py has the cases.
    """
    return tuple(x if is_known_to_be(x.stride(-1), 1) else x.contiguous() for x in tensors)


def sizes_of(
    ir: MonarchAttention, most: int | None, q: Tensor, k: Tensor, grid: Sequence[Any] | None
) -> dict[str, Any]:
    """The sizes that kernels, buffers and grids of a launch of `ir` name; they may be symbolic.

    most: the most blocks that the schedule is for; None where any number will do.

    Raises:
        CodegenError: the schedule is for fewer blocks.
    """
    num_blocks = _num_blocks(k, ir.form, grid)
    if most is not None and not (isinstance(num_blocks, int) and num_blocks <= most):
        raise CodegenError(f"these kernels are for at most {most} blocks; found {num_blocks}")
    batch, num_heads, seq_len_q, _ = q.shape
    block_q = _rows(q, num_blocks) if ir.is_cross else ir.form.block_size
    heads, lengths = (batch, num_heads, k.shape[1]), (seq_len_q, k.shape[2])
    return _named_sizes(ir, heads, lengths, (num_blocks, block_q), grid)


def sizes_of_ir(ir: MonarchAttention, hints: Mapping[str, int]) -> dict[str, Any]:
    """The same of an IR, where `hints` has a value for each symbolic size.

    Raises:
        KeyError: a size has no value.
    """
    names = ("batch", "num_heads", "num_kv_heads", "seq_len_q", "seq_len_k")
    dims = {name: getattr(ir, name) for name in names}
    values: dict[str, Any] = {name: hints[size] for name, size in dims.items() if isinstance(size, str)}
    if ir.grid is not None:
        values["grid"] = tuple(size if isinstance(size, int) else hints[size] for size in ir.grid)
    known = ir.changed(**values)
    heads, lengths = (known.batch, known.num_heads, known.num_kv_heads), (known.seq_len_q, known.seq_len_k)
    return _named_sizes(ir, heads, lengths, (known.num_blocks, known.block_size_q), known.grid)


def _named_sizes(
    ir: MonarchAttention,
    heads: tuple[Any, Any, Any],
    lengths: tuple[Any, Any],
    blocks: tuple[Any, Any],
    grid: Sequence[Any] | None,
) -> dict[str, Any]:
    """heads: the batch, heads of queries, of keys. lengths: of queries, of keys. blocks: how many, queries in each."""
    batch, num_heads, num_kv_heads = heads
    num_blocks, block_q = blocks
    seq_len_q, seq_len_k = lengths
    sizes = {
        "batch": batch,
        "heads": batch * num_heads,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "key_heads": batch * num_kv_heads,
        "num_blocks": num_blocks,
        "num_words": (num_blocks + WORD - 1) // WORD,
        "block_q": block_q,
        "seq_len": seq_len_q,
        "seq_len_q": seq_len_q,
        "seq_len_k": seq_len_k,
    }
    form = ir.form
    if ir.follows_cache:
        sizes |= sizes_after_cache(form, seq_len_q, seq_len_k, num_blocks)
    if form.tile is not None and grid is not None:
        sizes |= {f"grid_{axis}": size for axis, size in enumerate(grid)}
        sizes |= {f"counts_{axis}": count for axis, count in enumerate(count_tiles(grid, form.tile))}
    return sizes


def bucketed(ir: MonarchAttention) -> MonarchAttention:
    """`ir` as its launcher is made for it: the most blocks, and rows of them, that share its schedule.

    Batch and heads are named, and so is a length that is not known.
    """
    blocks = None if ir.num_blocks is None else _bucket(ir.num_blocks)
    rows = _bucket_of_rows(ir.block_size_q) if ir.is_cross else None
    if ir.follows_cache:
        rows = _bucket_after_cache(ir.seq_len_q, ir.form)
    heads = (ir.head_dim, ir.value_dim, ir.dtype)
    return _bucket_ir(*heads, ir.simplest, ir.scale, ir.mask, ir.group, blocks, rows, ir.is_causal)


def describe(ir: MonarchAttention) -> str:
    """What a tuned schedule depends on: heads, batch and scale are no part of it, and lengths share a bucket."""
    dims = f"{DTYPE_NAMES[ir.dtype]} dims {ir.head_dim}/{ir.value_dim} group {ir.group}"
    causal = " causal" if ir.is_causal else ""
    causal += " after a cache" if ir.follows_cache else ""
    return f"attention {dims} | {ir.form}{causal} mask {ir.mask.value}, at most {bucketed(ir).num_blocks} blocks"


@functools.lru_cache(maxsize=1024)
def form_of(*, causal: bool = False, **options: Any) -> Form:
    """Checked once: a call of eager code waits for it."""
    return Form(**options).simplest(is_causal=causal)


@functools.lru_cache(maxsize=1024)
def _bucket_ir(
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    form: Form,
    scale: float,
    mask: MaskKind,
    group: int,
    blocks: int | None,
    rows: int | None,
    is_causal: bool,
) -> MonarchAttention:
    """The IR of the most keys in `blocks` blocks, with `rows` queries to a block; None: as many as keys.

    Where it is causal, `rows` are all queries, after a cache.
    """
    seq_len_k: int | str = "N" if blocks is None else blocks * form.block_size + form.prefix
    seq_len_q = seq_len_k
    if rows is not None and isinstance(seq_len_k, int) and is_causal:
        seq_len_q = min(rows, seq_len_k - 1)
    elif rows is not None and isinstance(seq_len_k, int):
        seq_len_q = rows * -(-seq_len_k // form.block_size)
        seq_len_q -= seq_len_q == seq_len_k  # as many as keys would be another problem, whose schedules differ
    elif rows is not None:
        seq_len_q = "N_q"
    heads = "H" if group == 1 else f"{group}*H"
    grid = None if form.tile is None else tuple(f"N_{axis}" for axis in range(len(form.tile)))
    sizes = ("B", heads, "H", seq_len_q, seq_len_k, head_dim, value_dim)
    return MonarchAttention(*sizes, dtype, form=form, scale=scale, mask=mask, is_causal=is_causal, grid=grid)


def _num_blocks(k: Tensor, form: Form, grid: Sequence[Any] | None) -> Any:
    if form.tile is None or grid is None:
        return count_blocks(k.shape[2], form.block_size, form.prefix)
    return math.prod(count_tiles(grid, form.tile))


def _bucket(num_blocks: int) -> int:
    return min(MOST_BLOCKS, 1 << (max(1, num_blocks) - 1).bit_length())


def _bucket_of_rows(rows: Any) -> int:
    return min(MOST_ROWS, padded(rows)) if isinstance(rows, int) else MOST_ROWS


def _bucket_after_cache(rows: Any, form: Form) -> int:
    """The most queries after a cache that share a schedule."""
    blocks = _bucket(-(-rows // form.block_size)) if isinstance(rows, int) else MOST_BLOCKS
    return form.block_size * blocks


def _rows(q: Tensor, num_blocks: Any) -> Any:
    """Queries in a block, where they are another number than the keys in one."""
    return (q.shape[2] + num_blocks - 1) // num_blocks
