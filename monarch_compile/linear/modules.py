"""Block linears as modules, which stand in the place of `torch.nn.Linear`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from monarch_compile import autocast as autocasting
from monarch_compile.errors import InputError
from monarch_compile.linear.ir import BLAST, BLOCKED, MONARCH, num_parameters
from monarch_compile.linear.op import LINEAR_OP
from monarch_compile.linear.reference import expanded


class BlockLinearModule(nn.Module):
    """What both kinds share. x (..., in_features) -> (..., out_features), with `num_blocks` blocks in rows and columns.

    Attributes:
        rank: r, with r * (in_features + out_features) numbers in the factors (BLAST: num_blocks^2 * r more).
        first, second: parameters, as in `BlockLinear`. coupling: BLAST's parameter, else None.
        bias: (out_features,), or None.
    """

    kind: ClassVar[str]
    first: nn.Parameter
    second: nn.Parameter
    coupling: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Random factors, of the scale of `torch.nn.Linear`'s weight.

        Raises:
            InputError: `num_blocks` does not divide the features, or there are no factors of this rank.
        """
        super().__init__()
        require_blocks(in_features, out_features, num_blocks)
        self.in_features, self.out_features = in_features, out_features
        self.num_blocks, self.rank = num_blocks, rank
        shapes = self.shapes(in_features, out_features, num_blocks, rank)
        made = [None if s is None else nn.Parameter(torch.empty(s, device=device, dtype=dtype)) for s in shapes]
        for name, parameter in zip(("first", "second", "coupling"), made, strict=True):
            self.register_parameter(name, parameter)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )
        self.reset_parameters()

    @staticmethod
    def shapes(
        in_features: int, out_features: int, num_blocks: int, rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]:
        """Those of first, second and coupling. Raises InputError where there are no factors of this rank."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        fan = 1 / math.sqrt(self.in_features)
        rank, width = self.first.shape[-2:]
        with torch.no_grad():
            self.first.normal_(0, 1 / math.sqrt(width))
            self.second.normal_(0, fan * math.sqrt(width / (3 * rank)))
            if self.coupling is not None:
                self.coupling.fill_(1)
            if self.bias is not None:
                self.bias.uniform_(-fan, fan)

    @property
    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features), computed anew at each call; gradients reach the factors."""
        return expanded(self.first, self.second, self.coupling)

    @property
    def num_factor_parameters(self) -> int:
        """Numbers in the factors."""
        return sum(p.numel() for p in (self.first, self.second, self.coupling) if p is not None)

    def forward(self, x: Tensor) -> Tensor:
        """As `torch.nn.Linear`: under autocast, in its dtype."""
        given: tuple[Tensor | None, ...] = (x, self.first, self.second, self.coupling, self.bias)
        target = autocasting.target_of(x.device.type)
        if target is not None:
            given = tuple(None if t is None else t.to(autocasting.cast(t.dtype, target)) for t in given)
        result: Tensor = LINEAR_OP(*given, BLOCKED, "none")
        return result

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_blocks={self.num_blocks}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


class MonarchLinear(BlockLinearModule):
    """A linear layer each block of whose weight is a product of rank `rank / num_blocks`."""

    kind = MONARCH

    @staticmethod
    def shapes(in_features: int, out_features: int, num_blocks: int, rank: int) -> Any:
        require_rank(rank, num_blocks)
        own = rank // num_blocks
        first = (num_blocks, num_blocks, own, in_features // num_blocks)
        return first, (num_blocks, out_features // num_blocks, num_blocks, own), None


class BlastLinear(BlockLinearModule):
    """A linear layer whose weight's blocks are products of shared factors of rank `rank`, coupled by diagonals."""

    kind = BLAST

    @staticmethod
    def shapes(in_features: int, out_features: int, num_blocks: int, rank: int) -> Any:
        require_rank(rank, 1)
        first, second = (num_blocks, rank, in_features // num_blocks), (num_blocks, out_features // num_blocks, rank)
        return first, second, (num_blocks, num_blocks, rank)


MODULES: dict[str, type[BlockLinearModule]] = {MONARCH: MonarchLinear, BLAST: BlastLinear}


def common_divisors(*sizes: int) -> list[int]:
    """What divides all of some sizes."""
    common = math.gcd(*sizes)
    return [number for number in range(1, common + 1) if common % number == 0]


def require_blocks(in_features: int, out_features: int, num_blocks: int, what: str = "the layer") -> None:
    """Raise InputError, which lists what would do, unless `num_blocks` divides both numbers of features."""
    divisors = common_divisors(in_features, out_features)
    if num_blocks not in divisors:
        raise InputError(
            f"num_blocks={num_blocks} does not divide {in_features} -> {out_features} of {what}; "
            f"these do: {', '.join(map(str, divisors))}"
        )


def require_rank(rank: int, step: int) -> None:
    """Raise InputError unless `rank` is a positive multiple of `step`."""
    if rank < 1 or rank % step:
        low = max(step, rank // step * step)
        raise InputError(
            f"rank={rank} is no positive multiple of num_blocks={step}; the nearest are {low} and {low + step}"
            if step > 1
            else f"rank must be at least 1; found {rank}"
        )


def size_of(kind: str, in_features: int, out_features: int, num_blocks: int, rank: int) -> int:
    """Numbers in the factors of a module."""
    own = rank // num_blocks if kind == MONARCH else rank
    return num_parameters(kind, in_features, out_features, num_blocks, num_blocks, own)
