"""Whatever views stand between two products, numbers stay; what is lowered is exactly what is a Monarch matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.capture import run_passes
from torch import Tensor, nn

from monarch_compile.linear.op import LINEAR_OP

TOKENS, WIDTH, ROWS = 3, 2, 3


@dataclass(frozen=True)
class Order:
    """What is between the products: (tokens, blocks * columns), cut into `digits`, permuted, cut into `out_blocks`.

    permutation: of the digits. lead: whether tokens stay first.
    """

    in_blocks: int
    columns: int
    out_blocks: int
    digits: tuple[int, ...]
    permutation: tuple[int, ...]

    @property
    def sums(self) -> int:
        """What a block of the output sums over."""
        return self.in_blocks * self.columns // self.out_blocks

    def moved(self) -> Any:
        """(out_blocks, sums): which number of the first product each block reads."""
        places = np.arange(self.in_blocks * self.columns).reshape(self.digits).transpose(self.permutation)
        return places.reshape(self.out_blocks, self.sums)

    @property
    def is_monarch(self) -> bool:
        """By brute force: each output block reads as many columns of each input block, in one of the four orders."""
        blocks, columns = divmod(self.moved(), self.columns)
        if self.sums % self.in_blocks or self.columns % self.out_blocks:
            return False
        rank = self.sums // self.in_blocks
        if rank != self.columns // self.out_blocks:
            return False
        for sums_last in (False, True):
            shape = (self.out_blocks, rank, self.in_blocks) if sums_last else (self.out_blocks, self.in_blocks, rank)
            by_block, by_column = blocks.reshape(shape), columns.reshape(shape)
            if sums_last:
                by_block, by_column = by_block.swapaxes(1, 2), by_column.swapaxes(1, 2)
            if (by_block != np.arange(self.in_blocks)[None, :, None]).any():
                continue
            out, number = np.arange(self.out_blocks)[:, None, None], np.arange(rank)[None, None, :]
            if (by_column == out * rank + number).all() or (by_column == number * self.out_blocks + out).all():
                return True
        return False


class Layer(nn.Module):
    def __init__(self, order: Order) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first, second = (order.in_blocks, order.columns, WIDTH), (order.out_blocks, ROWS, order.sums)
        self.first, self.second = (
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in (first, second)
        )
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        order = self.order
        z = torch.bmm(x.reshape(TOKENS, order.in_blocks, WIDTH).transpose(0, 1), self.first.mT)
        z = z.transpose(0, 1).reshape(TOKENS, *order.digits).permute(0, *(1 + place for place in order.permutation))
        z = z.reshape(TOKENS, order.out_blocks, order.sums).transpose(0, 1)
        return torch.bmm(z, self.second.mT).transpose(0, 1).flatten(1)


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Of up to four digits, whose products are those of the blocks and columns."""
    in_blocks, out_blocks, rank = (
        draw(st.sampled_from([2, 3, 4])),
        draw(st.sampled_from([2, 3, 4])),
        draw(st.integers(1, 3)),
    )
    columns = out_blocks * rank
    factors = draw(st.permutations([in_blocks, out_blocks, rank]))
    if draw(st.booleans()):
        factors = [in_blocks, *draw(st.permutations([out_blocks, rank]))]
    permutation = draw(st.permutations(range(len(factors))))
    return Order(in_blocks, columns, out_blocks, tuple(factors), tuple(permutation))


def _check(order: Order) -> None:
    layer = Layer(order)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, order.in_blocks * WIDTH, generator=generator, dtype=torch.float64)
    output, (result,) = run_passes(layer, x)
    torch.testing.assert_close(output, layer(x), rtol=1e-11, atol=1e-11)
    lowered = [node.target for node in result.after.graph.nodes].count(LINEAR_OP)
    blocks = order.moved() // order.columns
    mixes = bool((blocks != np.arange(order.out_blocks)[:, None]).any())
    assert lowered == int(order.is_monarch and mixes)
    if not lowered:
        assert {d.code for d in result.decisions} <= {"block_order", "block_rank"}
        assert bool(result.decisions) == mixes


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(orders())
def test_any_order_of_digits(order: Order) -> None:
    _check(order)


@pytest.mark.parametrize("permutation", permutations(range(3)), ids=str)
def test_all_orders_of_blocks_and_ranks(permutation: tuple[int, ...]) -> None:
    _check(Order(2, 6, 2, (2, 2, 3), permutation))
    _check(Order(2, 6, 2, (2, 3, 2), permutation))


def test_brute_force_knows_a_monarch_matrix() -> None:
    assert Order(2, 6, 2, (2, 2, 3), (1, 0, 2)).is_monarch
    assert Order(2, 6, 2, (2, 3, 2), (2, 0, 1)).is_monarch
    assert not Order(2, 6, 2, (2, 2, 3), (0, 1, 2)).is_monarch
    assert math.prod(Order(2, 6, 2, (2, 2, 3), (1, 0, 2)).moved().shape) == 12
