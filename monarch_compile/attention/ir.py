"""The typed Monarch attention IR: what a lowered site computes, independent of how it runs.

A value is frozen, hashable and equal by value, prints on one line, and is checked by `verify`.
Notation follows arXiv 2505.18698: keys are cut into `num_blocks` blocks of `block_size`; queries into as many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, ClassVar, NamedTuple

import torch

from monarch_compile.attention.blocking import count_tiles
from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.errors import IRError
from monarch_compile.ir import DTYPE_NAMES, Dim

MAX_HEAD_DIM = 256
"""The most features of a head that the kernels hold; the reference has no limit."""


SHARED_PREFIX = 16
"""The most rows of a prefix that the kernels compute beside the blocks, one tile of queries; more have their own."""


class MaskKind(Enum):
    """What is known of the keys: which ones every row may see, or a number that is added to every row's scores."""

    NONE = "none"
    KEY_PADDING = "key_padding"
    KEY_BIAS = "key_bias"


def count_blocks(seq_len: Any, block_size: int, prefix: int) -> Any:
    """Blocks that hold what follows the prefix of a sequence; none where nothing does. Lengths may be symbolic."""
    return (seq_len - prefix + block_size - 1) // block_size


def is_exact(seq_len_q: Any, seq_len_k: Any, block_size: int, prefix: int) -> bool:
    """Whether the form is exact softmax attention: all queries are in the prefix, or all keys in it and one block.

    Symbolic lengths are guarded on. Past this check there are at least two blocks: were their number 1 by a guard
    alone, it would stay a symbol to Inductor, which then indexes a dim that was broadcast.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    in_one_block = guard_or_false(seq_len_k - prefix <= block_size)
    return in_one_block or bool(prefix and guard_or_false(seq_len_q <= prefix))


def begins_after_prefix(seq_len_q: Any, seq_len_k: Any, prefix: int) -> bool:
    """Whether a cache holds all of the prefix, so that no query after it is in it. Symbolic lengths are guarded on."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(seq_len_k - seq_len_q >= prefix))


def differentiated_by_kernels(form: Form, *, is_cross: bool, is_causal: bool = False) -> bool:
    """Whether gradients of a form have kernels on CUDA; those of the others are the vjp of the reference.

    One iteration from the identity start, between sequences of one length, with a prefix that the blocks' kernels hold;
    neither causal nor with chosen blocks.
    """
    listed = is_causal or form.chosen > 0
    return form.weighs_own_block_exactly and not is_cross and form.prefix <= SHARED_PREFIX and not listed


@dataclass(frozen=True)
class MonarchAttention:
    """One attention site in Monarch form.

    Shapes: q (batch, num_heads, seq_len_q, head_dim), k (batch, num_kv_heads, seq_len_k, head_dim),
    v (batch, num_kv_heads, seq_len_k, value_dim), output (batch, num_heads, seq_len_q, value_dim).
    `form.block_size` counts keys; queries use `block_size_q`, so that both have `num_blocks` blocks.
    grid: sizes of the axes that the tokens outside of the prefix flatten, row by row; None where none is known. The
    blocks are its tiles if the form has a `tile`.
    """

    family: ClassVar[str] = "attention"

    batch: Dim
    num_heads: Dim
    num_kv_heads: Dim
    seq_len_q: Dim
    seq_len_k: Dim
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    form: Form
    scale: float
    mask: MaskKind = MaskKind.NONE
    is_causal: bool = False
    grid: tuple[Dim, ...] | None = None

    def __post_init__(self) -> None:
        verify(self)

    def changed(self, **changes: Any) -> MonarchAttention:
        """A copy with some fields changed; options of the form may be given by name among them."""
        form = {name: changes.pop(name) for name in FORM_OPTIONS if name in changes}
        return replace(self, form=replace(changes.pop("form", self.form), **form), **changes)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `reference.reference` after its tensors."""
        grid = None if self.form.tile is None else self.grid
        return {"scale": self.scale, **asdict(self.form), "grid": grid, "causal": self.is_causal}

    @property
    def group(self) -> int:
        """Query heads that share a key head: head h reads key head h // group. Named counts read "4*H" beside "H"."""
        if isinstance(self.num_heads, int) and isinstance(self.num_kv_heads, int):
            return self.num_heads // self.num_kv_heads
        times, _, name = str(self.num_heads).rpartition("*")
        return int(times) if times and name == str(self.num_kv_heads) else 1

    @property
    def simplest(self) -> Form:
        """The form that gives the same with the least work."""
        return self.form.simplest(is_causal=self.is_causal)

    @property
    def has_exact_keys(self) -> bool:
        """Whether some keys are attended to exactly; those of a row's own block always are in causal attention."""
        return self.is_causal or self.form.has_exact_keys

    @property
    def lists_exact_keys(self) -> bool:
        """Whether exact keys, those of a row's own block among them, are listed apart from the blocks' summaries."""
        return self.is_causal or self.form.chosen > 0

    @property
    def is_cross(self) -> bool:
        """Whether queries and keys are sequences of different lengths: a query has no block of its own."""
        return self.seq_len_q != self.seq_len_k and not self.is_causal

    @property
    def follows_cache(self) -> bool:
        """Whether the queries are the last of a longer causal sequence, whose first keys a cache holds."""
        return self.is_causal and self.seq_len_q != self.seq_len_k

    @property
    def num_blocks(self) -> int | None:
        """Number of blocks M, or None while seq_len_k is symbolic. Where a grid's sizes are symbolic, its tiles are
        taken to cover it without padding."""
        if self.form.tile is not None and self.grid is not None and all(isinstance(size, int) for size in self.grid):
            return int(math.prod(count_tiles(self.grid, self.form.tile)))
        if not isinstance(self.seq_len_k, int):
            return None
        return max(1, int(count_blocks(self.seq_len_k, self.form.block_size, self.form.prefix)))

    @property
    def block_size_q(self) -> int | None:
        """Rows in a query block, or None while a length is symbolic and differs from seq_len_k."""
        if not self.is_cross:
            return self.form.block_size
        if isinstance(self.seq_len_q, int) and self.num_blocks:
            return max(1, int(count_blocks(self.seq_len_q, self.num_blocks, self.form.prefix)))
        return None

    def __str__(self) -> str:
        form = self.form
        b, hq, hk, nq, nk = self.batch, self.num_heads, self.num_kv_heads, self.seq_len_q, self.seq_len_k
        blocks = "?" if self.num_blocks is None else self.num_blocks
        rows = f" rows={'?' if self.block_size_q is None else self.block_size_q}" if self.is_cross else ""
        parts = [
            f"monarch.attention<{DTYPE_NAMES.get(self.dtype, str(self.dtype))}>",
            f"q[{b},{hq},{nq},{self.head_dim}] k[{b},{hk},{nk},{self.head_dim}] v[{b},{hk},{nk},{self.value_dim}]",
            f"blocks={blocks}x{form.block_size}{rows} iters={form.num_iters} init={form.init} pad={form.pad}",
            f"mask={self.mask.value} causal={str(self.is_causal).lower()}",
            f"window={_by(form.window)} prefix={form.prefix}{' at_end=true' if form.prefix_at_end else ''}",
            f"scale={self.scale:.6g}",
        ]
        if form.tile is not None and self.grid is not None:
            parts.append(f"grid={_by(self.grid)} tile={_by(form.tile)} shape={form.window_shape}")
        if form.chosen:
            parts.append(f"chosen={form.chosen}")
        return " ".join(parts)


def _by(sizes: Any) -> str:
    """Sizes along axes as "4x8"; anything else as it is."""
    return "x".join(map(str, sizes)) if isinstance(sizes, tuple) else str(sizes)


class Rule(NamedTuple):
    """A rule that every IR value obeys: `holds` must be true, or `message` (formatted with the IR) is raised."""

    holds: Callable[[MonarchAttention], bool]
    message: str


def _positive(*dims: Dim) -> bool:
    return all(isinstance(d, str) or d >= 1 for d in dims)


def _heads_divide(ir: MonarchAttention) -> bool:
    if isinstance(ir.num_heads, int) and isinstance(ir.num_kv_heads, int):
        return ir.num_heads % ir.num_kv_heads == 0
    return ir.num_heads == ir.num_kv_heads or ir.group > 1


def _has_its_keys(ir: MonarchAttention) -> bool:
    """Whether every query of a causal sequence has a key."""
    numbers = isinstance(ir.seq_len_q, int) and isinstance(ir.seq_len_k, int)
    return not (ir.is_causal and numbers) or int(ir.seq_len_q) <= int(ir.seq_len_k)


def _fits_grid(ir: MonarchAttention) -> bool:
    return ir.form.tile is None or (ir.grid is not None and len(ir.grid) == len(ir.form.tile))


def _covers_sequence(ir: MonarchAttention) -> bool:
    if ir.form.tile is None or ir.grid is None or not isinstance(ir.seq_len_k, int):
        return True
    if not all(isinstance(size, int) for size in ir.grid):
        return True
    return math.prod(size for size in ir.grid if isinstance(size, int)) + ir.form.prefix == ir.seq_len_k


RULES: tuple[Rule, ...] = (
    Rule(lambda ir: _positive(ir.batch, ir.num_heads, ir.num_kv_heads), "batch and head counts must be at least 1"),
    Rule(lambda ir: _positive(ir.seq_len_q, ir.seq_len_k), "sequence lengths must be at least 1"),
    Rule(lambda ir: ir.head_dim >= 1 and ir.value_dim >= 1, "head_dim and value_dim must be at least 1"),
    Rule(_heads_divide, "num_heads must be a multiple of num_kv_heads"),
    Rule(lambda ir: ir.dtype in DTYPE_NAMES, "dtype must be one of float16, bfloat16, float32, float64"),
    Rule(lambda ir: math.isfinite(ir.scale), "scale must be finite"),
    Rule(
        lambda ir: not ir.is_causal or ir.form.weighs_own_block_exactly,
        "causal attention needs num_iters=1 and init='identity': later queries would leak into earlier outputs",
    ),
    Rule(_has_its_keys, "causal attention needs seq_len_q <= seq_len_k"),
    Rule(lambda ir: not ir.is_causal or ir.form.tile is None, "causal attention needs pieces of the sequence, no tile"),
    Rule(lambda ir: not ir.is_causal or not ir.form.prefix_at_end, "causal attention needs its prefix at the start"),
    Rule(lambda ir: not ir.form.chosen or not ir.is_cross, "chosen blocks need seq_len_q == seq_len_k"),
    Rule(_fits_grid, "a tile needs a grid of as many axes"),
    Rule(lambda ir: ir.form.tile is None or not ir.is_cross, "a tile needs seq_len_q == seq_len_k"),
    Rule(_covers_sequence, "with a tile, prefix and the product of the grid must be seq_len_k"),
)


def verify(ir: MonarchAttention) -> None:
    """Raise IRError, with the printed IR, for the first rule that `ir` breaks."""
    for rule in RULES:
        if not rule.holds(ir):
            raise IRError(f"{rule.message}; found {ir}")
