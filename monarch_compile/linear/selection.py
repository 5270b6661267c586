"""Which form the operator runs for given tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from monarch_compile.errors import InputError
from monarch_compile.linear import forms
from monarch_compile.linear.ir import BLAST, FORMS, KERNEL_FORMS, MONARCH, PRODUCTS, STAGED, BlockLinear

MAX_OFFSET = 2**31 - 1
"""Kernels reach over so many elements of a row of x, and of a factor, at most."""


def form_for(x: Tensor, first: Tensor, second: Tensor, coupling: Tensor | None, request: str) -> str:
    """The form that the operator runs for a request.

    Raises:
        InputError: there is no such request.
    """
    if request not in forms.REQUESTS:
        raise InputError(f"form must be one of {', '.join(forms.REQUESTS)}; found {request!r}")
    if request in FORMS:
        return request
    if not forms.has_kernels(x.device) or _reaches_far(x, first, second, coupling) or _is_empty(x):
        return PRODUCTS
    return forms.resolved(ir_of(x, first, second, coupling), math.prod(x.shape[:-1]), x.device, request)


def has_gradient_kernels(
    grad: Tensor, x: Tensor, first: Tensor, second: Tensor, coupling: Tensor | None, request: str
) -> bool:
    """Whether gradients run on the emitted kernels: of a Monarch linear whose forward pass does.

    grad: that of its result.
    """
    if coupling is not None or form_for(x, first, second, coupling, request) not in KERNEL_FORMS:
        return False
    if _reaches_far(grad):
        return False
    return not forms.why_not(ir_of(x, first, second, coupling), STAGED)


def ir_of(x: Tensor, first: Tensor, second: Tensor, coupling: Tensor | None) -> BlockLinear:
    """The IR of some tensors, for any number of tokens, without bias and activation."""
    blocks = (first.shape[0], second.shape[0])
    sizes = (x.shape[-1], second.shape[0] * second.shape[1], *blocks, first.shape[-2])
    return _ir(MONARCH if coupling is None else BLAST, *map(int, sizes), x.dtype)


@functools.lru_cache(maxsize=1024)
def _ir(
    kind: str, in_features: int, out_features: int, in_blocks: int, out_blocks: int, rank: int, dtype: torch.dtype
) -> BlockLinear:
    return BlockLinear(kind, "M", in_features, out_features, in_blocks, out_blocks, rank, dtype)


def _is_empty(x: Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in x.shape)


def _reaches_far(x: Tensor, *factors: Tensor | None) -> bool:
    """Whether offsets inside of a row of x, or of a factor, may not fit into 32 bits."""
    wholes = [[(x.shape[-1], x.stride(-1))], *(_dims(factor) for factor in factors if factor is not None)]
    return any(_reach(whole) > MAX_OFFSET for whole in wholes)


def _dims(x: Tensor) -> list[tuple[Any, Any]]:
    return list(zip(x.shape, x.stride(), strict=True))


def _reach(dims: Iterable[tuple[Any, Any]]) -> Any:
    return sum((size - 1) * stride for size, stride in dims)
