"""Functions of users, by the names that the command line gives them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def load(target: str) -> Callable[..., Any]:
    """The function that module:function names; modules of the current folder are found.

    Raises:
        SystemExit: there is none.
    """
    module_name, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"--peer takes module:function; cannot load {target!r}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    return function
