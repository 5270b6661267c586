"""The work of attention, exact and Monarch, forward and backward, derived: matrix products, and what crosses memory.

`STAGES` lists the matrix products of one Monarch iteration (arXiv 2505.18698, section 3), and those of its backward
pass, with the tensors that cross a kernel's border; sympy sums them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import sympy

from monarch_compile.cost.prediction import Cost, Quantity

WHOLE_TILE = 128
"""The most blocks, or offsets of a block, that the kernels cover in one tile, a power of two."""

LEAST_OFFSETS = 64
"""Fewer queries of a block take no less time in stage 1: they do not fill the tensor cores."""

LEAST_FEATURES = 32
"""Nor do fewer features of a head."""

E, H, H_KV, N_Q, N_K, M, B_Q, B_K, D, D_V, ITEM, T, TILE = sympy.symbols(
    "E H H_kv N_q N_k M B_q B_k D D_v e T tile", positive=True, integer=True
)
C, X, G, P = sympy.symbols("C X G P", nonnegative=True, integer=True)
M_Q = sympy.Symbol("M_q", positive=True, integer=True)
SYMBOLS = (E, H, H_KV, N_Q, N_K, M, B_Q, B_K, D, D_V, ITEM, T, C, M_Q, X, G, P, TILE)
# C: 1 where blocks are chosen, else 0.
# M_Q: blocks that hold queries: all M, unless queries follow a cache; the others have one summary each.
# X: exact keys of a row beyond those that stage 1 scores anyway. G: 1 where there are exact groups, else 0.
# P: rows that are exact throughout.


class Stage(NamedTuple):
    """One group of equal matrix products of an iteration.

    kernel: stages with one name share a kernel, so what passes between them stays on chip.
    when: "every" iteration, the "last" one only, every one "before" the last, "once" beside the iterations, to make a
        "choice" of blocks, or in the "back"ward pass of a single iteration from the identity start.
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
    Stage("logits", "offsets", "every", B_Q, (M_Q, D, M), ("q", "a", "c"), softmax=True),
    Stage("next qhat", "offsets", "before", B_Q, (M, M, D), ("q", "qhat")),
    Stage("z", "offsets", "last", B_Q, (M_Q, M, D_V), ("y", "z", "near")),
    Stage("near scores", "blocks", "last", M_Q, (B_Q, D, X), (), softmax=True),
    Stage("near values", "blocks", "last", M_Q, (B_Q, X, D_V), ("near",)),
    Stage("totals of far fields", "totals", "choice", B_Q, (M_Q, D, M), ("q", "a", "c", "lse"), softmax=True),
    Stage("masses of blocks", "masses", "choice", B_Q, (M_Q, D, M), ("q", "a", "c", "lse", "masses"), softmax=True),
    Stage("exact rows", "rows", "once", 1, (P, D, N_K), ("k",), softmax=True),
    Stage("exact rows' values", "rows", "once", 1, (P, N_K, D_V), ("v",)),
    Stage("delta", "rows of dz", "back", 1, (N_Q, D_V, 1), ("dz", "z", "delta")),
    Stage("scores, again", "blocks, again", "back", M, (B_Q, D, B_K), ("q", "k"), softmax=True),
    Stage("a, again", "blocks, again", "back", M, (B_Q, B_K, D), ("a", "c")),
    Stage("y, again", "blocks, again", "back", M, (B_Q, B_K, D_V), ("v", "y")),
    Stage("logits, again", "offsets, back", "back", B_Q, (M, D, M), ("q", "a", "c", "lse"), softmax=True),
    Stage("d logits", "offsets, back", "back", B_Q, (M, D_V, M), ("dz", "y", "delta")),
    Stage("far dq", "offsets, back", "back", B_Q, (M, M, D), ("far dq",)),
    Stage("da", "offsets, back", "back", B_Q, (M, M, D), ("da", "dc")),
    Stage("dy", "offsets, back", "back", B_Q, (M, M, D_V), ("dy",)),
    Stage("R, again", "blocks, back", "back", M, (B_Q, D, B_K), ("q", "k"), softmax=True),
    Stage("dR by a", "blocks, back", "back", M, (B_Q, D, B_K), ("da", "dc")),
    Stage("dR by y", "blocks, back", "back", M, (B_Q, D_V, B_K), ("v", "dy")),
    Stage("dq", "blocks, back", "back", M, (B_Q, B_K, D), ("far dq", "dq")),
    Stage("dk by scores", "blocks, back", "back", M, (B_K, B_Q, D), ("dk",)),
    Stage("dk by a", "blocks, back", "back", M, (B_K, B_Q, D), ()),
    Stage("dv", "blocks, back", "back", M, (B_K, B_Q, D_V), ("dv",)),
    Stage("near scores of rows", "blocks, back", "back", M, (B_Q, D, X), ("near dz",), softmax=True),
    Stage("near d scores of rows", "blocks, back", "back", M, (B_Q, D_V, X), ()),
    Stage("near dq", "blocks, back", "back", M, (B_Q, X, D), ()),
    Stage("near scores of keys", "blocks, back", "back", M, (X, D, B_K), (), softmax=True),
    Stage("near d scores of keys", "blocks, back", "back", M, (X, D_V, B_K), ()),
    Stage("near dk", "blocks, back", "back", M, (B_K, X, D), ()),
    Stage("near dv", "blocks, back", "back", M, (B_K, X, D_V), ()),
)

BACKWARD_KERNELS = len({stage.kernel for stage in STAGES if stage.when == "back"})
"""Kernels of a backward pass: nothing but output and logsumexps is kept for them, a and y are made anew."""

TENSORS: dict[str, Quantity] = {
    "q": H * N_Q * D * ITEM,
    "k": H_KV * N_K * D * ITEM,
    "v": H_KV * N_K * D_V * ITEM,
    "z": H * N_Q * D_V * ITEM,
    "qhat": H * N_Q * D * ITEM,
    "a": H * (M - M_Q + M_Q * B_Q) * D * ITEM,
    "y": H * (M - M_Q + M_Q * B_Q) * D_V * ITEM,
    "c": H * (M - M_Q + M_Q * B_Q) * 4,
    "near": G * H * N_Q * (D_V * ITEM + 4),
    "lse": H * N_Q * 4,
    "masses": H * M_Q * M * 6,
    "delta": H * N_Q * 4,
    "dz": H * N_Q * D_V * ITEM,
    "near dz": G * H * N_Q * (D_V * ITEM + 8),
    "da": H * M * B_Q * D * ITEM,
    "dy": H * M * B_Q * D_V * ITEM,
    "dc": H * M * B_Q * 4,
    "far dq": H * N_Q * D * ITEM,
    "dq": H * N_Q * D * ITEM,
    "dk": H_KV * N_K * D * ITEM,
    "dv": H_KV * N_K * D_V * ITEM,
}
"""Bytes of each tensor for one batch element; `c`, `dc`, `delta` and logsumexps are kept in float32, and so are
masses, which become a byte each that is read once more. `near dz` is read
with its logsumexps and `delta`."""


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
    flops, exps = _work({"every": T, "last": 1, "before": T - 1, "choice": C}, _whole_tiles if tiled else tuple)
    moved = _moved("every", "last") + (T - 1) * _moved("every", "before") + C * _moved("choice")
    return Cost(*(E * total for total in (flops, moved, exps)))


@lru_cache(maxsize=2)
def backward_formula(tiled: bool = False) -> Cost:
    """The backward pass of the Monarch form by kernels, without that of exact rows; `tiled` as in `monarch_formula`."""
    flops, exps = _work({"back": 1}, _whole_tiles if tiled else tuple)
    return Cost(*(E * total for total in (flops, _moved("back"), exps)))


@lru_cache(maxsize=1)
def exact_backward_formula() -> Cost:
    """The backward pass of exact attention, fused: the scores again, then gradients of weights, q, k and v."""
    products = 2 * H * N_Q * N_K * (3 * D + 2 * D_V)
    moved = sum(TENSORS[name] for name in ("q", "k", "v", "z", "dz", "lse", "dq", "dk", "dv"))
    return Cost(E * products, E * moved, E * H * N_Q * N_K)


@lru_cache(maxsize=1)
def rows_formula() -> Cost:
    """The exact rows of a prefix, which one more kernel computes, in the symbols of this module."""
    flops, exps = _work({"once": 1}, tuple)
    moved = sympy.Min(P, 1) * _moved("once")  # no row, no kernel
    return Cost(*(E * total for total in (flops, moved, exps)))


def _work(repeats: Mapping[str, Quantity], shape: Callable[[Any], Any]) -> tuple[Quantity, Quantity]:
    """FLOPs and softmax elements of a batch element, of the stages of these iterations."""
    stages = [(repeats[s.when], s) for s in STAGES if s.when in repeats]
    flops = sum(times * 2 * math.prod((H, s.count, *shape(s.matmul))) for times, s in stages)
    return flops, sum(times * H * s.count * s.matmul[0] * s.matmul[2] for times, s in stages if s.softmax)


def _whole_tiles(shape: tuple[Quantity, ...]) -> tuple[Quantity, ...]:
    kinds = dict.fromkeys((M, M_Q, B_Q, B_K), _BLOCKS) | dict.fromkeys((D, D_V), _FEATURES)
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
    return int(ceil_div(size, tile) * tile)


def ceil_div(a: Quantity, b: Quantity) -> Quantity:
    """a / b, rounded up."""
    return -(-a // b) if isinstance(a, int) and isinstance(b, int) else sympy.ceiling(a / b)


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


@lru_cache(maxsize=1)
def compiled() -> Callable[..., tuple[int, ...]]:
    """FLOP, bytes and softmax elements of each formula in turn, as tiles have it, from the values of `SYMBOLS`."""
    costs = exact_formula(), monarch_formula(tiled=True), rows_formula(), backward_formula(tiled=True)
    exprs = [x for cost in costs for x in (cost.flops, cost.bytes, cost.exps)]
    source = f"lambda {', '.join(map(str, SYMBOLS))}: {exprs}"  # what sympy.lambdify does, in a fifth of its time
    tiles = {"in_blocks": _in_blocks, "in_prefix": _in_prefix, "in_offsets": _in_offsets, "in_features": _in_features}
    function: Callable[..., tuple[int, ...]] = eval(source, tiles | {"Min": min})
    return function
