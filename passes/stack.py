"""A call with a chunk of the stack of its own: no call below it is slow because of where it stands on the stack."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

SLOTS = 9000
"""Of eight bytes: a frame of so many has a chunk of the stack to itself, and leaves over 50 KB of it to those below."""


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_NAME = "with_stack_chunk"
with_stack_chunk: Callable[..., Any] = types.FunctionType(_call.__code__.replace(co_stacksize=SLOTS), globals(), _NAME)
"""`with_stack_chunk(function, *args)` is `function(*args)`.

CPython, from 3.11 on, keeps frames in chunks of 16 KB. A call that crosses the border of a chunk asks the system for a
new one, and gives it back when it returns: tracing a graph at an unlucky depth took up to 1.6 times as long.
"""
