"""What a run of `distill` leaves on disk, so that a later one goes on where it was stopped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from monarch_compile.distillation.training import Progressed
from monarch_compile.errors import InputError

VERSION = 2


@dataclass(eq=False)
class Checkpoint:
    """path: of the file; None: nothing is written. key: a hash of all that the run depends on.

    done: for each group that has learned, the new weights of its parameters, which of their elements may change, and
    its rows of the report, as plain values. current: the group that was learning, and where it was.
    """

    path: Path | None
    key: str
    done: dict[int, dict[str, Any]] = field(default_factory=dict)
    current: tuple[int, Progressed] | None = None

    @staticmethod
    def open(path: str | Path | None, key: str) -> Checkpoint:
        """What the file at `path` holds, or an empty checkpoint where there is none.

        Raises:
            InputError: the file is no checkpoint, or one of a run with other arguments, calls or weights.
        """
        checkpoint = Checkpoint(None if path is None else Path(path), key)
        if checkpoint.path is None or not checkpoint.path.exists():
            return checkpoint
        try:
            content = torch.load(checkpoint.path, map_location="cpu", weights_only=True)
            found = (content["version"], content["key"])
            checkpoint.done, current = content["done"], content["current"]
            checkpoint.current = None if current is None else (current[0], Progressed(**current[1]))
        except Exception as error:  # a torn or foreign file fails in many ways
            raise InputError(f"{path} is no checkpoint of distill: {error!r}") from error
        if found != (VERSION, key):
            raise InputError(
                f"{path} is the checkpoint of another run: the model's weights, the calls and all arguments must be "
                "those that it was begun with; remove it or name another file"
            )
        return checkpoint

    def write(self) -> None:
        """Replace the file, at once or not at all."""
        if self.path is None:
            return
        current = None if self.current is None else (self.current[0], dict(vars(self.current[1])))
        content = {"version": VERSION, "key": self.key, "done": self.done, "current": current}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        torch.save(content, partial)
        os.replace(partial, self.path)


def digest(parts: Iterable[Any]) -> str:
    """A hash of values and of the bytes of the tensors in them."""
    hashed = hashlib.sha256()
    for leaf in pytree.tree_leaves(list(parts)):
        if isinstance(leaf, Tensor):
            hashed.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            hashed.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            hashed.update(repr(leaf).encode())
    return hashed.hexdigest()
