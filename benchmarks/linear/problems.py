"""What is timed: layers of models as block linears, presets of them, and what they are meant to reach."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monarch_compile.linear.ir import BLAST, MONARCH, BlockLinear


@dataclass(frozen=True)
class Problem:
    """A layer in_features -> out_features of a model, of `blocks` x `blocks`, for some tokens.

    rank: of each block for kind "monarch", of the factors for "blast". backward: the gradients of x and of all factors
    as well.
    """

    model: str
    in_features: int
    out_features: int
    blocks: int
    rank: int
    tokens: int
    kind: str = MONARCH
    dtype: str = "float16"
    backward: bool = False

    def __str__(self) -> str:
        layer = f"{self.model} {self.in_features} -> {self.out_features}"
        return f"{layer}, {self.kind} {self.share:.0%} x {self.tokens}{' backward' * self.backward}"

    @property
    def share(self) -> float:
        """Of the dense layer's parameters."""
        return self.ir().parameters / (self.in_features * self.out_features)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def ir(self) -> BlockLinear:
        """The IR of the forward pass."""
        sizes = (self.in_features, self.out_features, self.blocks, self.blocks)
        return BlockLinear(self.kind, self.tokens, *sizes, self.rank, self.torch_dtype)


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem, the dense weight that the factors stand for, and the gradient of the result or None."""

    x: Tensor
    first: Tensor
    second: Tensor
    coupling: Tensor | None
    weight: Tensor
    grad: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x and the factors, as the operator takes them."""
        return self.x, self.first, self.second, self.coupling


def inputs(problem: Problem, device: str, seed: int) -> Inputs:
    """Standard normal x and gradient, and factors that keep its scale; they ask for gradients where there are any."""
    generator = torch.Generator(device).manual_seed(seed)
    blocks, rank = problem.blocks, problem.rank
    p, q = problem.in_features // blocks, problem.out_features // blocks

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(sizes, device=device, generator=generator).mul_(scale).to(problem.torch_dtype)
        return made.requires_grad_(problem.backward)

    x = normal(problem.tokens, problem.in_features)
    if problem.kind == MONARCH:
        first = normal(blocks, blocks, rank, p, scale=p**-0.5)
        second, coupling = normal(blocks, q, blocks, rank, scale=(blocks * rank) ** -0.5), None
    else:
        first, second = normal(blocks, rank, p, scale=p**-0.5), normal(blocks, q, rank, scale=rank**-0.5)
        coupling = normal(blocks, blocks, rank, scale=blocks**-0.5)
    weight = normal(problem.out_features, problem.in_features, scale=problem.in_features**-0.5)
    made = Inputs(x, first, second, coupling, weight)
    if not problem.backward:
        return made
    return replace(made, grad=normal(problem.tokens, problem.out_features).detach())


@dataclass(frozen=True)
class Preset:
    """Problems of one type of device."""

    device: str
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Target:
    """The operator is meant to be at least so many times as fast as another subject."""

    against: str
    factor: float


LLAMA = Problem("Llama-7B", 4096, 4096, 16, 64, 1)
"""Monarch with half of the parameters."""
QUARTER = replace(LLAMA, rank=32)
BLAST_LAYER = replace(LLAMA, kind=BLAST, rank=1024, tokens=1024)
TARGETS: dict[Problem, tuple[Target, ...]] = {
    LLAMA: (Target("dense", 1.5),),
    replace(LLAMA, tokens=16): (Target("dense", 1.5),),
    replace(LLAMA, tokens=8192): (Target("dense", 1 / 1.03), Target("inductor", 1.5)),
    replace(QUARTER, tokens=8192): (Target("dense", 1.6),),
    BLAST_LAYER: (Target("inductor", 4.0),),
}
LAYERS = (
    ("Llama-7B", 4096, 4096, 16),
    ("Llama-7B", 4096, 11008, 16),
    ("GPT-2", 768, 3072, 4),
    ("ViT-B", 768, 2304, 4),
    ("DiT-XL", 1152, 4608, 8),
)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192, 16384)
SHARES = (0.5, 0.25)


def rank_of(in_features: int, out_features: int, blocks: int, share: float) -> int:
    """The rank of a block, a multiple of 8, with which a Monarch layer has about this share of the parameters."""
    whole = share * in_features * out_features / (in_features + out_features)
    return max(8, round(whole / blocks / 8) * 8)


def _h100() -> Iterator[Problem]:
    """Those with targets; then, from the layers that matter most, all others."""
    yield from TARGETS
    yield replace(LLAMA, tokens=4096, backward=True)
    yield from (replace(LLAMA, tokens=tokens) for tokens in (256, 1024))
    for (model, *sizes), share, tokens in itertools.product(LAYERS, SHARES, TOKENS):
        yield Problem(model, *sizes, rank_of(*sizes, share), tokens)
    for tokens in TOKENS:
        yield replace(BLAST_LAYER, tokens=tokens)
    for backward_of in (QUARTER, LLAMA, BLAST_LAYER):
        yield from (replace(backward_of, tokens=tokens, backward=True) for tokens in (1024, 8192))


_TINY = Problem("toy", 24, 36, 3, 2, 5, dtype="float32")
PRESETS: dict[str, Preset] = {
    "h100": Preset("cuda", tuple(dict.fromkeys(_h100()))),
    "cpu": Preset("cpu", tuple(Problem("GPT-2", 768, 3072, 4, 72, tokens, dtype="float32") for tokens in (1, 256))),
    "tiny": Preset("cpu", (_TINY, replace(_TINY, kind=BLAST, rank=4, backward=True))),
}
