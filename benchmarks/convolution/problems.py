"""What is timed: long convolutions, presets of them, and how much faster than Inductor they are meant to be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monarch_compile.convolution.ir import LongConvolution


@dataclass(frozen=True)
class Problem:
    """A causal convolution of u (batch, channels, seq_len) with a float32 filter (channels, seq_len).

    gated: a gate of u's shape before it, and one after. skip: a term u * D, D float32 (channels,). backward: the
    gradients of all inputs as well.
    """

    batch: int
    channels: int
    seq_len: int
    dtype: str = "bfloat16"
    gated: bool = False
    skip: bool = False
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.batch} x {self.channels} x {self.seq_len} {self.kind}"

    @property
    def kind(self) -> str:
        """What is not a size, in words."""
        terms = " gated" * self.gated + " skip" * self.skip + " backward" * self.backward
        return f"{self.dtype}{terms}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def floor_bytes(self) -> int:
        """Bytes of u, gates and y, each moved once; backward, of their gradients too, and of u and gates once more.

        The filter, which a batch shares, is left out.
        """
        whole = self.batch * self.channels * self.seq_len * self.torch_dtype.itemsize
        read = 1 + 2 * self.gated
        return whole * (read + 1 + self.backward * (2 * read + 1))

    def ir(self) -> LongConvolution:
        """The IR of the forward pass."""
        lengths = (self.seq_len, self.seq_len, 2 * self.seq_len, self.seq_len)
        return LongConvolution(
            self.batch,
            self.channels,
            *lengths,
            lag=0,
            dtype=self.torch_dtype,
            filter_dtype=torch.float32,
            out_dtype=self.torch_dtype,
            skip=self.skip,
            pre_gate=self.gated,
            post_gate=self.gated,
        )


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem, and the gradient of its result where it has a backward pass."""

    u: Tensor
    filter: Tensor
    skip: Tensor | None = None
    pre_gate: Tensor | None = None
    post_gate: Tensor | None = None
    grad: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The inputs of the convolution, in the order in which the operator takes them."""
        return (self.u, self.filter, self.skip, self.pre_gate, self.post_gate)

    def doubled(self) -> Inputs:
        """The same numbers in float64."""

        def wide(x: Tensor) -> Tensor:
            return x.detach().double().requires_grad_(x.requires_grad)

        rest = {name: x if x is None else wide(x) for name, x in vars(self).items() if name not in ("u", "filter")}
        return Inputs(wide(self.u), wide(self.filter), **rest)


def inputs(problem: Problem, device: str) -> Inputs:
    """Standard normal tensors and a filter that decays; inputs ask for gradients where there is a backward pass."""
    generator = torch.Generator(device).manual_seed(problem.seq_len)
    shape, filter_shape = (problem.batch, problem.channels, problem.seq_len), (problem.channels, problem.seq_len)

    def normal(*sizes: int, dtype: torch.dtype = problem.torch_dtype) -> Tensor:
        return torch.randn(sizes, device=device, dtype=dtype, generator=generator)

    decay = torch.exp(-3 * torch.arange(problem.seq_len, device=device) / problem.seq_len)
    made = Inputs(
        u=normal(*shape),
        filter=normal(*filter_shape, dtype=torch.float32) * decay,
        skip=normal(problem.channels, dtype=torch.float32) if problem.skip else None,
        pre_gate=normal(*shape) if problem.gated else None,
        post_gate=normal(*shape) if problem.gated else None,
    )
    if not problem.backward:
        return made
    for x in made.tensors:
        if x is not None:
            x.requires_grad_()
    return replace(made, grad=normal(*shape))


@dataclass(frozen=True)
class Preset:
    """Problems of one type of device."""

    device: str
    problems: tuple[Problem, ...]


TARGETS = {256: 15.0, 1024: 12.0, 2048: 10.0, 4096: 8.0, 8192: 6.0, 32768: 4.0, 131072: 3.5, 1 << 20: 3.0}
"""How many times faster than Inductor the forward pass is meant to be, by length: with gates and without."""
BACKWARD_TARGET = 4.0
"""The same of a forward and a backward pass."""
NEXT_POWER_TARGET = 1.3
"""A length that is no power of two is meant to take at most so many times what the next power of two takes."""

H100_SHAPES = (
    (64, 768, 256),
    (64, 768, 1024),
    (16, 768, 1024),
    (32, 768, 2048),
    (16, 768, 4096),
    (16, 768, 8192),
    (4, 768, 32768),
    (1, 768, 131072),
    (1, 256, 1 << 20),
)
"""Shapes that the targets are for."""
BACKWARD_LENGTHS = range(1024, 8193)
ELEMENTS = 64 * 768 * 1024
"""Elements of u where all lengths have about as many."""
LENGTHS = tuple(sorted((*(1 << power for power in range(7, 21)), 1000, 3000, 6000)))
BATCHES = (1, 2, 3, 4, 5, 8, 16, 32, 64)


def target(problem: Problem) -> float | None:
    """How many times faster than Inductor this problem is meant to be; None: nothing is said of it."""
    if problem.dtype != "bfloat16" or (problem.batch, problem.channels, problem.seq_len) not in H100_SHAPES:
        return None
    if problem.backward:
        return BACKWARD_TARGET if problem.seq_len in BACKWARD_LENGTHS else None
    return TARGETS[problem.seq_len]


def _h100() -> Iterator[Problem]:
    """The shapes with targets, without gates and with them; then those with a backward pass."""
    for backward, gated, shape in itertools.product((False, True), (False, True), H100_SHAPES):
        if not backward or shape[-1] in BACKWARD_LENGTHS:
            yield Problem(*shape, gated=gated, backward=backward)


def _lengths() -> Iterator[Problem]:
    """Every length with about as many elements: 768 channels, but fewer where one sequence has too many."""
    for seq_len in LENGTHS:
        channels = min(768, ELEMENTS // seq_len)
        yield Problem(round(ELEMENTS / (channels * seq_len)), channels, seq_len)


def _terms() -> Iterator[Problem]:
    """Other dtypes and terms at one shape."""
    start = Problem(16, 768, 4096)
    for dtype, gated, skip in itertools.product(("bfloat16", "float16", "float32"), (False, True), (False, True)):
        yield replace(start, dtype=dtype, gated=gated, skip=skip)


_CPU = (
    Problem(2, 16, 256, "float32"),
    Problem(2, 16, 1024, "float32"),
    Problem(1, 16, 3000, "float32"),
    Problem(1, 16, 4096, "float32"),
    Problem(1, 16, 4096, gated=True, skip=True),
    Problem(2, 16, 1024, "float32", gated=True, skip=True, backward=True),
)
PRESETS: dict[str, Preset] = {
    "h100": Preset("cuda", tuple(_h100())),
    "lengths": Preset("cuda", tuple(_lengths())),
    "batches": Preset("cuda", tuple(Problem(batch, 768, n) for n in (1024, 4096) for batch in BATCHES)),
    "terms": Preset("cuda", tuple(_terms())),
    "cpu": Preset("cpu", _CPU),
    "tiny": Preset("cpu", (Problem(2, 3, 24, "float32"), Problem(3, 2, 20, gated=True, skip=True, backward=True))),
}
