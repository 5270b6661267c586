"""Block linears as people write them: modules of x (..., 12), whose weights are parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS, WIDTH, ROWS, RANK = 2, 6, 5, 3
"""K = L, P, Q, and the rank of each block; features are 12 -> 10."""

Forward = Callable[["Factors", Tensor], Any]


class Factors(nn.Module):
    """Parameters of both kinds, and a forward of them.

    w1: (K, L * rank, P). w2: (L, Q, K * rank). wide1: (K, L, rank, P). wide2: (L, Q, K, rank). u, s, v: BLAST's.
    """

    def __init__(self, program: Forward, blocks: int = BLOCKS, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        inner = blocks * RANK
        shapes = {
            "w1": (blocks, inner, WIDTH),
            "w2": (blocks, ROWS, inner),
            "wide1": (blocks, blocks, RANK, WIDTH),
            "wide2": (blocks, ROWS, blocks, RANK),
            "u": (blocks, ROWS, RANK),
            "s": (blocks, blocks, RANK),
            "v": (blocks, RANK, WIDTH),
            "bias": (blocks * ROWS,),
            "scale": (inner,),
        }
        for name, shape in shapes.items():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, nn.Parameter(drawn))
        self.register_buffer("places", torch.arange(blocks * inner).flip(0))
        self.program, self.blocks = program, blocks

    def forward(self, x: Tensor) -> Any:
        return self.program(self, x)


def assert_same_gradients(model: Factors, x: Tensor, output: Tensor, expected: Tensor, **bounds: float) -> None:
    """Of x and of every parameter: none where `expected` has none, else close within `bounds`, rtol and atol."""
    leaves = [x, *model.parameters()]
    own, wanted = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (output, expected))
    for one, other in zip(own, wanted, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, **bounds)


def blocked(m: Factors, x: Tensor) -> Tensor:
    """(tokens, K, P) -> (K, tokens, P)."""
    return x.reshape(-1, m.blocks, WIDTH).transpose(0, 1)


def shuffled(m: Factors, z: Tensor) -> Tensor:
    """(K, tokens, L * rank) -> (L, tokens, K * rank), column c for block c mod L, as in blkdiag butterflies."""
    return z.transpose(0, 1).reshape(-1, m.blocks * RANK, m.blocks).permute(2, 0, 1)


def bmm_interleaved(m: Factors, x: Tensor) -> Tensor:
    y = torch.bmm(shuffled(m, torch.bmm(blocked(m, x), m.w1.transpose(1, 2))), m.w2.transpose(1, 2))
    return y.permute(1, 2, 0).reshape(*x.shape[:-1], -1)


def bmm_blocked(m: Factors, x: Tensor) -> Tensor:
    z = torch.bmm(blocked(m, x), m.w1.mT)
    z = z.reshape(m.blocks, -1, m.blocks, RANK).permute(2, 1, 0, 3).reshape(m.blocks, -1, m.blocks * RANK)
    return torch.bmm(z, m.w2.mT).transpose(0, 1).reshape(*x.shape[:-1], -1)


def contiguous_between(m: Factors, x: Tensor) -> Tensor:
    z = torch.bmm(blocked(m, x).contiguous(), m.w1.mT).transpose(0, 1)
    z = z.reshape(-1, m.blocks * RANK, m.blocks).transpose(-1, -2).contiguous().transpose(0, 1)
    y = torch.bmm(z.contiguous(), m.w2.mT).permute(1, 0, 2).contiguous()
    return y.view(*x.shape[:-1], -1)


def with_out(m: Factors, x: Tensor) -> Tensor:
    """As blockdiag butterflies of HazyResearch's kind: 'b k q -> b (q k)' between, and 'b l s -> b (s l)' after."""
    z = torch.bmm(blocked(m, x), m.w1.transpose(-1, -2)).transpose(0, 1)
    z = z.transpose(1, 2).reshape(-1, m.blocks, m.blocks * RANK).transpose(0, 1)
    return torch.bmm(z, m.w2.transpose(-1, -2)).permute(1, 2, 0).reshape(*x.shape[:-1], -1)


def einsum_dots(m: Factors, x: Tensor) -> Tensor:
    z = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (m.blocks, WIDTH)), m.w1)
    z = z.flatten(-2).unflatten(-1, (-1, m.blocks)).transpose(-1, -2)
    return torch.einsum("...kp,kqp->...kq", z, m.w2).flatten(-2)


def einsum_dots_interleaved(m: Factors, x: Tensor) -> Tensor:
    z = torch.einsum("...kp,kqp->...kq", x.unflatten(-1, (m.blocks, WIDTH)), m.w1)
    z = z.transpose(-1, -2).flatten(-2).unflatten(-1, (m.blocks, -1))  # column r of all blocks, then the next
    return torch.einsum("...kp,kqp->...kq", z, m.w2).transpose(-1, -2).flatten(-2)


def einsum_four_dims(m: Factors, x: Tensor) -> Tensor:
    z = torch.einsum("mbp,blrp->mlbr", x.reshape(-1, m.blocks, WIDTH), m.wide1)
    return torch.einsum("mlbr,lqbr->mlq", z, m.wide2).reshape(*x.shape[:-1], m.blocks * ROWS)


def einsum_weights_first(m: Factors, x: Tensor) -> Tensor:
    z = torch.einsum("blrp,mbp->lmbr", m.wide1, x.reshape(-1, m.blocks, WIDTH))
    return torch.einsum("lqbr,lmbr->mql", m.wide2, z).reshape(*x.shape[:-1], -1)


def matmul_broadcast(m: Factors, x: Tensor) -> Tensor:
    z = x.reshape(*x.shape[:-1], m.blocks, 1, WIDTH) @ m.w1.mT  # (..., K, 1, L * rank)
    z = z.squeeze(-2).unflatten(-1, (m.blocks, RANK)).transpose(-2, -3).flatten(-2)
    return (z.unsqueeze(-2) @ m.w2.mT).squeeze(-2).flatten(-2)


def weights_left(m: Factors, x: Tensor) -> Tensor:
    z = m.w1 @ x.reshape(-1, m.blocks, WIDTH).permute(1, 2, 0)  # (K, L * rank, tokens)
    z = z.reshape(m.blocks, m.blocks, RANK, -1).transpose(0, 1).reshape(m.blocks, m.blocks * RANK, -1)
    return (m.w2 @ z).permute(2, 0, 1).reshape(*x.shape[:-1], -1)


def input_interleaved(m: Factors, x: Tensor) -> Tensor:
    z = torch.bmm(x.reshape(-1, WIDTH, m.blocks).permute(2, 0, 1), m.w1.mT)
    return torch.bmm(shuffled(m, z), m.w2.mT).transpose(0, 1).flatten(1).reshape(*x.shape[:-1], -1)


def with_bias(m: Factors, x: Tensor) -> Tensor:
    return bmm_interleaved(m, x) + m.bias


def bias_first(m: Factors, x: Tensor) -> Tensor:
    return m.bias + bmm_blocked(m, x)


def bias_row(m: Factors, x: Tensor) -> Tensor:
    return einsum_dots(m, x) + m.bias[None]


def with_relu(m: Factors, x: Tensor) -> Tensor:
    return F.relu(bmm_blocked(m, x) + m.bias)


def with_gelu(m: Factors, x: Tensor) -> Tensor:
    return F.gelu(einsum_dots_interleaved(m, x) + m.bias)


def with_gelu_tanh(m: Factors, x: Tensor) -> Tensor:
    return F.gelu(bmm_interleaved(m, x), approximate="tanh")


def with_silu(m: Factors, x: Tensor) -> Tensor:
    return F.silu(blast(m, x) + m.bias)


def blast(m: Factors, x: Tensor) -> Tensor:
    y = torch.bmm(blocked(m, x), m.v.mT)
    z = (y.unsqueeze(0) * m.s.unsqueeze(2)).sum(1)
    return torch.bmm(z, m.u.mT).transpose(0, 1).reshape(*x.shape[:-1], -1)


def blast_tokens_first(m: Factors, x: Tensor) -> Tensor:
    y = torch.bmm(blocked(m, x), m.v.transpose(1, 2)).transpose(0, 1)  # (tokens, K, rank)
    z = (y.unsqueeze(1) * m.s).sum(2).transpose(0, 1)
    return torch.bmm(z, m.u.transpose(1, 2)).transpose(0, 1).flatten(1).reshape(*x.shape[:-1], -1)


def blast_scale_first(m: Factors, x: Tensor) -> Tensor:
    y = torch.bmm(blocked(m, x), m.v.mT)
    z = (m.s.unsqueeze(2) * y.unsqueeze(0)).sum(dim=[1])
    return torch.bmm(z, m.u.mT).permute(1, 2, 0).reshape(*x.shape[:-1], -1)


def blast_einsum(m: Factors, x: Tensor) -> Tensor:
    y = torch.einsum("...bp,brp->...br", x.unflatten(-1, (m.blocks, WIDTH)), m.v)
    z = torch.einsum("...br,lbr->...lr", y, m.s)
    return torch.einsum("...lr,lqr->...lq", z, m.u).flatten(-2)


def no_merge_at_the_end(m: Factors, x: Tensor) -> Tensor:
    z = torch.bmm(shuffled(m, torch.bmm(blocked(m, x), m.w1.mT)), m.w2.mT)
    return z.softmax(-1)


def heads_at_the_end(m: Factors, x: Tensor) -> Tensor:
    """The output goes on in other blocks than those of the layer."""
    y = torch.bmm(shuffled(m, torch.bmm(blocked(m, x), m.w1.mT)), m.w2.mT)
    return y.transpose(0, 1).reshape(*x.shape[:-1], ROWS, m.blocks).transpose(-1, -2) * 2


def blast_bias_in_blocks(m: Factors, x: Tensor) -> Tensor:
    """A bias that comes before the blocks are merged stays outside."""
    y = torch.einsum("...bp,brp->...br", x.unflatten(-1, (m.blocks, WIDTH)), m.v)
    z = torch.einsum("lbr,...br->...lr", m.s, y)
    return (torch.einsum("...lr,lqr->...lq", z, m.u) + m.bias.reshape(m.blocks, ROWS)).flatten(-2)


def tokens_swapped(m: Factors, x: Tensor) -> Tensor:
    y = torch.einsum("...bp,brp->...br", x.unflatten(-1, (m.blocks, WIDTH)), m.w1)
    y = y.unflatten(-1, (m.blocks, RANK)).transpose(-3, -2).flatten(-2)
    y = torch.einsum("...lr,lqr->...lq", y, m.w2)
    return y.flatten(-2).transpose(0, -2) if x.dim() > 2 else y.flatten(-2)


ENDED = (
    bmm_interleaved,
    bmm_blocked,
    contiguous_between,
    with_out,
    einsum_dots,
    einsum_dots_interleaved,
    einsum_four_dims,
    einsum_weights_first,
    matmul_broadcast,
    weights_left,
    input_interleaved,
    with_bias,
    bias_first,
    bias_row,
    with_relu,
    with_gelu,
    with_gelu_tanh,
    with_silu,
    blast,
    blast_tokens_first,
    blast_scale_first,
    blast_einsum,
)
"""All of these become the operator and no more than moves before it."""
PARTLY = (no_merge_at_the_end, heads_at_the_end, blast_bias_in_blocks, tokens_swapped)
"""Of these something stays after the operator."""


def given(*tokens: int, blocks: int = BLOCKS, dtype: torch.dtype = torch.float64) -> Tensor:
    """A standard normal x, which wants gradients."""
    generator = torch.Generator().manual_seed(1)
    size = math.prod(tokens) * blocks * WIDTH
    drawn = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    return drawn.reshape(*tokens, blocks * WIDTH).requires_grad_()
