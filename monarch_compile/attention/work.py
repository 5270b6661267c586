"""What exact and Monarch attention cost, and which of them to run: FLOPs and bytes, a device, a predicted time.

The counts are those of `stages`. Times are a roofline with the rates of a `Device`. Everything here is a pure
function of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy
import torch

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import SHARED_PREFIX, MonarchAttention, differentiated_by_kernels
from monarch_compile.attention.stages import BACKWARD_KERNELS, WHOLE_TILE, Sizes, Work, ceil_div, least, work_of
from monarch_compile.calls import DEVICE_ALONE, Calls
from monarch_compile.cost.devices import LONG_BLOCK, SHORT_BLOCK, WIDE, Device, Host
from monarch_compile.cost.prediction import Cost, Prediction, Quantity
from monarch_compile.errors import InputError
from monarch_compile.ir import Dim

LISTED_ON_CPU = 1.6
"""How much longer than counted attention with listed keys takes on a CPU, which gathers them: 1.58 times at 4096 keys
(8 heads of 64, blocks of 64, 4 chosen, float32; one thread of a busy machine with AVX-512)."""


def exact_cost(ir: MonarchAttention) -> Cost:
    """Cost of exact attention at the site of `ir`, as one fused kernel: each tensor crosses memory once."""
    return _triangle(ir, _plain(_work(ir).exact))


def exact_cost_of_shapes(
    q_shape: tuple[Dim, ...], k_shape: tuple[Dim, ...], v_shape: tuple[Dim, ...], dtype: torch.dtype
) -> Cost:
    """Cost of exact attention between tensors (batch, heads, seq_len, dim): for sites that have no IR."""
    (batch, num_heads, rows, dim), (_, kv_heads, keys, _), value_dim = q_shape, k_shape, v_shape[3]
    heads = (_symbolic(batch), _symbolic(num_heads), _symbolic(kv_heads))
    features = (_symbolic(dim), _symbolic(value_dim), dtype.itemsize)
    sizes = Sizes(*heads, _symbolic(rows), _symbolic(keys), 1, 1, 1, 1, *features, T=1, C=0, X=0, G=0, P=0)
    return _plain(work_of(sizes).exact)


def monarch_cost(ir: MonarchAttention) -> Cost:
    """Cost of the Monarch form of `ir`, two kernels an iteration, padding to whole blocks and exact rows included."""
    work = _work(ir)
    return _plain(_sum(work.monarch, work.rows))


def exact_backward_cost(ir: MonarchAttention) -> Cost:
    """Cost of the backward pass of exact attention at the site of `ir`, as fused kernels."""
    return _plain(_work(ir).exact_backward)


def backward_cost(ir: MonarchAttention) -> Cost:
    """Cost of the backward pass of the Monarch form of `ir` by kernels, that of exact rows aside."""
    return _plain(_work(ir).monarch_backward)


def predict(
    ir: MonarchAttention, device: Device, hints: Mapping[str, int] | None = None, calls: Calls = DEVICE_ALONE
) -> Prediction:
    """Predicted times of the site of `ir` on `device`; `hints` gives a value for each symbolic size.

    Raises:
        InputError: a size is symbolic and has no hint.
    """
    sizes = _numbers(ir, hints or {})
    work = work_of(sizes, device.tile)
    exact_s, monarch_s = _forward(work, sizes, device, ir)
    if device.kind == "cpu" and ir.lists_exact_keys:
        monarch_s *= LISTED_ON_CPU
    host = device.host(calls.launcher)
    if host is not None:
        monarch_s *= host.near_work if ir.has_exact_keys else host.work
    if calls.trains:
        exact_back_s, monarch_back_s = _backward(work, device, ir)
        exact_s += exact_back_s
        vjp = host is not None and not _has_backward_kernels(device, ir)
        monarch_s += monarch_back_s * (host.back_work if host is not None and vjp else 1.0)
    if host is None:
        return Prediction(exact_s, monarch_s)
    ahead = _ahead(sizes, device, host, ir.dtype, calls)
    exact_host_s, monarch_host_s = _launching(host, device, ir, calls.trains)
    return Prediction(max(exact_s, exact_host_s - ahead), max(monarch_s, monarch_host_s - ahead))


def _sizes(ir: MonarchAttention, value: Callable[[Dim], Quantity]) -> Sizes:
    """The sizes of `ir`, where `value` turns a size into a number or an expression."""
    rows, keys = value(ir.seq_len_q), value(ir.seq_len_k)
    after_rows, after = (_after(ir.form.prefix, n) for n in (rows, keys))
    blocks = ceil_div(after, ir.form.block_size) if ir.form.tile is None or ir.num_blocks is None else ir.num_blocks
    block_rows = ceil_div(after_rows, blocks) if ir.is_cross else ir.form.block_size
    heads = (value(ir.batch), value(ir.num_heads), value(ir.num_kv_heads))
    fixed = (ir.head_dim, ir.value_dim, ir.dtype.itemsize, ir.form.num_iters, int(ir.form.chosen > 0))
    row_blocks = least(ceil_div(rows, ir.form.block_size), blocks) if ir.follows_cache else blocks
    groups = _group_sizes(ir.simplest.one_axis(), rows, keys, ir.is_causal)
    return Sizes(*heads, rows, keys, blocks, row_blocks, block_rows, ir.form.block_size, *fixed, *groups)


def _group_sizes(form: Form, rows: Quantity, keys: Quantity, is_causal: bool) -> tuple[Quantity, Quantity, Quantity]:
    """X, G and P. One iteration from the identity start scores a row's own block anyway, unless exact keys are listed.

    In causal attention, windows have one side, and the rows of a prefix see no key beyond it.
    """
    near: Quantity = 0
    if isinstance(form.window, int):  # of pieces
        after, listed = _after(form.prefix, keys), is_causal or form.chosen > 0
        blocks = (1 if is_causal else 2) * form.window + 1 + form.chosen
        near = least(blocks * form.block_size, after)
        if form.weighs_own_block_exactly and not listed:
            near = near - least(form.block_size, after)
    prefix = least(form.prefix, keys)
    return near + prefix, int(form.has_exact_keys), 0 if is_causal else least(form.prefix, rows)


def _after(prefix: int, size: Quantity) -> Quantity:
    """How many of `size` follow the prefix, and one where none does: there is always a block."""
    if not prefix:
        return size
    return max(size - prefix, 1) if isinstance(size, int) else sympy.Max(size - prefix, 1)


def _work(ir: MonarchAttention) -> Work:
    return work_of(_sizes(ir, _symbolic))


def _triangle(ir: MonarchAttention, exact: Cost) -> Cost:
    """The cost of exact attention; where it is causal, of the keys that a query sees: on average, all but half as many
    as there are queries."""
    if not ir.is_causal:
        return exact
    rows, keys = _symbolic(ir.seq_len_q), _symbolic(ir.seq_len_k)

    def seen(of_all: Quantity) -> Quantity:
        whole = of_all * (2 * keys - rows)
        return whole // (2 * keys) if isinstance(whole, int) else sympy.cancel(whole / (2 * keys))

    return Cost(seen(exact.flops), exact.bytes, seen(exact.exps))


def _sum(a: Cost, b: Cost) -> Cost:
    return Cost(a.flops + b.flops, a.bytes + b.bytes, a.exps + b.exps)


def _symbolic(size: Quantity) -> Quantity:
    return sympy.Symbol(size, positive=True, integer=True) if isinstance(size, str) else size


def _plain(cost: Cost) -> Cost:
    """The cost with ints where nothing symbolic is left."""
    return Cost(*(x if isinstance(x, int) or not x.is_number else int(x) for x in (cost.flops, cost.bytes, cost.exps)))


def _numbers(ir: MonarchAttention, hints: Mapping[str, int]) -> Sizes:
    def number(dim: Dim) -> int:
        if isinstance(dim, int):
            return dim
        if dim not in hints:
            raise InputError(f"size {dim!r} is symbolic and has no hint; hints are {dict(hints)}; found {ir}")
        return hints[dim]

    return _sizes(ir, number)


def _forward(work: Work, sizes: Sizes, device: Device, ir: MonarchAttention) -> tuple[float, float]:
    """Seconds of the device for the exact and the Monarch form."""
    gain = device.wide_gain if sizes.D >= WIDE and ir.dtype.itemsize == 2 else 1.0

    def exactly(flops: float, moved: int) -> float:
        return device.exact.launch_s + device.seconds(device.exact, flops / gain, moved, 0, ir.dtype)

    padding = device.pad_penalty if sizes.M * sizes.B_k != sizes.N_k - sizes.P else 1.0
    form = work.monarch
    doublings = math.log2(min(max(ir.form.block_size, SHORT_BLOCK), LONG_BLOCK) / SHORT_BLOCK)
    flops = form.flops / (1 + device.block_gain * doublings * (ir.dtype.itemsize == 2))
    work_s = device.seconds(device.monarch, flops, form.bytes, form.exps, ir.dtype) * padding
    rows_s = exactly(work.rows.flops, work.rows.bytes) if sizes.P else 0.0
    launch_s = device.monarch.launch_s * _kernels(device, ir)
    seen = 1 - sizes.N_q / (2 * sizes.N_k) if ir.is_causal else 1.0  # of the keys, by a query on average
    return exactly(work.exact.flops * seen, work.exact.bytes), launch_s + work_s + rows_s


def _shares_prefix(device: Device, ir: MonarchAttention) -> bool:
    """Whether a prefix's exact rows take no launch of their own: on CUDA, where the blocks' kernels compute them.

    Near to `codegen.attention.kernels.shares_prefix`, for the block sizes that a shipped stage 1 takes in one step.
    """
    form = ir.form
    fits = 0 < form.prefix <= SHARED_PREFIX and WHOLE_TILE // 4 < form.block_size <= WHOLE_TILE // 2
    return device.kind == "cuda" and fits and form.weighs_own_block_exactly


def _kernels(device: Device, ir: MonarchAttention) -> int:
    """Monarch kernels of a site; the mean queries are one of their own, and so are listed exact keys.

    Blocks are chosen by three: of the far fields' totals, of the masses and of the largest.
    """
    listed = ir.lists_exact_keys
    return device.kernels_per_iter * ir.form.num_iters + (ir.form.init == "mean") + listed + 3 * (ir.form.chosen > 0)


def _has_backward_kernels(device: Device, ir: MonarchAttention) -> bool:
    """Whether the Monarch form's backward pass runs on kernels; else it is the vjp of the reference."""
    has_them = device.gradients is not None and ir.dtype != torch.float64
    return has_them and differentiated_by_kernels(ir.form, is_cross=ir.is_cross, is_causal=ir.is_causal)


def _backward(work: Work, device: Device, ir: MonarchAttention) -> tuple[float, float]:
    """Seconds of the device for the backward passes of the exact and the Monarch form."""
    gain = device.wide_gain if max(ir.head_dim, ir.value_dim) >= WIDE and ir.dtype.itemsize == 2 else 1.0
    rows_s = device.exact_back.seconds(work.rows.flops / gain, 0, 0, ir.dtype) if work.rows.flops else 0.0
    if device.gradients is not None and _has_backward_kernels(device, ir):
        back = work.monarch_backward
        monarch_s = device.gradients.launch_s * BACKWARD_KERNELS + device.seconds(
            device.gradients, back.flops, back.bytes, back.exps, ir.dtype
        )
    else:
        forward = work.monarch
        monarch_s = device.monarch_back.seconds(
            forward.flops, forward.bytes / ir.dtype.itemsize, forward.exps, ir.dtype, ir.has_exact_keys
        )
    return device.exact_back.seconds(work.exact.flops / gain, 0, 0, ir.dtype), rows_s + monarch_s


def _ahead(sizes: Sizes, device: Device, host: Host, dtype: torch.dtype, calls: Calls) -> float:
    """Seconds by which, without the site, the host is ahead of the device; below 0, the device waits for it."""
    passes = 3 if calls.trains else 1  # a backward pass has two products for each of the forward
    dense_s: float = calls.dense_flops * sizes.E * sizes.N_q / device.dense.of(dtype)
    call_s = host.call_s + (host.call_back_s if calls.trains else 0.0)
    return passes * (dense_s - calls.dense_ops * host.dense_s) - calls.share * call_s


def _launching(host: Host, device: Device, ir: MonarchAttention, trains: bool) -> tuple[float, float]:
    """Seconds of the host for the exact and the Monarch form."""
    exact_s, monarch_s = host.exact_s, host.site_s + host.kernel_s * _kernels(device, ir)
    if ir.form.prefix and not _shares_prefix(device, ir):
        monarch_s += host.rows_s
    if trains:
        exact_s += host.exact_back_s
        if _has_backward_kernels(device, ir):
            monarch_s += host.exact_back_s + host.kernel_s * BACKWARD_KERNELS
        else:
            monarch_s += host.monarch_back_s * (host.near if ir.has_exact_keys else 1.0)
    return exact_s, monarch_s
