"""What decides whether an attention can be lowered, except for its masks and its graph.

One table serves a region that was matched in a graph and a call of eager code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from monarch_compile.attention.form import weighs_own_block_exactly
from monarch_compile.attention.ir import MAX_HEAD_DIM
from monarch_compile.config import MonarchConfig
from monarch_compile.refusal import Refusal

DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32),
}
"""Kind of device -> dtypes that attention is lowered in."""

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Signature:
    """Shapes (batch, num_heads, seq_len, dim), dtypes and kinds of devices of query, key and value; the options.

    trains: whether a backward pass follows. follows_cache: whether fewer queries than keys are the last of their
    sequence: `is_causal` then counts from its end, and between other lengths from its start, as PyTorch does.

    Sizes are ints or, in graphs, symbolic. Dtypes are those that products are computed in: autocast has cast them.
    """

    shapes: tuple[Shape, Shape, Shape]
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str]
    scale: float
    is_causal: bool = False
    follows_cache: bool = False
    dropout_p: float = 0.0
    trains: bool = False

    @property
    def lengths(self) -> tuple[Any, Any]:
        """seq_len_q and seq_len_k."""
        return self.shapes[0][2], self.shapes[1][2]

    @property
    def is_cross(self) -> bool:
        """Whether queries and keys are of different lengths, as far as is known without a guard."""
        n_q, n_k = self.lengths
        return str(n_q) != str(n_k)

    @property
    def widths(self) -> dict[str, Any]:
        """head_dim and value_dim."""
        return {"head_dim": self.shapes[0][3], "value_dim": self.shapes[2][3]}


class Rule(NamedTuple):
    """`refuse` returns the reason why such attention stays exact, or None."""

    code: str
    refuse: Callable[[Signature, MonarchConfig], str | None]


def _is_static(size: Any) -> bool:
    return isinstance(size, int)


def _empty(site: Signature, config: MonarchConfig) -> str | None:
    for name, shape in zip("qkv", site.shapes, strict=True):
        if any(_is_static(size) and size == 0 for size in shape):
            return f"{name} is empty: {list(shape)}"
    return None


def _single_query(site: Signature, config: MonarchConfig) -> str | None:
    n_q = site.lengths[0]
    alone = site.is_cross and _is_static(n_q) and n_q == 1
    return "exact attention of one query reads each key once" if alone else None


def _values_layout(site: Signature, config: MonarchConfig) -> str | None:
    n_k, n_v = site.shapes[1][2], site.shapes[2][2]
    return None if str(n_k) == str(n_v) else f"k has {n_k} rows and v has {n_v}"


def _cross_attention(site: Signature, config: MonarchConfig) -> str | None:
    if not site.is_cross or config.cross_attention or site.follows_cache:
        return None
    n_q, n_k = site.lengths
    return f"cross-attention (seq_len_q {n_q}, seq_len_k {n_k}), and option cross_attention is False"


def _head_dim(site: Signature, config: MonarchConfig) -> str | None:
    d_q, d_k = site.shapes[0][3], site.shapes[1][3]
    return None if str(d_q) == str(d_k) else f"q has head_dim {d_q} and k has {d_k}"


def _symbolic_dims(site: Signature, config: MonarchConfig) -> str | None:
    sizes = {"num_heads": site.shapes[0][1], **site.widths}
    found = [f"{name} is symbolic ({size})" for name, size in sizes.items() if not _is_static(size)]
    return found[0] if found else None


def _wide_heads(site: Signature, config: MonarchConfig) -> str | None:
    for name, size in site.widths.items():
        if "cuda" in site.devices and size > MAX_HEAD_DIM:
            return f"{name} {size} is above {MAX_HEAD_DIM}, the most the kernels hold"
    return None


def _data_dependent(site: Signature, config: MonarchConfig) -> str | None:
    n_q, n_k = site.lengths
    for name, size in (("batch", site.shapes[0][0]), ("seq_len", n_k), ("seq_len_q", n_q)):
        if isinstance(size, torch.SymInt) and not size.node.has_hint():
            return f"{name} ({size}) is known only when the model runs"
    return None


def _device(site: Signature, config: MonarchConfig) -> str | None:
    if len(site.devices) > 1 or not site.devices <= set(DTYPES):
        return f"devices {sorted(site.devices)}; kernels exist for {sorted(DTYPES)}"
    return None


def _dtype(site: Signature, config: MonarchConfig) -> str | None:
    if len(site.dtypes) > 1:
        return f"q, k and v have different dtypes: {sorted(map(str, site.dtypes))}"
    (device,), (dtype,) = site.devices, site.dtypes
    if dtype not in DTYPES[device]:
        return f"dtype {dtype}; kernels exist for {', '.join(map(str, DTYPES[device]))}"
    return None


def _scale(site: Signature, config: MonarchConfig) -> str | None:
    return None if math.isfinite(site.scale) else f"the scale is {site.scale}"


def _dropout(site: Signature, config: MonarchConfig) -> str | None:
    return None if site.dropout_p == 0 else f"dropout {site.dropout_p} is active"


def _causal(site: Signature, config: MonarchConfig) -> str | None:
    if not site.is_causal:
        return None
    if not config.causal:
        return "causal attention, and option causal is False"
    if site.trains:
        return "causal attention in training"
    n_q, n_k = site.lengths
    if site.is_cross and not site.follows_cache:
        return f"causal attention of {n_q} queries to {n_k} keys, of which the first query sees the first alone"
    if config.prefix_at_end is True:
        return "causal attention needs its prefix at the start; found prefix_at_end=True"
    if config.plan is None and not weighs_own_block_exactly(config.num_iters, config.init):
        return "causal attention needs num_iters=1 and init='identity': later queries would leak into earlier outputs"
    return None


def _min_seq_len(site: Signature, config: MonarchConfig) -> str | None:
    n_k = site.lengths[1]
    return f"seq_len {n_k} is below min_seq_len {config.min_seq_len}" if n_k < config.min_seq_len else None


RULES: tuple[Rule, ...] = (
    Rule("empty", _empty),
    Rule("single_query", _single_query),
    Rule("values_layout", _values_layout),
    Rule("cross_attention", _cross_attention),
    Rule("head_dim", _head_dim),
    Rule("symbolic_dims", _symbolic_dims),
    Rule("wide_heads", _wide_heads),
    Rule("data_dependent", _data_dependent),
    Rule("device", _device),
    Rule("dtype", _dtype),
    Rule("scale", _scale),
    Rule("dropout_active", _dropout),
    Rule("mask_causal", _causal),
    Rule("min_seq_len", _min_seq_len),
)
"""In the order in which they are asked: a later one may take for granted what an earlier one refuses."""


def first_broken(site: Signature, config: MonarchConfig) -> Refusal | None:
    """The first of `RULES` that an attention breaks."""
    for rule in RULES:
        reason = rule.refuse(site, config)
        if reason is not None:
            return Refusal(rule.code, reason)
    return None
