"""Gradients of Monarch attention: which run on kernels, and the others, as the vjp of the reference.

Options are the operator's arguments after its tensors, in their order (`OPTIONS`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.blocking import plain_window
from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.ir import differentiated_by_kernels, is_exact
from monarch_compile.attention.reference import reference
from monarch_compile.calls import is_trained

OPTIONS = ("scale", *FORM_OPTIONS, "grid", "causal")
"""The operators' parameters after q, k, v and key_mask, in order; keyword arguments of `reference`."""


def named(
    scale: float,
    block_size: int,
    num_iters: int,
    init: str,
    pad: str,
    window: Sequence[int] | None,
    prefix: int,
    tile: Sequence[int] | None = None,
    window_shape: str = "box",
    prefix_at_end: bool = False,
    chosen: int = 0,
    grid: Sequence[int] | None = None,
    causal: bool = False,
) -> dict[str, Any]:
    """The options by name, as plain numbers: under dynamic shapes a caller's may come as symbols, which are part of
    what is computed. The grid's sizes may stay symbols."""
    return {
        "scale": float(scale),
        "block_size": int(block_size),
        "num_iters": int(num_iters),
        "init": init,
        "pad": pad,
        "window": None if window is None else plain_window(tuple(map(int, window))),
        "prefix": int(prefix),
        "tile": None if tile is None else tuple(map(int, tile)),
        "window_shape": window_shape,
        "prefix_at_end": bool(prefix_at_end),
        "chosen": int(chosen),
        "grid": None if grid is None else tuple(grid),
        "causal": causal,
    }


def place_has_kernels(x: Tensor) -> bool:
    """Whether gradients of attention of such tensors may run on kernels."""
    return x.device.type == "cuda" and x.dtype != torch.float64


def run_on_kernels(q: Tensor, k: Tensor, options: Sequence[Any]) -> bool:
    """Whether kernels give the gradients of attention between q (E, H, N_q, D) and k (E, H_kv, N_k, D).

    Symbolic lengths are guarded on, as the forward pass does.
    """
    if not place_has_kernels(q):
        return False
    own = named(*options)
    form = _form(*(own[name] for name in FORM_OPTIONS))
    if is_exact(q.shape[2], k.shape[2], form.block_size, form.prefix):
        return False
    return differentiated_by_kernels(form, is_cross=bool(q.shape[2] != k.shape[2]), is_causal=own["causal"])


def by_reference(
    grad: Tensor, tensors: Sequence[Tensor | None], wanted: Sequence[bool], options: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Gradients of `reference` with respect to those of q, k, v and key_mask that are wanted, None for the others.

    They are made of differentiable operations. A key_mask that is wanted is a floating one.
    """
    own = named(*options)
    places = [place for place, is_wanted in enumerate(wanted) if is_wanted]

    def again(*given: Tensor) -> Tensor:
        everything = list(tensors)
        for place, x in zip(places, given, strict=True):
            everything[place] = x
        return reference(*everything, **own)  # type: ignore[arg-type]

    with _without_hooks():
        grads = dict(zip(places, torch.func.vjp(again, *(tensors[place] for place in places))[1](grad), strict=True))
    return tuple(grads.get(place) for place in range(len(tensors)))


def are_wanted(tensors: Sequence[Tensor | None], form: Form, *, is_cross: bool, is_causal: bool) -> bool:
    """Whether a call with these tensors will be differentiated, in a form whose gradients have kernels."""
    return is_trained(tensors) and differentiated_by_kernels(form, is_cross=is_cross, is_causal=is_causal)


@contextlib.contextmanager
def _popped_hooks() -> Iterator[None]:
    popped = []
    while (top := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        popped.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for hooks in reversed(popped):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def _without_hooks() -> contextlib.AbstractContextManager[None]:
    """A context without hooks on saved tensors, which torch.func refuses.

    There are some where a compiled function is called under a checkpoint; AOTAutograd lets them rest while it traces.
    """
    return contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else _popped_hooks()


@functools.lru_cache(maxsize=1024)
def _form(*values: Any) -> Form:
    """Checked once: a call of eager code waits for it."""
    return Form(*values).simplest()
