"""What exact and Monarch attention cost, and which of them to run: FLOPs and bytes, a device, a predicted time.

The counts are derived: `STAGES` lists the matrix products of one Monarch iteration with the tensors that cross a
kernel's border (arXiv 2505.18698, section 3), and sympy sums them. Times are a roofline with the rates of a `Device`.
Everything here is a pure function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import sympy
import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import SHARED_PREFIX, MonarchAttention
from monarch_compile.calls import DEVICE_ALONE, Calls
from monarch_compile.cost.devices import WIDE, Device, Host
from monarch_compile.cost.prediction import Cost, Prediction, Quantity
from monarch_compile.errors import InputError
from monarch_compile.ir import Dim

WHOLE_TILE = 128
"""The most blocks, or offsets of a block, that the kernels cover in one tile, a power of two."""

LEAST_OFFSETS = 64
"""Fewer queries of a block take no less time in stage 1: they do not fill the tensor cores."""

LEAST_FEATURES = 32
"""Nor do fewer features of a head."""

E, H, H_KV, N_Q, N_K, M, B_Q, B_K, D, D_V, ITEM, T, TILE = sympy.symbols(
    "E H H_kv N_q N_k M B_q B_k D D_v e T tile", positive=True, integer=True
)
X, G, P = sympy.symbols("X G P", nonnegative=True, integer=True)
_SYMBOLS = (E, H, H_KV, N_Q, N_K, M, B_Q, B_K, D, D_V, ITEM, T, X, G, P, TILE)
# X: exact keys of a row beyond those that stage 1 scores anyway. G: 1 where there are exact groups, else 0.
# P: rows that are exact throughout.


class Stage(NamedTuple):
    """One group of equal matrix products of an iteration.

    kernel: stages with one name share a kernel, so what passes between them stays on chip.
    when: "every" iteration, the "last" one only, every one "before" the last, or "once" beside the iterations.
    count, matmul: how many products there are per head, and their (rows, contraction, columns).
    moves: tensors (keys of `TENSORS`) that the stage reads from or writes to memory.
    softmax: whether the product's elements pass through a softmax.
    """

    name: str
    kernel: str
    when: str
    count: Quantity
    matmul: tuple[Quantity, Quantity, Quantity]
    moves: tuple[str, ...]
    softmax: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("scores", "blocks", "every", M, (B_Q, D, B_K), ("qhat", "k"), softmax=True),
    Stage("a", "blocks", "every", M, (B_Q, B_K, D), ("k", "a", "c")),
    Stage("y", "blocks", "last", M, (B_Q, B_K, D_V), ("v", "y")),
    Stage("logits", "offsets", "every", B_Q, (M, D, M), ("q", "a", "c"), softmax=True),
    Stage("next qhat", "offsets", "before", B_Q, (M, M, D), ("q", "qhat")),
    Stage("z", "offsets", "last", B_Q, (M, M, D_V), ("y", "z", "near")),
    Stage("near scores", "blocks", "last", M, (B_Q, D, X), (), softmax=True),
    Stage("near values", "blocks", "last", M, (B_Q, X, D_V), ("near",)),
    Stage("exact rows", "rows", "once", 1, (P, D, N_K), ("k",), softmax=True),
    Stage("exact rows' values", "rows", "once", 1, (P, N_K, D_V), ("v",)),
)

TENSORS: dict[str, Quantity] = {
    "q": H * N_Q * D * ITEM,
    "k": H_KV * N_K * D * ITEM,
    "v": H_KV * N_K * D_V * ITEM,
    "z": H * N_Q * D_V * ITEM,
    "qhat": H * N_Q * D * ITEM,
    "a": H * M * B_Q * D * ITEM,
    "y": H * M * B_Q * D_V * ITEM,
    "c": H * M * B_Q * 4,
    "near": G * H * N_Q * (D_V * ITEM + 4),
}
"""Bytes of each tensor for one batch element; `c` and the logsumexps of `near` are kept in float32."""


def exact_cost(ir: MonarchAttention) -> Cost:
    """Cost of exact attention at the site of `ir`, as one fused kernel: each tensor crosses memory once."""
    return _symbolic_or_counted(ir)[0]


def exact_cost_of_shapes(
    q_shape: tuple[Dim, ...], k_shape: tuple[Dim, ...], v_shape: tuple[Dim, ...], dtype: torch.dtype
) -> Cost:
    """Cost of exact attention between tensors (batch, heads, seq_len, dim): for sites that have no IR."""
    (batch, heads, rows, dim), (_, kv_heads, keys, _), value_dim = q_shape, k_shape, v_shape[3]
    sizes = (batch, heads, kv_heads, rows, keys, dim, value_dim, dtype.itemsize)
    return _evaluated(exact_formula(), (E, H, H_KV, N_Q, N_K, D, D_V, ITEM), sizes)


def monarch_cost(ir: MonarchAttention) -> Cost:
    """Cost of the Monarch form of `ir`, two kernels an iteration, padding to whole blocks and exact rows included."""
    return _symbolic_or_counted(ir)[1]


@lru_cache(maxsize=1)
def exact_formula() -> Cost:
    """Exact attention in the symbols of this module: q k^T, a softmax and the product with v."""
    products = 2 * H * N_Q * N_K * (D + D_V)
    moved = sum(TENSORS[name] for name in ("q", "k", "v", "z"))
    return Cost(E * products, E * moved, E * H * N_Q * N_K)


@lru_cache(maxsize=2)
def monarch_formula(tiled: bool = False) -> Cost:
    """The Monarch form in the symbols of this module, without exact rows: T iterations, the last gives the output.

    With `tiled`, blocks, offsets, exact keys and features of the products are what tiles cover of them, nearly.
    """
    flops, exps = _work({"every": T, "last": 1, "before": T - 1}, _whole_tiles if tiled else tuple)
    moved = _moved("every", "last") + (T - 1) * _moved("every", "before")
    return Cost(*(E * total for total in (flops, moved, exps)))


@lru_cache(maxsize=1)
def rows_formula() -> Cost:
    """The exact rows of a prefix, which one more kernel computes, in the symbols of this module."""
    flops, exps = _work({"once": 1}, tuple)
    moved = sympy.Min(P, 1) * _moved("once")  # no row, no kernel
    return Cost(*(E * total for total in (flops, moved, exps)))


def predict(
    ir: MonarchAttention, device: Device, hints: Mapping[str, int] | None = None, calls: Calls = DEVICE_ALONE
) -> Prediction:
    """Predicted times of the site of `ir` on `device`; `hints` gives a value for each symbolic size.

    Raises:
        InputError: a size is symbolic and has no hint.
    """
    sizes = _numbers(ir, hints or {})
    counts = _Counts(*_compiled()(*sizes, device.tile))
    exact_s, monarch_s = _forward(counts, sizes, device, ir)
    host = device.host(calls.launcher)
    if host is not None:
        monarch_s *= host.near_work if ir.form.has_exact_keys else host.work
    if calls.trains:
        exact_back_s, monarch_back_s = _backward(counts, device, ir)
        exact_s += exact_back_s
        monarch_s += monarch_back_s * (host.back_work if host is not None else 1.0)
    if host is None:
        return Prediction(exact_s, monarch_s)
    ahead = _ahead(sizes, device, host, ir.dtype, calls)
    exact_host_s, monarch_host_s = _launching(host, device, ir, calls.trains)
    return Prediction(max(exact_s, exact_host_s - ahead), max(monarch_s, monarch_host_s - ahead))


def _work(repeats: Mapping[str, Quantity], shape: Callable[[Any], Any]) -> tuple[Quantity, Quantity]:
    """FLOPs and softmax elements of a batch element, of the stages of these iterations."""
    stages = [(repeats[s.when], s) for s in STAGES if s.when in repeats]
    flops = sum(times * 2 * math.prod((H, s.count, *shape(s.matmul))) for times, s in stages)
    return flops, sum(times * H * s.count * s.matmul[0] * s.matmul[2] for times, s in stages if s.softmax)


def _whole_tiles(shape: tuple[Quantity, ...]) -> tuple[Quantity, ...]:
    kinds = dict.fromkeys((M, B_Q, B_K), _BLOCKS) | dict.fromkeys((D, D_V), _FEATURES)
    kinds[X] = lambda size, tile: _BLOCKS(size - P, tile) + _PREFIX(P, tile)
    tiled = tuple(kinds[size](size, TILE) if size in kinds else size for size in shape)
    return _OFFSETS(tiled[0], TILE) if shape[0] == B_Q else tiled[0], *tiled[1:]


_BLOCKS, _PREFIX, _OFFSETS, _FEATURES = map(sympy.Function, ("in_blocks", "in_prefix", "in_offsets", "in_features"))


def _in_blocks(size: int, tile: int) -> int:
    """What tiles cover of `size` blocks or offsets: one tile up to `WHOLE_TILE`, then steps of half of it."""
    step = WHOLE_TILE // 2
    if tile == 1 or size == 0:
        return size
    return _power(size, tile) if size <= WHOLE_TILE else -(-size // step) * step


def _in_prefix(size: int, tile: int) -> int:
    """What tiles cover of the keys of a prefix, which have tiles of their own."""
    return int(_ceil_div(size, tile) * tile)


def _in_offsets(size: int, tile: int) -> int:
    """What tiles cover of `size` offsets of queries, in the products of stage 1."""
    return size if tile == 1 or size == 0 else max(size, LEAST_OFFSETS)


def _in_features(size: int, tile: int) -> int:
    """What tiles cover of `size` features: they are never cut."""
    return size if tile == 1 else _power(size, LEAST_FEATURES)


def _power(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())


def _moved(*when: str) -> Quantity:
    """Bytes of the tensors that cross the border of each kernel, of the stages of some iterations."""
    crossing = {(s.kernel, name) for s in STAGES if s.when in when for name in s.moves}
    return sum(TENSORS[name] for _, name in sorted(crossing))


def _sizes(ir: MonarchAttention, value: Callable[[Dim], Quantity]) -> tuple[Quantity, ...]:
    """Values of the symbols E .. P for `ir`, where `value` turns a size into a number or an expression."""
    rows, keys = value(ir.seq_len_q), value(ir.seq_len_k)
    after_rows, after = (_after(ir.form.prefix, n) for n in (rows, keys))
    blocks = _ceil_div(after, ir.form.block_size) if ir.form.tile is None or ir.num_blocks is None else ir.num_blocks
    block_rows = _ceil_div(after_rows, blocks) if ir.is_cross else ir.form.block_size
    heads = (value(ir.batch), value(ir.num_heads), value(ir.num_kv_heads))
    fixed = (ir.head_dim, ir.value_dim, ir.dtype.itemsize, ir.form.num_iters)
    groups = _group_sizes(ir.form.simplest().one_axis(), rows, keys)
    return (*heads, rows, keys, blocks, block_rows, ir.form.block_size, *fixed, *groups)


def _group_sizes(form: Form, rows: Quantity, keys: Quantity) -> tuple[Quantity, Quantity, Quantity]:
    """X, G and P. One iteration from the identity start scores a row's own block anyway."""
    near: Quantity = 0
    if form.window is not None:
        after = _after(form.prefix, keys)
        near = _least((2 * form.window + 1) * form.block_size, after)
        if form.weighs_own_block_exactly:
            near = near - _least(form.block_size, after)
    prefix = _least(form.prefix, keys)
    return near + prefix, int(form.has_exact_keys), _least(form.prefix, rows)


def _after(prefix: int, size: Quantity) -> Quantity:
    """How many of `size` follow the prefix, and one where none does: there is always a block."""
    if not prefix:
        return size
    return max(size - prefix, 1) if isinstance(size, int) else sympy.Max(size - prefix, 1)


def _least(a: int, b: Quantity) -> Quantity:
    return min(a, b) if isinstance(b, int) else sympy.Min(a, b)


def _ceil_div(a: Quantity, b: Quantity) -> Quantity:
    return -(-a // b) if isinstance(a, int) and isinstance(b, int) else sympy.ceiling(a / b)


def _symbolic_or_counted(ir: MonarchAttention) -> tuple[Cost, Cost]:
    """(exact, Monarch) cost of `ir`; plain arithmetic where every size is a number, which is far faster."""
    sizes = _sizes(ir, _symbolic)
    if all(isinstance(size, int) for size in sizes):
        counts = _compiled()(*sizes, 1)
        return Cost(*counts[:3]), _sum(Cost(*counts[3:6]), Cost(*counts[6:]))
    formulas = exact_formula(), _sum(monarch_formula(), rows_formula())
    exact, monarch = (_evaluated(formula, _SYMBOLS, sizes) for formula in formulas)
    return exact, monarch


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(a.flops + b.flops, a.bytes + b.bytes, a.exps + b.exps)


def _symbolic(size: Quantity) -> Quantity:
    return sympy.Symbol(size, positive=True, integer=True) if isinstance(size, str) else size


def _evaluated(formula: Cost, symbols: Sequence[Quantity], sizes: Sequence[Quantity]) -> Cost:
    values = dict(zip(symbols, map(_symbolic, sizes), strict=False))
    exprs = (sympy.sympify(x).subs(values, simultaneous=True) for x in (formula.flops, formula.bytes, formula.exps))
    return Cost(*(int(x) if x.is_number else x for x in exprs))


def _numbers(ir: MonarchAttention, hints: Mapping[str, int]) -> tuple[int, ...]:
    def number(dim: Dim) -> int:
        if isinstance(dim, int):
            return dim
        if dim not in hints:
            raise InputError(f"size {dim!r} is symbolic and has no hint; hints are {dict(hints)}; found {ir}")
        return hints[dim]

    return _sizes(ir, number)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[int, ...]]:
    costs = exact_formula(), monarch_formula(tiled=True), rows_formula()
    exprs = [x for cost in costs for x in (cost.flops, cost.bytes, cost.exps)]
    source = f"lambda {', '.join(map(str, _SYMBOLS))}: {exprs}"  # what sympy.lambdify does, in a fifth of its time
    tiles = {"in_blocks": _in_blocks, "in_prefix": _in_prefix, "in_offsets": _in_offsets, "in_features": _in_features}
    compiled: Callable[..., tuple[int, ...]] = eval(source, tiles | {"Min": min})
    return compiled


class _Counts(NamedTuple):
    """What both forms compute and move; `rows`: the exact rows of a prefix, `tiled`: as tiles have it."""

    exact_flops: int
    exact_bytes: int
    exact_exps: int
    tiled_flops: int
    bytes: int
    exps: int
    rows_flops: int
    rows_bytes: int
    rows_exps: int


def _forward(counts: _Counts, sizes: tuple[int, ...], device: Device, ir: MonarchAttention) -> tuple[float, float]:
    """Seconds of the device for the exact and the Monarch form; `sizes` are those of `_sizes`."""
    keys, blocks, block_keys, exact_rows = sizes[4], sizes[5], sizes[7], sizes[-1]
    gain = device.wide_gain if sizes[8] >= WIDE and ir.dtype.itemsize == 2 else 1.0

    def exactly(flops: int, moved: int) -> float:
        return device.exact.launch_s + device.seconds(device.exact, flops / gain, moved, 0, ir.dtype)

    padding = device.pad_penalty if blocks * block_keys != keys - exact_rows else 1.0
    work_s = device.seconds(device.monarch, counts.tiled_flops, counts.bytes, counts.exps, ir.dtype) * padding
    rows_s = exactly(counts.rows_flops, counts.rows_bytes) if exact_rows else 0.0
    launch_s = device.monarch.launch_s * _kernels(device, ir)
    return exactly(counts.exact_flops, counts.exact_bytes), launch_s + work_s + rows_s


def _shares_prefix(device: Device, ir: MonarchAttention) -> bool:
    """Whether a prefix's exact rows take no launch of their own: on CUDA, where the blocks' kernels compute them.

    Near to `codegen.attention.kernels.shares_prefix`, for the block sizes that a shipped stage 1 takes in one step.
    """
    form = ir.form
    fits = 0 < form.prefix <= SHARED_PREFIX and WHOLE_TILE // 4 < form.block_size <= WHOLE_TILE // 2
    return device.kind == "cuda" and fits and form.weighs_own_block_exactly


def _kernels(device: Device, ir: MonarchAttention) -> int:
    """Monarch kernels of a site; the mean queries are one of their own."""
    return device.kernels_per_iter * ir.form.num_iters + (ir.form.init == "mean")


def _backward(counts: _Counts, device: Device, ir: MonarchAttention) -> tuple[float, float]:
    """Seconds of the device for the backward passes of the exact and the Monarch form."""
    gain = device.wide_gain if max(ir.head_dim, ir.value_dim) >= WIDE and ir.dtype.itemsize == 2 else 1.0
    rows_s = device.exact_back.seconds(counts.rows_flops / gain, 0, 0, ir.dtype) if counts.rows_flops else 0.0
    monarch_s = device.monarch_back.seconds(
        counts.tiled_flops, counts.bytes / ir.dtype.itemsize, counts.exps, ir.dtype, ir.form.has_exact_keys
    )
    return device.exact_back.seconds(counts.exact_flops / gain, 0, 0, ir.dtype), rows_s + monarch_s


def _ahead(sizes: tuple[int, ...], device: Device, host: Host, dtype: torch.dtype, calls: Calls) -> float:
    """Seconds by which, without the site, the host is ahead of the device; below 0, the device waits for it."""
    passes = 3 if calls.trains else 1  # a backward pass has two products for each of the forward
    dense_s = calls.dense_flops * sizes[0] * sizes[3] / device.dense.of(dtype)
    call_s = host.call_s + (host.call_back_s if calls.trains else 0.0)
    return passes * (dense_s - calls.dense_ops * host.dense_s) - calls.share * call_s


def _launching(host: Host, device: Device, ir: MonarchAttention, trains: bool) -> tuple[float, float]:
    """Seconds of the host for the exact and the Monarch form."""
    exact_s, monarch_s = host.exact_s, host.site_s + host.kernel_s * _kernels(device, ir)
    if ir.form.prefix and not _shares_prefix(device, ir):
        monarch_s += host.rows_s
    if trains:
        exact_s += host.exact_back_s
        monarch_s += host.monarch_back_s * (host.near if ir.form.has_exact_keys else 1.0)
    return exact_s, monarch_s
