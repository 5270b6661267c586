"""A table of checks of a region, how it is asked, and the checks that families have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from torch.fx import Node

from monarch_compile.calls import active_transform
from monarch_compile.passes.graph import value_of
from monarch_compile.passes.safety import Footprint, Order, mode_switch, strided_read, write_between
from monarch_compile.refusal import Refusal

Found = str | tuple[str, Node] | None
"""None, or the reason (and the culprit, else the region's output)."""


class Region(Protocol):
    """What checks ask of a region: its result, the nodes that it replaces, and those that it reads."""

    @property
    def output(self) -> Node: ...

    @property
    def inside(self) -> tuple[Node, ...]: ...

    @property
    def read(self) -> tuple[Node, ...]: ...


class Check(NamedTuple):
    """What may refuse a region, and the code of that. The region is the family's own type."""

    code: str
    refuse: Callable[[Any, Order], Found]


def first_refusal(region: Region, checks: Iterable[Check]) -> Refusal | None:
    """The first check that refuses the region."""
    order = Order.of(region.output.graph)
    for check in checks:
        found = check.refuse(region, order)
        if found is not None:
            reason, node = found if isinstance(found, tuple) else (found, region.output)
            return Refusal(check.code, reason, node)
    return None


def _transformed(region: Region, order: Order) -> Found:
    transform = active_transform()
    return f"it is called inside of {transform}" if transform else None


def _several_devices(region: Region, order: Order) -> Found:
    devices = sorted({str(value_of(node).device) for node in region.read})
    return f"its tensors are on {', '.join(devices)}" if len(devices) > 1 else None


def _footprint(region: Region) -> Footprint:
    return Footprint(region.output, region.inside, region.read)


TRANSFORMED = Check("transformed", _transformed)
DEVICE = Check("device", _several_devices)
MUTATION = Check("mutation", lambda region, order: write_between(_footprint(region), order))
CONTEXT = Check("context", lambda region, order: mode_switch(_footprint(region), order))
STRIDED = Check("as_strided", lambda region, order: strided_read(_footprint(region)))
