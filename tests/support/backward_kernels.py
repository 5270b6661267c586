"""Stand-ins for the backward kernels: what tests of the paths to them run on the CPU, opaque as kernels are."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.compiler import config as compiler_config

from monarch_compile.attention import gradients
from monarch_compile.attention.reference import reference, reference_with_lse

MODULE = "monarch_compile.codegen.attention.gradients"


@torch.library.custom_op("monarch_tests::attention_backward", mutates_args=())
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    block_size: int,
    window: int | None,
    prefix: int,
    pad: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The vjp of the reference; NaN where output and logsumexp are not those of the forward pass."""
    form = {"scale": scale, "block_size": block_size, "window": window, "prefix": prefix, "pad": pad}
    mask = visible if bias is None else bias

    def run() -> tuple[Tensor, ...]:
        expected, total = reference_with_lse(q, k, v, mask, **form)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(lse, total)
        if bias is None:
            run = torch.func.vjp(lambda q, k, v: reference(q, k, v, visible, **form), q, k, v)[1]
            return (*run(grad), q.new_empty(0))
        return torch.func.vjp(lambda q, k, v, b: reference(q, k, v, b, **form), q, k, v, bias)[1](grad)

    with ThreadPoolExecutor(1) as pool:  # below autograd, where an operator runs, nothing can be differentiated
        found = pool.submit(run).result()
    return tuple(dense(x) for x in found)  # type: ignore[return-value]


@backward.register_fake
def _(grad, q, k, v, bias, visible, output, lse, *options):  # type: ignore[no-untyped-def]
    return *(dense(torch.empty_like(x)) for x in (q, k, v)), q.new_empty(0) if bias is None else bias.float()


def dense(x: Tensor) -> Tensor:
    """A copy of (batch, heads, seq, dim) in the memory order (batch, seq, heads, dim)."""
    return x.clone() if x.dim() != 4 else x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


@pytest.fixture
def backward_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The CPU has backward kernels while this lasts; the names of what was launched, at run time or while tracing.

    Compile caches, which do not know of these, are off.
    """
    launched: list[str] = []

    def launch_with_lse(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, **options: Any) -> Any:
        launched.append("forward")
        return reference_with_lse(q, k, v, key_mask, **options)

    def launch_backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        output: Tensor,
        lse: Tensor,
        **options: Any,
    ) -> Any:
        launched.append("backward")
        floating = key_mask is not None and key_mask.is_floating_point()
        masks = (key_mask, None) if floating else (None, key_mask)
        names = ("scale", "block_size", "window", "prefix", "pad")
        found = backward(grad, q, k, v, *masks, output, lse, *(options[name] for name in names))
        return (*found[:3], found[3] if floating else None)

    stub: Any = types.ModuleType(MODULE)
    stub.launch_with_lse, stub.launch_backward = launch_with_lse, launch_backward
    monkeypatch.setitem(sys.modules, MODULE, stub)
    monkeypatch.setattr(gradients, "place_has_kernels", lambda x: True)
    with compiler_config.patch(force_disable_caches=True):
        yield launched
