"""What depends on the sequence length: the form that the options ask for, and from which length lowering pays.

Both are functions of the length and the batch alone, made of steps. A symbolic size is compared with the steps' edges,
so that Dynamo guards on a range of it: one compilation serves the range, and no answer depends on which length or batch
came first.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from monarch_compile.attention.blocking import Window
from monarch_compile.attention.form import Form
from monarch_compile.attention.grids import Grid, Size, check_window, takes_tiles, tiling_at
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.work import predict
from monarch_compile.calls import DEVICE_ALONE, REPLAYED, Calls
from monarch_compile.cost.devices import Device
from monarch_compile.errors import InputError
from monarch_compile.ir import Dim
from monarch_compile.refusal import Refusal

if TYPE_CHECKING:
    from monarch_compile.config import MonarchConfig

BLOCK_SIZES: dict[tuple[str, bool], tuple[tuple[int, int], ...]] = {
    ("cpu", False): ((1, 16), (1024, 32), (2048, 64), (16384, 128)),
    ("cpu", True): ((1, 16), (1280, 32), (6144, 64), (24576, 128)),
    ("cuda", False): ((1, 16), (320, 32), (1024, 64), (8192, 128), (65536, 256)),
    ("cuda", True): ((1, 16), (256, 32), (1024, 64), (24576, 128)),
}
"""(kind of device, whether there is a window) -> (first length, block size) of each step."""


BATCHES = (1, 4, 16, 64, 256, 1024)
"""A batch between two of these is weighed as the one that pays later; beyond the last, as the last."""

ROWS = (1, 64, 128, 256, 512, 1024)
"""Queries of another number than keys are weighed as the largest of these that is not above it."""

LENGTHS = (*range(16, 1024, 16), *range(1024, 4096, 64), *range(4096, 16384, 256), *range(16384, 65537, 1024))
"""Lengths at which lowering may begin to pay."""

LISTED_KEYS_FROM = 32768
"""The least length at which kernels of causal attention and of chosen blocks were timed beside exact attention's
(benchmarks/results/causal_h100.json)."""

CACHED_KEYS_FROM, CACHED_QUERIES_FROM = 8192, 2048
"""The same of the keys that causal queries see after a cache, and of these queries
(benchmarks/results/cached_h200.json)."""

NEVER = sys.maxsize
"""The crossover of a site that does not pay even at the last of `LENGTHS`."""


def auto_block_size(seq_len: Size, kind: str, window: Window | None = None, prefix: int = 0) -> int:
    """The block size that "auto" stands for at `seq_len` keys on a device of `kind`: a row of `BLOCK_SIZES`.

    It is the row of as many keys as follow the prefix, or the first.

    Raises:
        InputError: seq_len is below 1.
    """
    steps = BLOCK_SIZES[kind, window is not None]
    for start, block_size in reversed(steps[1:]):
        if seq_len >= start + prefix:
            return block_size
    if seq_len >= 1:
        return steps[0][1]
    raise InputError(f"seq_len must be at least 1; found {seq_len}")


def chosen_form(config: MonarchConfig, kind: str, seq_len: Size, grid: Grid | None = None) -> Form:
    """The form that the options ask for at `seq_len` keys on a grid; what is "auto" guards on a symbolic length."""
    auto: dict[str, Any] = {"window": 1, "prefix": 0, "tile": None, "window_shape": "box", "prefix_at_end": False}
    if grid is None or not takes_tiles(config, grid):
        window = "auto" if isinstance(config.window, tuple) else config.window  # along axes that pieces do not have
        pieces = replace(config, tile=None, window=window)
        window, prefix = (auto[x] if getattr(pieces, x) == "auto" else getattr(pieces, x) for x in ("window", "prefix"))
        return pieces.form(**auto, block_size=_auto_size(config, seq_len, kind, window, prefix))
    row = tiling_at(kind, len(grid.sizes), seq_len - grid.prefix)
    tile = config.tile if isinstance(config.tile, tuple) else row.tile
    check_window(config, tile)
    shape = row.window_shape if config.window == "auto" else "box"
    auto = {"window": row.window, "prefix": grid.prefix, "tile": tile, "window_shape": shape}
    auto["prefix_at_end"] = grid.prefix_at_end
    return config.form(**auto, block_size=math.prod(tile))


def _auto_size(config: MonarchConfig, seq_len: Size, kind: str, window: int | None, prefix: int) -> int:
    size = config.block_size
    return size if isinstance(size, int) else auto_block_size(seq_len, kind, window, prefix)


def exact_wins(
    ir: MonarchAttention,
    device: Device,
    *,
    auto: bool,
    batch: Size,
    seq_len: Size,
    queries: Size | None = None,
    calls: Calls = DEVICE_ALONE,
) -> str | None:
    """Why exact attention is kept at this batch and length; None where the Monarch form pays.

    ir: the site; its own batch, lengths and, with `auto`, block size do not count.
    seq_len: the number of keys. queries: that of queries, where it is another one. calls: how it is called.
    """
    rows: Dim = "N" if queries is None else next(n for n in reversed(ROWS) if queries >= n)
    auto = auto and ir.form.tile is None  # a tile is priced as it is
    site = replace(ir, batch=1, seq_len_q=rows, seq_len_k="N", form=ir.form.one_axis(), grid=None)
    if (
        isinstance(batch, int)
        and isinstance(seq_len, int)
        and seq_len >= _start(site, device, auto, _counted(batch), calls)
    ):
        return None  # plain numbers have no range to guard: the other batches need not be weighed
    starts = crossovers(site, device, auto, calls)
    wins = "exact attention wins" if queries is None else f"with {rows} or a few more queries exact attention wins"
    first, last = min(starts), max(starts)
    if first == NEVER:
        return f"{wins} at every length"
    if seq_len < first:
        return f"{wins} below {first} keys"
    if last != NEVER and seq_len >= last:
        return None
    start = starts[BATCHES.index(_counted(batch))]
    if start != NEVER and seq_len >= start:
        return None
    return wins + (f" below {start} keys" if start != NEVER else "") + " at this batch"


WHY: dict[str, str] = {
    "cost_exact_wins": "",
    "host_exact_wins": "the host, which launches the kernels, takes longer than the device",
    "backward_exact_wins": "in training, where the backward pass has to pay, too",
}
"""Codes of sites that exact attention wins, and what of their calls decides it."""


def what_decides(ir: MonarchAttention, device: Device, hints: Mapping[str, int], calls: Calls) -> str:
    """The code of a site that exact attention wins, by what would let it pay at these sizes: no guard depends on it."""

    def pays(**other: Any) -> bool:
        return predict(ir, device, hints, replace(calls, **other)).pays

    if pays():  # here it would, but not at every length and batch that is weighed with these
        return "cost_exact_wins"
    if calls.trains and (pays(trains=False) or predict(ir, device, hints).pays):
        return "backward_exact_wins"
    return "host_exact_wins" if pays(launcher=REPLAYED, share=0.0) else "cost_exact_wins"


def cost_refusal(
    ir: MonarchAttention, device: Device, hints: Mapping[str, int], note: str, *, calls: Calls, **sizes: Any
) -> Refusal | None:
    """Why a site stays exact that exact attention wins; None where the Monarch form pays.

    sizes: `auto`, `batch`, `seq_len` and `queries` of `exact_wins`. note: what the reason ends with.
    """
    if device.kind == "cuda":
        unmeasured = _unmeasured(ir, sizes["seq_len"], sizes["queries"])
        if unmeasured is not None:
            return Refusal("unmeasured_kernels", unmeasured)
    reason = exact_wins(ir, device, calls=calls, **sizes)
    if reason is None:
        return None
    code = what_decides(ir, device, hints, calls)
    return Refusal(code, "; ".join(part for part in (reason, WHY[code], note) if part))


def _unmeasured(ir: MonarchAttention, keys: Size, queries: Size | None) -> str | None:
    """From which sizes on kernels were timed, where these are less."""
    if ir.follows_cache:
        if keys >= CACHED_KEYS_FROM and queries is not None and queries >= CACHED_QUERIES_FROM:
            return None
        least = f"{CACHED_QUERIES_FROM} queries and {CACHED_KEYS_FROM} keys"
        return f"kernels of causal queries after a cache were timed from {least} on"
    if ir.lists_exact_keys and keys < LISTED_KEYS_FROM:
        return f"kernels of causal attention and of chosen blocks were timed from {LISTED_KEYS_FROM} tokens on"
    return None


@lru_cache(maxsize=256)
def crossovers(ir: MonarchAttention, device: Device, auto: bool, calls: Calls = DEVICE_ALONE) -> tuple[int, ...]:
    """For each batch of `BATCHES`, the length from which on it and all up to the next pay."""
    return tuple(_start(ir, device, auto, batch, calls) for batch in BATCHES)


def _counted(batch: Size) -> int:
    """The one of `BATCHES` that a batch is in the range of."""
    return max(size for size in BATCHES if batch >= size)


def _start(ir: MonarchAttention, device: Device, auto: bool, batch: int, calls: Calls) -> int:
    """The length from which on a batch of `BATCHES` and all up to the next pay."""
    place = BATCHES.index(batch)
    return max(crossover(replace(ir, batch=size), device, auto, calls) for size in BATCHES[place : place + 2])


@lru_cache(maxsize=1024)
def crossover(ir: MonarchAttention, device: Device, auto: bool, calls: Calls = DEVICE_ALONE) -> int:
    """The least of `LENGTHS` from which on lowering is predicted to pay at the batch of `ir`; else `NEVER`.

    Queries are as many as keys, unless the IR is one of cross-attention. With `auto`, the block size is that of each
    length. Between two of `LENGTHS`, the last block that a length begins may take a part of the margin.
    """

    def pays(length: int) -> bool:
        form, rows = ir.form, ir.seq_len_q if ir.is_cross else length
        if ir.follows_cache and isinstance(ir.seq_len_q, int):
            rows = min(ir.seq_len_q, length)
        block_size = auto_block_size(length, device.kind, form.window, form.prefix) if auto else form.block_size
        return predict(ir.changed(seq_len_q=rows, seq_len_k=length, block_size=block_size), device, calls=calls).pays

    start = NEVER
    for length in reversed(LENGTHS):
        if not pays(length):
            break
        start = length
    return start
