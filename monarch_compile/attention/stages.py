"""The work of attention, exact and Monarch, forward and backward, derived: matrix products, and what crosses memory.

`STAGES` lists the matrix products of one Monarch iteration (arXiv 2505.18698, section 3), and those of its backward
pass, with the tensors that cross a kernel's border. Sizes stand there by the names of `Sizes`; `work_of` sums them, for
numbers and for sympy expressions alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import sympy

from monarch_compile.cost.prediction import Cost, Quantity

WHOLE_TILE = 128
"""The most blocks, or offsets of a block, that the kernels cover in one tile, a power of two."""

LEAST_OFFSETS = 64
"""Fewer queries of a block take no less time in stage 1: they do not fill the tensor cores."""

LEAST_FEATURES = 32
"""Nor do fewer features of a head."""


class Sizes(NamedTuple):
    """What the work of a site depends on, in the letters of its formulas.

    E: batch. H, H_kv: heads of queries, of keys. N_q, N_k: tokens. M: blocks. M_q: those that hold queries,
    all M unless queries follow a cache: the others have one summary each. B_q, B_k: queries and keys of a block.
    D, D_v: features of a head of queries and keys, of values. e: bytes of an element. T: iterations.
    C: 1 where blocks are chosen, else 0. X: exact keys of a row beyond those that stage 1 scores anyway.
    G: 1 where there are exact groups, else 0. P: rows that are exact throughout.
    """

    E: Quantity
    H: Quantity
    H_kv: Quantity
    N_q: Quantity
    N_k: Quantity
    M: Quantity
    M_q: Quantity
    B_q: Quantity
    B_k: Quantity
    D: Quantity
    D_v: Quantity
    e: Quantity
    T: Quantity
    C: Quantity
    X: Quantity
    G: Quantity
    P: Quantity


class Work(NamedTuple):
    """What a site computes and moves. monarch: without exact rows, T iterations, the last of which gives the output.
    rows: the exact rows of a prefix, by a kernel of their own. exact: as one fused kernel, which reads q, k and v once.
    Of their backward passes: `monarch_backward` by kernels, without that of exact rows; `exact_backward`: the scores
    again, then gradients of weights, q, k and v."""

    exact: Cost
    monarch: Cost
    rows: Cost
    monarch_backward: Cost
    exact_backward: Cost


class Stage(NamedTuple):
    """One group of equal matrix products of an iteration.

    kernel: stages with one name share a kernel, so what passes between them stays on chip.
    when: "every" iteration, the "last" one only, every one "before" the last, "once" beside the iterations, to make a
        "choice" of blocks, or in the "back"ward pass of a single iteration from the identity start.
    products, matmul: how many there are per head, and their (rows, contraction, columns).
    moves: tensors (keys of `TENSORS`) that the stage reads from or writes to memory.
    softmax: whether the product's elements pass through a softmax.
    """

    name: str
    kernel: str
    when: str
    products: str
    matmul: tuple[str, str, str]
    moves: tuple[str, ...]
    softmax: bool = False


STAGES: tuple[Stage, ...] = (
    Stage("scores", "blocks", "every", "M", ("B_q", "D", "B_k"), ("qhat", "k"), softmax=True),
    Stage("a", "blocks", "every", "M", ("B_q", "B_k", "D"), ("k", "a", "c")),
    Stage("y", "blocks", "last", "M", ("B_q", "B_k", "D_v"), ("v", "y")),
    Stage("logits", "offsets", "every", "B_q", ("M_q", "D", "M"), ("q", "a", "c"), softmax=True),
    Stage("next qhat", "offsets", "before", "B_q", ("M", "M", "D"), ("q", "qhat")),
    Stage("z", "offsets", "last", "B_q", ("M_q", "M", "D_v"), ("y", "z", "near")),
    Stage("near scores", "blocks", "last", "M_q", ("B_q", "D", "X"), (), softmax=True),
    Stage("near values", "blocks", "last", "M_q", ("B_q", "X", "D_v"), ("near",)),
    Stage("totals of far fields", "totals", "choice", "B_q", ("M_q", "D", "M"), ("q", "a", "c", "lse"), softmax=True),
    Stage(
        "masses of blocks", "masses", "choice", "B_q", ("M_q", "D", "M"), ("q", "a", "c", "lse", "masses"), softmax=True
    ),
    Stage("exact rows", "rows", "once", "1", ("P", "D", "N_k"), ("k",), softmax=True),
    Stage("exact rows' values", "rows", "once", "1", ("P", "N_k", "D_v"), ("v",)),
    Stage("delta", "rows of dz", "back", "1", ("N_q", "D_v", "1"), ("dz", "z", "delta")),
    Stage("scores, again", "blocks, again", "back", "M", ("B_q", "D", "B_k"), ("q", "k"), softmax=True),
    Stage("a, again", "blocks, again", "back", "M", ("B_q", "B_k", "D"), ("a", "c")),
    Stage("y, again", "blocks, again", "back", "M", ("B_q", "B_k", "D_v"), ("v", "y")),
    Stage("logits, again", "offsets, back", "back", "B_q", ("M", "D", "M"), ("q", "a", "c", "lse"), softmax=True),
    Stage("d logits", "offsets, back", "back", "B_q", ("M", "D_v", "M"), ("dz", "y", "delta")),
    Stage("far dq", "offsets, back", "back", "B_q", ("M", "M", "D"), ("far dq",)),
    Stage("da", "offsets, back", "back", "B_q", ("M", "M", "D"), ("da", "dc")),
    Stage("dy", "offsets, back", "back", "B_q", ("M", "M", "D_v"), ("dy",)),
    Stage("R, again", "blocks, back", "back", "M", ("B_q", "D", "B_k"), ("q", "k"), softmax=True),
    Stage("dR by a", "blocks, back", "back", "M", ("B_q", "D", "B_k"), ("da", "dc")),
    Stage("dR by y", "blocks, back", "back", "M", ("B_q", "D_v", "B_k"), ("v", "dy")),
    Stage("dq", "blocks, back", "back", "M", ("B_q", "B_k", "D"), ("far dq", "dq")),
    Stage("dk by scores", "blocks, back", "back", "M", ("B_k", "B_q", "D"), ("dk",)),
    Stage("dk by a", "blocks, back", "back", "M", ("B_k", "B_q", "D"), ()),
    Stage("dv", "blocks, back", "back", "M", ("B_k", "B_q", "D_v"), ("dv",)),
    Stage("near scores of rows", "blocks, back", "back", "M", ("B_q", "D", "X"), ("near dz",), softmax=True),
    Stage("near d scores of rows", "blocks, back", "back", "M", ("B_q", "D_v", "X"), ()),
    Stage("near dq", "blocks, back", "back", "M", ("B_q", "X", "D"), ()),
    Stage("near scores of keys", "blocks, back", "back", "M", ("X", "D", "B_k"), (), softmax=True),
    Stage("near d scores of keys", "blocks, back", "back", "M", ("X", "D_v", "B_k"), ()),
    Stage("near dk", "blocks, back", "back", "M", ("B_k", "X", "D"), ()),
    Stage("near dv", "blocks, back", "back", "M", ("B_k", "X", "D_v"), ()),
)

BACKWARD_KERNELS = len({stage.kernel for stage in STAGES if stage.when == "back"})
"""Kernels of a backward pass: nothing but output and logsumexps is kept for them, a and y are made anew."""

TENSORS: dict[str, str] = {
    "q": "H * N_q * D * e",
    "k": "H_kv * N_k * D * e",
    "v": "H_kv * N_k * D_v * e",
    "z": "H * N_q * D_v * e",
    "qhat": "H * N_q * D * e",
    "a": "H * (M - M_q + M_q * B_q) * D * e",
    "y": "H * (M - M_q + M_q * B_q) * D_v * e",
    "c": "H * (M - M_q + M_q * B_q) * 4",
    "near": "G * H * N_q * (D_v * e + 4)",
    "lse": "H * N_q * 4",
    "masses": "H * M_q * M * 6",
    "delta": "H * N_q * 4",
    "dz": "H * N_q * D_v * e",
    "near dz": "G * H * N_q * (D_v * e + 8)",
    "da": "H * M * B_q * D * e",
    "dy": "H * M * B_q * D_v * e",
    "dc": "H * M * B_q * 4",
    "far dq": "H * N_q * D * e",
    "dq": "H * N_q * D * e",
    "dk": "H_kv * N_k * D * e",
    "dv": "H_kv * N_k * D_v * e",
}
"""Bytes of each tensor for one batch element; `c`, `dc`, `delta` and logsumexps are kept in float32, and so are
masses, which become a byte each that is read once more. `near dz` is read with its logsumexps and `delta`."""

PASSES: dict[str, dict[str, tuple[str, ...]]] = {
    "monarch": {"1": ("every", "last"), "(T - 1)": ("every", "before"), "C": ("choice",)},
    "rows": {"least(P, 1)": ("once",)},  # no row, no kernel
    "monarch_backward": {"1": ("back",)},
}
"""For each form, how often stages run, by their `when`. Kernels that run together read what they share once."""

PRODUCTS = {"exact": "2 * H * N_q * N_k * (D + D_v)", "exact_backward": "2 * H * N_q * N_k * (3 * D + 2 * D_v)"}
"""FLOPs of the products of exact attention."""

READ_OR_WRITTEN = {"exact": "q k v z", "exact_backward": "q k v z dz lse dq dk dv"}
"""What exact attention moves, by the keys of `TENSORS`."""


def work_of(sizes: Sizes, tile: int = 1) -> Work:
    """The work of a site. With a tile of more than 1, sizes must be numbers, and blocks, offsets, exact keys and
    features of Monarch's products are what tiles cover of them, nearly."""
    counts = _compiled()(*sizes, tile)
    return Work(*(Cost(*counts[i : i + 3]) for i in range(0, len(counts), 3)))


def ceil_div(a: Quantity, b: Quantity) -> Quantity:
    """a / b, rounded up."""
    return -(-a // b) if isinstance(a, int) and isinstance(b, int) else sympy.ceiling(a / b)


def least(a: Quantity, b: Quantity) -> Quantity:
    """The smaller of both."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Min(a, b)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[Quantity, ...]]:
    """FLOPs, bytes and softmax elements of each field of `Work` in turn, from the values of `Sizes` and a tile."""
    formulas = {form: _summed(passes) for form, passes in PASSES.items()}
    for form, products in PRODUCTS.items():
        moved = " + ".join(TENSORS[name] for name in READ_OR_WRITTEN[form].split())
        formulas[form] = products, moved, "H * N_q * N_k"
    source = ", ".join(f"E * ({x})" for form in Work._fields for x in formulas[form])
    tiles = {"blocks": _in_blocks, "prefix": _in_prefix, "offsets": _in_offsets, "features": _in_features}
    function: Callable[..., tuple[Quantity, ...]] = eval(
        f"lambda {', '.join(Sizes._fields)}, tile: ({source})", tiles | {"least": least}
    )
    return function


def _summed(passes: Mapping[str, tuple[str, ...]]) -> tuple[str, str, str]:
    """FLOPs, bytes and softmax elements of a batch element."""
    flops, moved, exps = [], [], []
    for times, when in passes.items():
        stages = [s for s in STAGES if s.when in when]
        crossing = sorted({(s.kernel, name) for s in stages for name in s.moves})
        flops += [f"2 * {times} * H * {s.products} * {' * '.join(_tiled(s))}" for s in stages]
        moved += [f"{times} * {TENSORS[name]}" for _, name in crossing]
        exps += [f"{times} * H * {s.products} * {s.matmul[0]} * {s.matmul[2]}" for s in stages if s.softmax]
    return " + ".join(flops), " + ".join(moved), " + ".join(exps)


def _tiled(stage: Stage) -> tuple[str, ...]:
    """Sizes of a product as tiles cover them; exact rows have no tiles of ours."""
    if stage.when == "once":
        return stage.matmul
    covered = {
        **{size: f"blocks({size}, tile)" for size in ("M", "M_q", "B_q", "B_k")},
        **{size: f"features({size}, tile)" for size in ("D", "D_v")},
        "X": "(blocks(X - P, tile) + prefix(P, tile))",
    }
    rows, *others = (covered.get(size, size) for size in stage.matmul)
    return f"offsets({rows}, tile)" if stage.matmul[0] == "B_q" else rows, *others


def _in_blocks(size: Quantity, tile: int) -> Quantity:
    """What tiles cover of `size` blocks or offsets: one tile up to `WHOLE_TILE`, then steps of half of it."""
    step = WHOLE_TILE // 2
    if tile == 1 or size == 0:
        return size
    return _power(size, tile) if size <= WHOLE_TILE else -(-size // step) * step


def _in_prefix(size: Quantity, tile: int) -> Quantity:
    """What tiles cover of the keys of a prefix, which have tiles of their own."""
    return size if tile == 1 else ceil_div(size, tile) * tile


def _in_offsets(size: Quantity, tile: int) -> Quantity:
    """What tiles cover of `size` offsets of queries, in the products of stage 1."""
    return size if tile == 1 or size == 0 else max(size, LEAST_OFFSETS)


def _in_features(size: Quantity, tile: int) -> Quantity:
    """What tiles cover of `size` features: they are never cut."""
    return size if tile == 1 else _power(size, LEAST_FEATURES)


def _power(size: int, at_least: int) -> int:
    return max(at_least, 1 << (size - 1).bit_length())
