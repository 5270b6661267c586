"""The forms that `calibrate` considers for a site, and what the cost model says of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from monarch_compile.attention.blocking import Window, along_axes
from monarch_compile.attention.form import ACROSS, FORM_OPTIONS, Form, weighs_own_block_exactly
from monarch_compile.attention.grids import tiling_at
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import MARGIN
from monarch_compile.family import Occurrence, total_seconds

SEARCH: dict[str, tuple[Any, ...]] = {
    "block_size": (0.5, 1, 2, 4),  # times what "auto" is
    "num_iters": (1, 2),
    "init": ("identity", "mean"),
    "pad": ("post",),
    "window": (None, 1, 2, 4, 8),
    "prefix": (0, 4),
    "tile": (None,),
    "window_shape": ("box",),
    "prefix_at_end": (False,),
    "chosen": (0,),
}
"""What is tried for each option that the caller has not fixed."""

ON_GRID: dict[str, tuple[Any, ...]] = {
    "tile": (0.5, 1, 2),  # times as many tokens as what "auto" is
    "window": (None, 0, 1),
    "window_shape": ("box", "plus"),
}
"""What is tried instead where the tokens are known to lie on a grid of several axes."""

OWN_FRAME, OTHER_FRAMES = (0, 1, 1), (1, 0, 0)
WINDOWS_OF_VIDEOS = (*ON_GRID["window"], OWN_FRAME, OTHER_FRAMES)
"""Windows that are tried on grids of three axes: frames, height, width."""

CAUSAL: dict[str, tuple[Any, ...]] = {
    "num_iters": (1,),
    "init": ("identity",),
    "window": (1, 2),
    "prefix": (0, 64),
    "chosen": (0, 4, 8, 16, 32),
}
"""What is tried instead for causal attention."""


def forms_that_pay(occurrences: Sequence[Occurrence], device: Device, fixed: Mapping[str, Any]) -> list[Form]:
    """Every form of `SEARCH`, with the options in `fixed` kept, that is predicted to be faster than exact attention.

    Where a site has tiles in all of its graphs, the forms are those of `ON_GRID`, where it is causal of `CAUSAL`.
    """
    search = {**SEARCH, **CAUSAL} if any(occurrence.ir.is_causal for occurrence in occurrences) else SEARCH
    if search is not SEARCH and not weighs_own_block_exactly(fixed.get("num_iters", 1), fixed.get("init", "identity")):
        return []
    if any(occurrence.ir.is_cross for occurrence in occurrences):
        fixed = {**fixed, **ACROSS}
    tiled = {(o.ir.form.prefix, o.ir.form.prefix_at_end, len(o.ir.form.tile or ())) for o in occurrences}
    on_grid = len(tiled) == 1 and occurrences[0].ir.form.tile is not None
    forms = _tiles(occurrences[0], device, fixed) if on_grid else _pieces(occurrences[0], device, fixed, search)
    timed = ((form, total_seconds(occurrences, device, form)) for form in forms)
    return [form for form, (exact_s, monarch_s) in timed if monarch_s * MARGIN <= exact_s]


def _combined(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value for each option; blocks are chosen in one iteration from the identity start alone."""
    found = [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]
    return [x for x in found if not x["chosen"] or weighs_own_block_exactly(x["num_iters"], x["init"])]


def _pieces(
    occurrence: Occurrence, device: Device, fixed: Mapping[str, Any], search: Mapping[str, tuple[Any, ...]]
) -> list[Form]:
    values = {name: (fixed[name],) if name in fixed else search[name] for name in FORM_OPTIONS if name != "block_size"}
    values["tile"] = (None,)  # a caller's tile is for the sites on a grid, and so are its axes' windows
    if isinstance(fixed.get("window"), (tuple, list)):
        values["window"] = SEARCH["window"]
    sizes = [(options, _block_sizes(occurrence, device, options, fixed)) for options in _combined(values)]
    return list(dict.fromkeys(Form(block_size=size, **options) for options, found in sizes for size in found))


def _block_sizes(
    occurrence: Occurrence, device: Device, options: Mapping[str, Any], fixed: Mapping[str, Any]
) -> list[int]:
    if "block_size" in fixed:
        return [int(fixed["block_size"])]
    seq_len = _seq_len(occurrence)
    best = auto_block_size(seq_len, device.kind, options["window"], options["prefix"])
    return [max(1, min(seq_len, int(best * factor))) for factor in SEARCH["block_size"]]


def _tiles(occurrence: Occurrence, device: Device, fixed: Mapping[str, Any]) -> list[Form]:
    own = occurrence.ir.form
    best = tiling_at(device.kind, len(own.tile), _seq_len(occurrence) - own.prefix).tile
    tried = {**SEARCH, **ON_GRID, "tile": tuple(resized(best, factor) for factor in ON_GRID["tile"])}
    if len(own.tile) == len(OWN_FRAME):
        tried["window"] = WINDOWS_OF_VIDEOS
    values = {name: (fixed[name],) if name in fixed else tried[name] for name in FORM_OPTIONS if name != "block_size"}
    # Those of the grid, and of all tiles.
    values |= {"prefix": (own.prefix,), "prefix_at_end": (own.prefix_at_end,), "pad": (own.pad,)}
    forms = [Form(block_size=math.prod(options["tile"]), **options) for options in _combined(values)]
    first, axes = values["window_shape"][0], len(own.tile)
    return [form for form in forms if form.window_shape == first or _has_a_shape(form.window, axes)]


def _has_a_shape(window: Window | None, num_axes: int) -> bool:
    """Whether a box and a plus of these sizes are different windows: with neighbours along two axes at least."""
    return window is not None and sum(map(bool, along_axes(window, num_axes))) > 1


def resized(tile: Sequence[int], factor: float) -> tuple[int, ...]:
    """A tile of `factor` (a power of two) times as many tokens, as near to a cube as the powers of two allow."""
    sides = list(tile)
    while factor > 1:
        shortest = len(sides) - 1 - sides[::-1].index(min(sides))
        sides[shortest], factor = sides[shortest] * 2, factor / 2
    while factor < 1 and max(sides) > 1:
        longest = sides.index(max(sides))
        sides[longest], factor = sides[longest] // 2, factor * 2
    return tuple(sides)


def _seq_len(occurrence: Occurrence) -> int:
    seq_len = occurrence.ir.seq_len_k
    return seq_len if isinstance(seq_len, int) else dict(occurrence.hints)[seq_len]
