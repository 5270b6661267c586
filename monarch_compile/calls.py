"""How a site is called, as far as the time that its call takes depends on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

REPLAYED = "replayed"
"""A CUDA graph, or C++, launches the kernels: a site takes nothing of the host."""
COMPILED = "compiled"
"""Inductor's Python wrapper launches them."""
EAGER = "eager"
"""Eager code does, one operator at a time."""


@dataclass(frozen=True)
class Calls:
    """How a site is called, and what else its graph does for each of its sites.

    launcher: who launches kernels: `REPLAYED`, `COMPILED` or `EAGER`.
    trains: whether a backward pass of the site follows.
    dense_flops: FLOP of products with weights, for each position of each sequence; dense_ops: how many they are.
    share: of the call of the graph.
    """

    launcher: str = REPLAYED
    trains: bool = False
    dense_flops: float = 0.0
    dense_ops: float = 0.0
    share: float = 0.0


def is_trained(inputs: Iterable[object]) -> bool:
    """Whether a backward pass goes through what is called with these inputs now."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def active_transform() -> str:
    """What differentiates or batches calls now: "torch.func", "forward_ad" or "" (nothing).

    Dynamo guards its graphs on this state, so that the value at compile time holds for every call of a graph.
    """
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func"
    return "forward_ad" if forward_ad._current_level >= 0 else ""


vars(active_transform)["_dynamo_marked_constant"] = True  # torch.compiler.assume_constant_result would import Dynamo


DEVICE_ALONE = Calls()
"""The device's time of a forward pass, as a benchmark of kernels measures it."""


@dataclass(frozen=True)
class Launcher:
    """Who launches the kernels of graphs: of those with static sizes, and of those with symbolic ones.

    infers: whether no backward pass follows, whatever the inputs ask for.
    """

    static: str
    dynamic: str
    infers: bool = False

    def of(self, *, symbolic: bool) -> str:
        """That of a graph."""
        return self.dynamic if symbolic else self.static


AHEAD_OF_TIME = Launcher(REPLAYED, REPLAYED, infers=True)
"""AOTInductor compiles programs, whose parameters still want gradients, to C++ without a backward pass."""


def launcher_of(patches: Mapping[str, Any] | None = None) -> Launcher:
    """Who launches what Inductor compiles under `patches` of its config, those of a mode included."""
    from torch._inductor import config

    def setting(name: str) -> bool:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        return bool((patches or {}).get(name, value))

    if setting("cpp_wrapper"):
        return Launcher(REPLAYED, REPLAYED)
    if not setting("triton.cudagraphs"):
        return Launcher(COMPILED, COMPILED)
    return Launcher(REPLAYED, COMPILED if setting("triton.cudagraph_skip_dynamic_graphs") else REPLAYED)
