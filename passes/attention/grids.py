"""The token grid of a site: given by hand, or found where its queries, keys and values come from."""

from __future__ import annotations

from monarch_compile.attention.grids import Grid, grid_by_hand
from monarch_compile.config import MonarchConfig
from monarch_compile.passes.attention.region import AttentionRegion
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.elements.token_grid import NoGrid, TokenGrid, token_grid
from monarch_compile.passes.graph import source_of


def site_grid(site: AttentionRegion, config: MonarchConfig, layouts: Layouts) -> tuple[Grid | None, str]:
    """The grid of a site's tokens and a line about it; no grid, and why, where none is known.

    Raises:
        ConfigError: the grid that the options give does not make up the sequence.
    """
    if site.is_cross or site.is_causal or site.length is not None or config.grid is None or config.tile is None:
        return None, ""
    grid = grid_by_hand(config, site.k_shape[2])
    if grid is not None:
        return grid, f"{described(grid)}, given by option grid"
    axes = [(operand.node, operand.dims[-2]) for operand in (site.q, site.k, site.v)]
    found = [token_grid(node, dim, layouts) for node, dim in axes if dim is not None]
    for one in found:
        if isinstance(one, NoGrid):
            return None, f"no token grid: {one.reason}"
    known = [one for one in found if isinstance(one, TokenGrid)]
    grids = [_sizes(one) for one in known]
    if len({str(grid) for grid in grids}) != 1 or len(grids) < 3:
        return None, "no token grid: queries, keys and values have different ones"
    if len({one.order for one in known}) != 1:
        return None, "no token grid: queries, keys and values run along the axes of their images in different orders"
    if str(grids[0].num_tokens) != str(site.k_shape[2]):
        return None, f"no token grid: {described(grids[0])} has not the {site.k_shape[2]} tokens of the site"
    source = known[0].source
    line = source_of(source)
    return grids[0], f"{described(grids[0])}, flattened by {source.name}" + (f" ({line})" if line else "")


def described(grid: Grid) -> str:
    """The grid in words."""
    sizes = " x ".join(map(str, grid.sizes))
    tokens = "token" if grid.prefix == 1 else "tokens"
    side = "before" if grid.prefix_at_end else "after"
    return f"a grid of {sizes} tokens" + (f" {side} {grid.prefix} {tokens}" if grid.prefix else "")


def _sizes(found: TokenGrid) -> Grid:
    sizes = tuple(axis.size for axis in found.axes)
    return Grid(found.prefix or found.suffix, sizes, prefix_at_end=found.suffix > 0)
