"""The grid of axes that tokens flatten, such as the height and width of an image, and the tiles that suit one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from monarch_compile.attention.blocking import Window
from monarch_compile.attention.form import wrong_window
from monarch_compile.errors import ConfigError

if TYPE_CHECKING:
    from monarch_compile.config import MonarchConfig

Size = Any
"""An int, or a torch.SymInt, which is guarded on where it is compared."""


@dataclass(frozen=True)
class Grid:
    """How the tokens of a sequence lie: first `prefix` tokens outside of the grid, then the grid, row by row.

    sizes: tokens along each axis, the last of which runs fastest. prefix_at_end: the grid first, then these tokens.
    """

    prefix: int
    sizes: tuple[Size, ...]
    prefix_at_end: bool = False

    @property
    def num_tokens(self) -> Size:
        """All tokens of the sequence, the prefix among them."""
        return self.prefix + math.prod(self.sizes)


def grid_by_hand(config: MonarchConfig, seq_len: Size) -> Grid | None:
    """The grid that the options give for a sequence of `seq_len` tokens; None where they give none.

    Raises:
        ConfigError: prefix and grid do not make up the sequence.
    """
    if not isinstance(config.grid, tuple):
        return None
    prefix = config.prefix if isinstance(config.prefix, int) else 0
    grid = Grid(prefix, config.grid, config.prefix_at_end is True)
    if seq_len != grid.num_tokens:
        sizes = " * ".join(map(str, grid.sizes))
        raise ConfigError(
            f"options prefix and grid make up {grid.prefix} + {sizes} = {grid.num_tokens} tokens; found self-attention "
            f"over {seq_len}. grid='auto' looks for each site's own"
        )
    return grid


class Tiling(NamedTuple):
    """The tiles, and their window, of grids of at least `start` tokens; the other fields are those of `Form`."""

    start: int
    tile: tuple[int, ...]
    window: Window | None
    window_shape: str = "box"


_IMAGES = (Tiling(1, (4, 4), 1, "plus"), Tiling(1024, (8, 8), 1, "plus"))
_VIDEOS = (Tiling(1, (2, 4, 4), None), Tiling(4096, (4, 4, 4), None))
TILES: dict[tuple[str, int], tuple[Tiling, ...]] = {
    ("cpu", 2): _IMAGES,
    ("cuda", 2): _IMAGES,
    ("cpu", 3): _VIDEOS,
    ("cuda", 3): _VIDEOS,
}
"""(kind of device, axes of the grid) -> what "auto" stands for; with one axis, blocks are pieces of the sequence.

Those of images have the least error of features on photographs among the forms that take at most 1.2 times as long as
pieces with a window of 1 (benchmarks/NOTES.md). Those of videos are chosen by their time alone.
"""


def takes_tiles(config: MonarchConfig, grid: Grid | None) -> bool:
    """Whether blocks are tiles of a known grid, as far as the options say; else they are pieces of the sequence."""
    if grid is None or len(grid.sizes) == 1 or config.tile is None or config.pad != "post":
        return False
    if config.prefix not in ("auto", grid.prefix):
        return False
    if grid.prefix and config.prefix_at_end not in ("auto", grid.prefix_at_end):
        return False
    return config.block_size == "auto" if config.tile == "auto" else len(config.tile) == len(grid.sizes)


def check_window(config: MonarchConfig, tile: tuple[int, ...]) -> None:
    """Raise ConfigError where the option window has another number of axes than a site's tile."""
    wrong = wrong_window(config.window, tile)
    if wrong is not None:
        raise ConfigError(f"option {wrong}")


def tiling_at(kind: str, num_axes: int, num_tokens: Size) -> Tiling:
    """What "auto" stands for where `num_tokens` lie on a grid of `num_axes`: a row of `TILES`."""
    rows = TILES[kind, num_axes]
    return next((row for row in reversed(rows[1:]) if num_tokens >= row.start), rows[0])
