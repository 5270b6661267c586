"""The form of a Monarch attention: how it approximates softmax attention, one value with one table of rules.

Notation follows arXiv 2505.18698: keys are cut into blocks of `block_size`, queries into as many blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from monarch_compile.errors import IRError
from monarch_compile.rules import OptionRule, at_least, broken_rule, one_of, or_else

INITS = ("identity", "mean")
PADS = ("post", "pre")


FORM_RULES: dict[str, OptionRule] = {
    "block_size": at_least(1),
    "num_iters": at_least(1),
    "init": one_of(INITS),
    "pad": one_of(PADS),
    "window": or_else(None, at_least(0)),
    "prefix": at_least(0),
}


@dataclass(frozen=True)
class Form:
    """How a Monarch attention approximates softmax attention: one value for each site, which a plan may choose.

    block_size: keys in a block. num_iters: pairs of updates of the Monarch factors.
    init: start from a block's own queries ("identity") or from their mean. pad: pad the sequence to whole blocks after
        ("post") or before it ("pre").
    window: blocks on each side of a query's own block that it attends to exactly (0: its own only; None: no window, the
        paper's form).
    prefix: leading keys that every query attends to exactly, and as many queries that attend to every key exactly:
        blocks are of what follows.

    Raises:
        IRError: an option is not allowed.
    """

    family: ClassVar[str] = "attention"

    block_size: int
    num_iters: int = 1
    init: str = "identity"
    pad: str = "post"
    window: int | None = None
    prefix: int = 0

    def __post_init__(self) -> None:
        wrong = broken_rule(vars(self), FORM_RULES)
        if wrong is not None:
            raise IRError(wrong)

    @property
    def has_exact_keys(self) -> bool:
        """Whether some keys are attended to exactly: a window's or a prefix's. The paper's form has none."""
        return self.window is not None or self.prefix > 0

    def across(self) -> Form:
        """The form between sequences of different lengths."""
        return replace(self, **ACROSS)


ACROSS: dict[str, Any] = {"init": "mean", "window": None, "prefix": 0}
"""Options of every form between sequences of different lengths, where no position corresponds to another."""

FORM_OPTIONS = tuple(f.name for f in fields(Form))
"""Names of the options of a form, in the order of `Form` and of the operator's arguments."""
