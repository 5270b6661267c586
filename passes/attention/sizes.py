"""Sizes that tensors share, with symbols of their own only because the tensors are separate graph inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._guards import TracingContext

from monarch_compile.passes.attention.region import AttentionRegion, Operand


def guard_equal_sizes(region: AttentionRegion) -> None:
    """Guard that sizes stay equal which attention wants equal, and which were so in the captured call.

    A length that changes gets a symbol for each graph input; a fresh compile sees one number. Without the guard the
    outcome would depend on which lengths came before. Exported programs take no guards.
    """
    if TracingContext.try_get() is not None:
        for one, other in separate_symbols(region):
            bool(one == other)


def separate_symbols(region: AttentionRegion) -> Iterator[tuple[torch.SymInt, torch.SymInt]]:
    """Sizes that attention wants equal and that were so in the captured call, under different symbols."""
    for one, other in _wanted_equal(region):
        if _hint(one) is not None and _hint(one) == _hint(other) and str(one) != str(other):
            yield one, other


def _wanted_equal(region: AttentionRegion) -> Iterator[tuple[Any, Any]]:
    keys = region.k_shape[2]
    yield keys, region.v_shape[2]
    yield region.q_shape[2], keys
    yield from leading_sizes(region)


def leading_sizes(region: AttentionRegion) -> Iterator[tuple[Any, Any]]:
    """Each leading size of q, k and v beside that of the product it goes into."""
    wanted = region.qk_lead, region.kv_lead(region.qk_lead), region.kv_lead(region.pv_lead)
    for operand, lead in zip((region.q, region.k, region.v), wanted, strict=True):
        yield from zip(_lead_of(operand), lead, strict=True)


def _lead_of(operand: Operand) -> list[Any]:
    """The sizes of an operand's leading dims, 1 where it is broadcast."""
    shape = operand.node.meta["val"].shape
    return [1 if dim is None else shape[dim] for dim in operand.dims[:-2]]


def _hint(size: Any) -> Any:
    """What a symbolic size was in the captured call; None for other sizes, and where nobody knows."""
    return size.node.hint if isinstance(size, torch.SymInt) and size.node.has_hint() else None
