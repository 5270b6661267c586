"""The typed IR of a block linear: what a lowered site computes, independent of how it runs.

A value is frozen, hashable and equal by value, prints on one line, and is checked by `verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from monarch_compile.errors import IRError
from monarch_compile.ir import DTYPE_NAMES, Dim

MONARCH = "monarch"
"""Every block of the weight has a rank of its own factors (Dao et al., arXiv 2204.00595)."""
BLAST = "blast"
"""Blocks share factors, coupled by a diagonal each (Lee et al., arXiv 2410.21262)."""
KINDS = (MONARCH, BLAST)

BLOCKED = "blocked"
"""Output feature l * Q + q is row q of output block l."""
INTERLEAVED = "interleaved"
"""Output feature q * out_blocks + l is row q of output block l."""
ORDERS = (BLOCKED, INTERLEAVED)

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
"""What may follow the bias."""

SPLIT = "split"
"""Kernels for few tokens: programs share the blocks of the weight, and their sums are added by a second kernel."""
FUSED = "fused"
"""One kernel, which keeps on chip what is between the factors."""
STAGED = "staged"
"""A kernel for each product, which leaves its result in the order in which the next one reads it."""
PRODUCTS = "products"
"""PyTorch's batched products."""
DENSE = "dense"
"""The product with the dense weight, which is formed of the factors at each call."""
KERNEL_FORMS = (SPLIT, FUSED, STAGED)
FORMS = (*KERNEL_FORMS, PRODUCTS, DENSE)
"""How a block linear may be computed; the numbers differ by rounding alone."""


@dataclass(frozen=True)
class BlockLinear:
    """y = activation(x W^T + bias), where block (l, b) of W, (Q, P), is a product of factors.

    With K = in_blocks, P = in_features / K, L = out_blocks and Q = out_features / L, the block is

    - kind "monarch": second[l, :, b, :] first[b, l], with first (K, L, rank, P) and second (L, Q, K, rank);
    - kind "blast": second[l] diag(coupling[l, b]) first[b], with first (K, rank, P), second (L, Q, rank) and coupling
      (L, K, rank).

    tokens: rows of x, all leading dims together. bias: whether there is one. dtype: of all tensors.
    output_order: where the rows of a block of W are in y: `BLOCKED` or `INTERLEAVED`.
    """

    family: ClassVar[str] = "linear"

    kind: str
    tokens: Dim
    in_features: int
    out_features: int
    in_blocks: int
    out_blocks: int
    rank: int
    dtype: torch.dtype
    bias: bool = False
    output_order: str = BLOCKED
    activation: str = "none"

    def __post_init__(self) -> None:
        verify(self)

    @property
    def parameters(self) -> int:
        """Numbers in the factors, without the bias."""
        return num_parameters(
            self.kind, self.in_features, self.out_features, self.in_blocks, self.out_blocks, self.rank
        )

    @property
    def inner(self) -> int:
        """Numbers between the two products, for each token."""
        return self.in_blocks * self.rank * (self.out_blocks if self.kind == MONARCH else 1)

    def __str__(self) -> str:
        return _text(self)


def num_parameters(kind: str, in_features: int, out_features: int, in_blocks: int, out_blocks: int, rank: int) -> int:
    """Numbers in the factors of a block linear; `rank` as in `BlockLinear`."""
    if kind == MONARCH:
        return rank * (out_blocks * in_features + in_blocks * out_features)
    return rank * (in_features + out_features + in_blocks * out_blocks)


@dataclass(frozen=True)
class FormedLinear:
    """A block linear as kernels of one form compute it: what a launcher is made for."""

    family: ClassVar[str] = "linear"

    of: BlockLinear
    form: str

    @property
    def tokens(self) -> Dim:
        """Those of the block linear."""
        return self.of.tokens

    def __str__(self) -> str:
        return f"{self.form}: {self.of}"


@dataclass(frozen=True)
class LinearGradients:
    """Gradients of a Monarch linear without an activation: of x, of the first factor, of the second.

    With g_l the gradient of output block l, dz_lb = g_l second[l, :, b] and z_lb = x_b first[b, l]^T:

    - that of x_b: sum over l of dz_lb first[b, l];
    - that of first[b, l]: sum over m of dz_lb[m, :]^T x_b[m, :];
    - that of second[l, :, b]: sum over m of g_l[m, :]^T z_lb[m, :].

    of: the block linear; `of.dtype` is also that of g. of_x, of_first, of_second: which are wanted, at least one.
    """

    family: ClassVar[str] = "linear"

    of: BlockLinear
    of_x: bool = True
    of_first: bool = True
    of_second: bool = True

    @property
    def tokens(self) -> Dim:
        """Those of the block linear."""
        return self.of.tokens

    def __str__(self) -> str:
        wanted = [name for name in ("x", "first", "second") if getattr(self, f"of_{name}")]
        return f"gradients of {', '.join(wanted)} of {self.of}"


class Rule(NamedTuple):
    """What must hold of an IR, and its wording."""

    holds: Callable[[BlockLinear], bool]
    wording: str


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


RULES: tuple[Rule, ...] = (
    Rule(lambda ir: ir.kind in KINDS, f"the kind is one of {', '.join(KINDS)}"),
    Rule(
        lambda ir: all(map(_is_size, (ir.in_features, ir.out_features, ir.in_blocks, ir.out_blocks, ir.rank))),
        "features, blocks and rank are at least 1",
    ),
    Rule(lambda ir: isinstance(ir.tokens, str) or _is_size(ir.tokens), "there is at least 1 token"),
    Rule(lambda ir: ir.in_features % ir.in_blocks == 0, "in_blocks divides in_features"),
    Rule(lambda ir: ir.out_features % ir.out_blocks == 0, "out_blocks divides out_features"),
    Rule(lambda ir: ir.dtype in DTYPE_NAMES, f"the dtype is one of {', '.join(DTYPE_NAMES.values())}"),
    Rule(lambda ir: ir.output_order in ORDERS, f"the output order is one of {', '.join(ORDERS)}"),
    Rule(lambda ir: ir.activation in ACTIVATIONS, f"the activation is one of {', '.join(ACTIVATIONS)}"),
)


def verify(ir: BlockLinear) -> None:
    """Raise IRError, with the printed IR, at the first rule that `ir` breaks."""
    for rule in RULES:
        if not rule.holds(ir):
            raise IRError(f"{rule.wording}\n  in {_text(ir)}")


def _text(ir: BlockLinear) -> str:
    parts = [
        f"monarch.block_linear<{DTYPE_NAMES.get(ir.dtype, str(ir.dtype))}>",
        f"{ir.kind} [{ir.tokens},{ir.in_features}]",
        f"blocks {ir.in_blocks}x{ir.out_blocks}",
        f"rank {ir.rank}",
        *(["bias"] if ir.bias else []),
        *([ir.output_order] if ir.output_order != BLOCKED else []),
        *([ir.activation] if ir.activation != "none" else []),
        f"-> [{ir.tokens},{ir.out_features}]",
    ]
    return " ".join(parts)
