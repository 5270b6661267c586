"""The meaning of a block linear, by PyTorch's batched products."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.errors import InputError
from monarch_compile.linear.ir import BLOCKED, INTERLEAVED, ORDERS

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
}
"""By the names of `ACTIVATIONS`."""


def reference(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_order: str = BLOCKED,
    activation: str = "none",
) -> Tensor:
    """x (..., in_features) -> (..., out_features), contiguous.

    Factors are as in `BlockLinear`; those of BLAST, where there is a `coupling`. All tensors are of one dtype, in which
    everything is computed. bias: (out_features,), in the order of the output.
    """
    z = between(x, first, coupling)
    y = features(outwards(z, second, coupling is not None), output_order)
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    y = y if bias is None else y + bias
    return ACTIVATE[activation](y).contiguous()


def dense(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_order: str = BLOCKED,
    activation: str = "none",
) -> Tensor:
    """As `reference`, by way of the dense weight, which is rounded to the factors' dtype."""
    y = F.linear(x, expanded(first, second, coupling, output_order), bias)
    return ACTIVATE[activation](y).contiguous()


def between(x: Tensor, first: Tensor, coupling: Tensor | None) -> Tensor:
    """What the second factor is multiplied by: (L, tokens, K * rank) for Monarch, (L, tokens, rank) for BLAST."""
    blocks, width = first.shape[0], first.shape[-1]
    inwards = x.reshape(-1, blocks, width).transpose(0, 1)  # (K, tokens, P)
    tokens = inwards.shape[1]
    if coupling is None:
        out_blocks, rank = first.shape[1:3]
        z = torch.bmm(inwards, first.reshape(blocks, out_blocks * rank, width).mT)
        z = z.reshape(blocks, tokens, out_blocks, rank).permute(2, 1, 0, 3)
        return z.reshape(out_blocks, tokens, blocks * rank)
    return coupled(torch.bmm(inwards, first.mT), coupling)


def coupled(z: Tensor, coupling: Tensor) -> Tensor:
    """sum over b of coupling (L, K, rank) times z (K, tokens, rank): (L, tokens, rank), by a product for each rank."""
    return torch.bmm(z.permute(2, 1, 0), coupling.permute(2, 1, 0)).permute(2, 1, 0)


def outwards(z: Tensor, second: Tensor, is_blast: bool) -> Tensor:
    """(tokens, L, Q) of what `between` gives."""
    factor = second if is_blast else second.reshape(*second.shape[:2], -1)
    return torch.bmm(z, factor.mT).transpose(0, 1)


def features(y: Tensor, output_order: str) -> Tensor:
    """(tokens, L, Q) as (tokens, out_features)."""
    return (y.mT if output_order == INTERLEAVED else y).flatten(1)


def blocks_of(y: Tensor, out_blocks: int, output_order: str) -> Tensor:
    """(tokens, out_features) as (tokens, L, Q): the inverse of `features`."""
    if output_order == INTERLEAVED:
        return y.reshape(y.shape[0], y.shape[1] // out_blocks, out_blocks).mT
    return y.reshape(y.shape[0], out_blocks, y.shape[1] // out_blocks)


def expanded(first: Tensor, second: Tensor, coupling: Tensor | None = None, output_order: str = BLOCKED) -> Tensor:
    """The weight (out_features, in_features) that the factors stand for."""
    if coupling is None:
        blocks = torch.einsum("lqbr,blrp->lqbp", second, first)
    else:
        blocks = torch.einsum("lqr,lbr,brp->lqbp", second, coupling, first)
    rows = blocks.transpose(0, 1) if output_order == INTERLEAVED else blocks
    return rows.reshape(second.shape[0] * second.shape[1], -1)


def require_fit(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    coupling: Tensor | None,
    bias: Tensor | None,
    output_order: str,
    activation: str,
) -> None:
    """Raise InputError unless shapes, dtypes and options fit together."""
    if output_order not in ORDERS:
        raise InputError(f"output_order must be one of {', '.join(ORDERS)}; found {output_order!r}")
    if activation not in ACTIVATE:
        raise InputError(f"activation must be one of {', '.join(ACTIVATE)}; found {activation!r}")
    ranks = (4, 4) if coupling is None else (3, 3)
    if (first.dim(), second.dim()) != ranks:
        raise InputError(f"the factors must have {ranks[0]} dims; found {first.dim()} and {second.dim()}")
    in_blocks, width, rank, out_blocks = first.shape[0], first.shape[-1], first.shape[-2], second.shape[0]
    wanted = (first.shape[1], second.shape[1], in_blocks, rank) if coupling is None else (*second.shape[:2], rank)
    if tuple(second.shape) != wanted:
        raise InputError(f"second must be {wanted} beside a first of {tuple(first.shape)}; found {tuple(second.shape)}")
    if coupling is not None and tuple(coupling.shape) != (out_blocks, in_blocks, rank):
        raise InputError(f"coupling must be {(out_blocks, in_blocks, rank)}; found {tuple(coupling.shape)}")
    if x.dim() < 1 or x.shape[-1] != in_blocks * width:
        raise InputError(f"x must have {in_blocks * width} features; found shape {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (out_blocks * second.shape[1],):
        raise InputError(f"bias must be ({out_blocks * second.shape[1]},); found {tuple(bias.shape)}")
    dtypes = {t.dtype for t in (x, first, second, coupling, bias) if t is not None}
    if len(dtypes) > 1:
        raise InputError(f"all tensors must have one dtype; found {', '.join(sorted(map(str, dtypes)))}")
