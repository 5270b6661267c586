"""torch.autocast around attention: what it makes of tensors, and how to compute without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

KINDS = frozenset({"cpu", "cuda"})
"""Kinds of devices that attention is lowered on; torch raises for some others."""


def target_of(kind: str) -> torch.dtype | None:
    """What autocast, where it is on, casts attention's tensors to on devices of `kind`; None where it is off."""
    return torch.get_autocast_dtype(kind) if kind in KINDS and torch.is_autocast_enabled(kind) else None


def cast(dtype: torch.dtype, target: torch.dtype | None) -> torch.dtype:
    """What autocast to `target` makes of `dtype`: it leaves float64 and what is not floating as it is."""
    return dtype if target is None or dtype == torch.float64 or not dtype.is_floating_point else target


def switched_off(kind: str) -> contextlib.AbstractContextManager[object]:
    """A context without autocast on devices of `kind`."""
    return contextlib.nullcontext() if target_of(kind) is None else torch.autocast(kind, enabled=False)


@contextlib.contextmanager
def put_back() -> Iterator[None]:
    """Afterwards autocast is as it was, also where a region inside was begun and not ended, and holds no cast weights:
    these may have changed."""
    depth, caches = _depth(), torch.is_autocast_cache_enabled()
    were = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in KINDS}
    try:
        yield
    finally:
        while _depth() > depth:
            torch.autocast_decrement_nesting()
        for kind, (enabled, dtype) in were.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(caches)
        torch.clear_autocast_cache()


def _depth() -> int:
    """How many regions are entered."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
