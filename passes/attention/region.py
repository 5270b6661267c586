"""What matching finds of an attention: the region of the graph that computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from monarch_compile.attention.grids import Grid
from monarch_compile.passes.state import RefusedSite


def frame_of(lead: tuple[Any, ...]) -> tuple[Any, Any]:
    """(batch, heads) of the lowered form for the leading dims of some scores."""
    if len(lead) < 2:
        return (*lead, *(1,) * (2 - len(lead)))
    return (lead[0], lead[1]) if len(lead) == 2 else (math.prod(lead[:-1]), lead[-1])


@dataclass(frozen=True)
class Operand:
    """A tensor seen as (*lead, seq_len, dim): `dims[i]` is the node's dim at place i, None a broadcast dim."""

    node: Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class MaskTerm:
    """One mask on the scores, or on the probabilities.

    role: "keep" (bool or binary, True or 1 stays), "drop" (bool, True goes), "add" (added to the scores). Two roles
    hide nothing by themselves, and have to be proved to change only what other masks hide: "times" (multiplies) and
    "again" (bool, True becomes 0 after softmax). `lead` are the leading dims of the scores it is broadcast to; `gain`
    multiplies an added mask (a scale applied later, a sign); `swapped` scores are (*lead, keys, queries).
    """

    node: Node
    role: str
    lead: tuple[Any, ...]
    gain: float = 1.0
    swapped: bool = False

    @property
    def score_rank(self) -> int:
        """The rank of the scores that the mask is broadcast to."""
        return len(self.lead) + 2


@dataclass(frozen=True)
class Factor:
    """A scale known at run time only: a tensor that multiplies (or divides) `scores`, the same for whole matrices."""

    node: Node
    scores: Node
    divides: bool = False


@dataclass(frozen=True)
class AttentionRegion:
    """softmax(scale * q k^T, masked) v, as found in the graph.

    `lead` are the leading dims (batch, heads) that the lowered form uses: two sizes. `qk_lead` and `pv_lead` are the
    leading dims of the two products as written. `output` is the node to replace; its dims are `out_dims` of
    (*pv_lead, seq_len_q, value_dim). `interior` are the nodes that disappear with the rewrite, `skipped` those between
    the products and the operands that it no longer reads. `factors` multiply the scores beside `scale`. `group` query
    heads share a key head: k and v have so many fewer heads than q. `length` is that of the sequences that are packed
    into one, each of which attends to itself alone: the lowered form has them side by side in its batch. `scores_dtype`
    is what the product of queries and keys gives. `grid` is what the tokens of queries and keys lie on, where known.
    `follows_cache`: the queries are fewer than the keys, the last of their sequence, and under a triangle.
    """

    anchor: Node
    output: Node
    q: Operand
    k: Operand
    v: Operand
    scale: float
    masks: tuple[MaskTerm, ...]
    lead: tuple[Any, Any]
    qk_lead: tuple[Any, ...]
    pv_lead: tuple[Any, ...]
    out_dims: tuple[int, ...]
    interior: tuple[Node, ...]
    skipped: tuple[Node, ...] = ()
    is_causal: bool = False
    factors: tuple[Factor, ...] = ()
    group: int = 1
    length: int | None = None
    scores_dtype: torch.dtype | None = None
    grid: Grid | None = None
    follows_cache: bool = False

    @property
    def gives_scores_dtype(self) -> bool:
        """Whether both products give one dtype, to which autocast casts their inputs where it is in force."""
        return not self.factors and self.scores_dtype == self.output.meta["val"].dtype

    @property
    def dtype(self) -> torch.dtype:
        """What attention is computed in: under autocast what its products give, whatever their inputs are."""
        node = self.output if self.gives_scores_dtype else self.q.node
        dtype: torch.dtype = node.meta["val"].dtype
        return dtype

    def kv_lead(self, lead: tuple[Any, ...]) -> tuple[Any, ...]:
        """Leading dims of q as those of k and v."""
        return lead if self.group == 1 else (*lead[:-1], lead[-1] // self.group)

    @property
    def is_cross(self) -> bool:
        """Whether queries and keys are of different lengths, as far as the graph tells."""
        return str(self.q_shape[2]) != str(self.k_shape[2])

    def _size(self, operand: Operand, place: int) -> Any:
        dim = operand.dims[place]
        return 1 if dim is None else operand.node.meta["val"].shape[dim]

    def _shape(self, operand: Operand, lead: tuple[Any, Any]) -> tuple[Any, ...]:
        shape = (*lead, self._size(operand, -2), self._size(operand, -1))
        return shape if self.length is None else (lead[0] * (shape[2] // self.length), lead[1], self.length, shape[3])

    @property
    def rows(self) -> Any:
        """How many queries there are, whether or not they are packed sequences."""
        return self._size(self.q, -2)

    @property
    def q_shape(self) -> tuple[Any, ...]:
        """(batch, num_heads, seq_len_q, head_dim)."""
        return self._shape(self.q, self.lead)

    @property
    def k_shape(self) -> tuple[Any, ...]:
        """(batch, num_kv_heads, seq_len_k, head_dim)."""
        return self._shape(self.k, self.kv_lead(self.lead))

    @property
    def v_shape(self) -> tuple[Any, ...]:
        """(batch, num_kv_heads, seq_len_k, value_dim)."""
        return self._shape(self.v, self.kv_lead(self.lead))


Site = AttentionRegion | RefusedSite
