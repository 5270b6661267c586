"""What the compiler found of a model's attention sites: equal ones together, in the order of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from monarch_compile.report.report import Site


@dataclass(frozen=True)
class SiteGroup:
    """Sites to which the same happened.

    status, code: "lowered" or "exact", and the code of the outcome. shape: sizes of the attention, in words.
    grid: axes that the tokens flatten, as found in the graph; None: none, or not looked for.
    prefix: tokens before it, or after it where `prefix_at_end`.
    block_size, tile, window, window_shape: of the Monarch form; None where there is none. blocking: a line about the
    grid: where it was found, or why there is none.
    """

    status: str
    code: str
    shape: str
    grid: tuple[int, ...] | None
    prefix: int | None
    prefix_at_end: bool
    block_size: int | None
    tile: tuple[int, ...] | None
    window: int | None
    window_shape: str | None
    blocking: str

    @classmethod
    def of(cls, site: Site) -> SiteGroup:
        """That of one site."""
        if site.ir is None:
            return cls(site.status, site.code, site.shape, None, None, False, *(None,) * 4, blocking=site.blocking)
        form, grid = site.ir.form, site.ir.grid
        sizes = None if grid is None else tuple(int(size) for size in grid)
        shape = form.window_shape if form.tile is not None else None
        chosen = (form.block_size, form.tile, form.window, shape)
        return cls(site.status, site.code, site.shape, sizes, form.prefix, form.prefix_at_end, *chosen, site.blocking)


def grouped(sites: Iterable[Site]) -> tuple[dict[str, Any], ...]:
    """Groups as JSON has them, each with the `number` of its sites."""
    counted = Counter(SiteGroup.of(site) for site in sites)
    return tuple({"number": number, **vars(group)} for group, number in counted.items())


def in_words(group: Mapping[str, Any]) -> str:
    """A group as tables show it."""
    head = f"{group['number']} x {group['status']}"
    if group["status"] != "lowered":
        head += f" ({group['code']})"
    if group["block_size"] is None:
        return f"{head}: {group['shape']}"
    side = "before" if group.get("prefix_at_end") else "after"  # results of earlier versions do not say
    prefix = f" {side} {group['prefix']}" if group["prefix"] else ""
    where = f"grid {_by(group['grid'])}{prefix}" if group["grid"] else f"no grid{prefix}"
    blocks = f"tiles {_by(group['tile'])}" if group["tile"] else f"pieces of {group['block_size']}"
    shape = f" {group['window_shape']}" if group["tile"] and group["window"] else ""
    return f"{head}: {group['shape']}, {where}, {blocks}, window {group['window']}{shape}"


def _by(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))
