"""A results file that a later run of the same benchmark, on the same device and versions, goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monarch_compile.tools.timing import environment

FORWARD = "forward"
STEP = "step"
"""A forward and a backward pass."""


def machine(place: str) -> dict[str, str]:
    """Device, versions and date; everything but the date decides whether rows can stand side by side."""
    found = {name: str(value) for name, value in environment().items()}
    if place == "cpu":
        return found
    import triton

    gpu = {"gpu": torch.cuda.get_device_name(), "triton": triton.__version__}
    gpu["cudnn"] = str(torch.backends.cudnn.version())
    return gpu | {name: found[name] for name in ("date", "python", "torch", "monarch_compile")}


def opened(path: Path, empty: Mapping[str, Any], *, fresh: bool) -> dict[str, Any]:
    """The file's content where a run that would start from `empty` can go on with it, else `empty`.

    Both hold "environment" (of `machine`), "clocks" and "rows", and may hold the "pass" that is timed: `FORWARD`, which
    it is where nothing is said, or `STEP`.

    Raises:
        SystemExit: the file holds something else, or another pass.
    """
    if fresh or not path.is_file():
        return dict(empty)
    now = empty["environment"]
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        same = {**content["environment"], "date": now["date"]} == now and content["clocks"] == empty["clocks"]
        same = same and isinstance(content["rows"], list)
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} holds no results of this benchmark ({error!r}); name another file") from error
    if content.get("pass", FORWARD) != empty.get("pass", FORWARD):
        raise SystemExit(f"{path} holds times of another pass ({content.get('pass', FORWARD)!r}); name another file")
    if not same:
        print(f"{path} was measured elsewhere or with other versions: it is made anew", flush=True)
    return content if same else dict(empty)


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
