"""The form of a Monarch attention: how it approximates softmax attention, one value with one table of rules.

Notation follows arXiv 2505.18698: keys are cut into blocks of `block_size`, queries into as many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from monarch_compile.attention.blocking import Window, plain_window, steps_to_neighbours
from monarch_compile.errors import IRError
from monarch_compile.rules import FLAG, OptionRule, at_least, broken_rule, either, one_of, or_else, tuple_of

INITS = ("identity", "mean")
PADS = ("post", "pre")
WINDOW_SHAPES = ("box", "plus")
MAX_AXES = 3
"""The most axes of a token grid: time, height and width."""

FORM_RULES: dict[str, OptionRule] = {
    "block_size": at_least(1),
    "num_iters": at_least(1),
    "init": one_of(INITS),
    "pad": one_of(PADS),
    "window": or_else(None, either(at_least(0), tuple_of(0, range(1, MAX_AXES + 1)))),
    "prefix": at_least(0),
    "tile": or_else(None, tuple_of(1, range(1, MAX_AXES + 1))),
    "window_shape": one_of(WINDOW_SHAPES),
    "prefix_at_end": FLAG,
    "chosen": at_least(0),
}


def wrong_window(window: object, tile: Sequence[int] | None) -> str | None:
    """What is wrong with a window that has a number for each axis, beside a tile; None where nothing is."""
    if not isinstance(window, (tuple, list)) or (tile is not None and len(window) == len(tile)):
        return None
    if tile is None:
        return f"'window' must be one number, or None, where blocks are no tiles; found {window!r}"
    each = f"one for each of the {len(tile)} axes of {tuple(tile)}"
    return f"'window' must be one number, or {each}; found {window!r}"


def weighs_own_block_exactly(num_iters: int, init: str) -> bool:
    """Whether a row's own block is weighed by that row's own scores: in one iteration from the identity start."""
    return num_iters == 1 and init == "identity"


@dataclass(frozen=True)
class Form:
    """How a Monarch attention approximates softmax attention: one value for each site, which a plan may choose.

    block_size: keys in a block. num_iters: pairs of updates of the Monarch factors.
    init: start from a block's own queries ("identity") or from their mean. pad: pad the sequence to whole blocks after
        ("post") or before it ("pre").
    window: blocks on each side of a query's own block that it attends to exactly, counted along each axis where blocks
        are tiles (0: its own only; None: no window, the paper's form). With a tile it may be a number for each axis,
        such as (0, 1, 1) for neighbours within a frame of a video; the same number for all of them is that number.
    prefix: leading keys that every query attends to exactly, and as many queries that attend to every key exactly:
        blocks are of what follows.
    tile: tokens of a block along each axis of the grid that the sequence flattens, block_size in all; None: a block is
        a piece of the sequence.
    window_shape: of which tiles a window consists, all that are at most `window` away along each axis ("box") or those
        of them that lie along one axis ("plus"). It makes no difference to pieces of a sequence.
    prefix_at_end: whether the tokens of the prefix are the last of the sequence, as text that comes after an image;
        blocks are then of what comes before them. Without a prefix it is False.
    chosen: blocks outside of the window that each block of queries attends to exactly, those of most far-field mass
        (`chosen.far_masses`), for each key head by itself; its own block is exact then, too.

    Raises:
        IRError: an option is not allowed.
    """

    family: ClassVar[str] = "attention"

    block_size: int
    num_iters: int = 1
    init: str = "identity"
    pad: str = "post"
    window: Window | None = None
    prefix: int = 0
    tile: tuple[int, ...] | None = None
    window_shape: str = "box"
    prefix_at_end: bool = False
    chosen: int = 0

    def __post_init__(self) -> None:
        wrong = broken_rule(vars(self), FORM_RULES) or self._wrong_tile() or wrong_window(self.window, self.tile)
        wrong = wrong or self._wrong_choice()
        if wrong is not None:
            raise IRError(wrong)
        object.__setattr__(self, "window", plain_window(self.window))
        if self.tile is not None:
            object.__setattr__(self, "tile", tuple(self.tile))
        if not self.prefix:
            object.__setattr__(self, "prefix_at_end", False)

    def _wrong_tile(self) -> str | None:
        if self.tile is None:
            return None
        if math.prod(self.tile) != self.block_size:
            return f"'tile' must hold block_size {self.block_size} tokens; found {self.tile}"
        return "'pad' must be 'post' with a tile; found 'pre'" if self.pad != "post" else None

    def _wrong_choice(self) -> str | None:
        if not self.chosen or self.weighs_own_block_exactly:
            return None
        return f"'chosen' needs num_iters=1 and init='identity'; found num_iters={self.num_iters}, init={self.init!r}"

    def __str__(self) -> str:
        of_tiles = ("tile", "window_shape") if self.tile is None else ()
        of_prefix = () if self.prefix_at_end else ("prefix_at_end",)
        hidden = of_tiles + of_prefix
        shown = (f"{name}={value!r}" for name, value in self.stored().items() if name not in hidden)
        return f"Form({', '.join(shown)})"

    def stored(self) -> dict[str, Any]:
        """The options by name, as plans keep and print them: `chosen`, which older plans lack, where it is not 0."""
        return {name: value for name, value in vars(self).items() if name != "chosen" or value}

    @property
    def has_exact_keys(self) -> bool:
        """Whether some keys are attended to exactly: a window's, a prefix's or chosen ones. The paper has none."""
        return self.window is not None or self.prefix > 0 or self.chosen > 0

    @property
    def weighs_own_block_exactly(self) -> bool:
        """`weighs_own_block_exactly` of its options."""
        return weighs_own_block_exactly(self.num_iters, self.init)

    def simplest(self, *, is_causal: bool = False) -> Form:
        """The form that gives the same with the least work.

        Causal attention and chosen blocks come with an exact own block, as in a window of 0. In others, one iteration
        from the identity start weighs a row's own block by that row's own scores, exactly, as a window of 0 does:
        without one, there is no group of keys to be merged.
        """
        if is_causal or self.chosen:
            return replace(self, window=self.window or 0)
        own_alone = self.window == 0 and self.weighs_own_block_exactly
        return replace(self, window=None) if own_alone else self

    def one_axis(self) -> Form:
        """The form of pieces that takes the same work: the same block size, and a window of as many blocks."""
        if self.tile is None:
            return self
        window = self.window and (len(steps_to_neighbours(self.window, self.window_shape, len(self.tile))) - 1) // 2
        return replace(self, tile=None, window=window, window_shape="box")

    def arguments(self) -> tuple[Any, ...]:
        """The operator's arguments, in its order."""
        return as_arguments({name: getattr(self, name) for name in FORM_OPTIONS})  # Dynamo of torch 2.11: no vars(self)

    def across(self) -> Form:
        """The form between sequences of different lengths."""
        return replace(self, **ACROSS)


def as_arguments(options: Mapping[str, Any]) -> tuple[Any, ...]:
    """Options of the operator as its arguments, in their order: lists for tuples, and a window always as a list."""
    listed = []
    for name, value in options.items():
        is_number = name == "window" and value is not None and not isinstance(value, (tuple, list))
        listed.append([value] if is_number else list(value) if isinstance(value, tuple) else value)
    return tuple(listed)


ACROSS: dict[str, Any] = {"init": "mean", "window": None, "prefix": 0, "tile": None, "chosen": 0}
"""Options of every form between sequences of different lengths, where no position corresponds to another."""

FORM_OPTIONS = tuple(f.name for f in fields(Form))
"""Names of the options of a form, in the order of `Form` and of the operator's arguments."""
