"""Factors of a weight: Monarch's in closed form, BLAST's by alternating least squares. All in float64.

Errors are Frobenius norms; with second moments C of a layer's inputs they are those of its output, since
E |D x|^2 = tr(D C D^T) for an error D of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from monarch_compile.linear.reference import expanded

RIDGE = 1e-8
"""Of the mean diagonal, added to it in least squares."""


class Factors(NamedTuple):
    """As in `BlockLinear`, output blocked."""

    first: Tensor
    second: Tensor
    coupling: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        return expanded(self.first, self.second, self.coupling)


def grid_of(weight: Tensor, num_blocks: int) -> Tensor:
    """The blocks (L, K, Q, P) of a weight (out_features, in_features)."""
    rows, columns = (size // num_blocks for size in weight.shape)
    return weight.reshape(num_blocks, rows, num_blocks, columns).transpose(1, 2)


def squared(weight: Tensor, moment: Tensor | None) -> float:
    """|weight|^2, or the mean of |weight x|^2 over inputs of this second moment (in_features, in_features)."""
    weighed = weight if moment is None else weight @ moment
    return max(0.0, float((weighed * weight).sum()))


@dataclass(frozen=True)
class Spectrum:
    """How much of each block there is along its own directions.

    grid: the blocks (L, K, Q, P). directions: (L, K, Q, n), orthonormal, those that hold most of the block (of its
    output, where there were moments) first; energies: (L, K, n), how much.
    """

    grid: Tensor
    directions: Tensor
    energies: Tensor

    @staticmethod
    def of(weight: Tensor, num_blocks: int, moments: Tensor | None = None) -> Spectrum:
        """That of a weight. moments: second moments (K, P, P) of each block of the input with itself.

        The directions are eigenvectors of W W^T, or of W C W^T: those of the left singular vectors of W C^(1/2).
        """
        grid = grid_of(weight, num_blocks)
        count = min(grid.shape[-2:])
        directions, energies = [], []
        for row in grid:
            weighed = row if moments is None else row @ moments
            values, vectors = torch.linalg.eigh(weighed @ row.mT)
            energies.append(values.flip(-1)[..., :count].clamp(min=0))
            directions.append(vectors.flip(-1)[..., :count])
        return Spectrum(grid, torch.stack(directions), torch.stack(energies))

    def lost(self) -> Tensor:
        """(n + 1,): the squared error of each rank from 0 to n, summed over blocks."""
        by_rank = self.energies.sum((0, 1))
        return torch.cat((by_rank.flip(0).cumsum(0).flip(0), by_rank.new_zeros(1)))

    def factors(self, rank: int) -> Factors:
        """The best product of this rank for every block: its projection on the first directions.

        What the two factors have in size is shared between them.
        """
        rows, columns = self.grid.shape[-2:]
        # At full rank any basis of a block's columns gives the block; that of a factorisation does to the last bits.
        is_full = rank == columns < rows
        kept = torch.linalg.qr(self.grid).Q if is_full else self.directions[..., :rank]
        projected = kept.mT @ self.grid  # (L, K, rank, P)
        size = projected.norm(dim=-1, keepdim=True).sqrt()
        size = torch.where(size > 0, size, torch.ones_like(size))
        second = (kept * size.mT).transpose(1, 2)  # (L, Q, K, rank)
        return Factors((projected / size).transpose(0, 1).contiguous(), second.contiguous())


def refitted(factors: Factors, weight: Tensor, moment: Tensor) -> Factors:
    """Monarch's factors with the second one fitted anew, by least squares over the layer's whole input.

    The blocks of a row were fitted each by itself; their inputs are correlated, which this uses. The error of the
    output does not grow. moment: (in_features, in_features).
    """
    first, second = factors.first, factors.second
    blocks, out_blocks, rank, width = first.shape
    error = (weight - factors.weight).reshape(out_blocks, -1, weight.shape[1])
    by_block = moment.reshape(blocks, width, blocks, width).permute(0, 2, 1, 3)
    found = []
    for out in range(out_blocks):
        own = first[:, out]  # (K, rank, P)
        inner = torch.einsum("brp,bcpq,csq->brcs", own, by_block, own).reshape(blocks * rank, blocks * rank)
        crossed = torch.einsum("qbp,brp->qbr", (error[out] @ moment).reshape(-1, blocks, width), own).flatten(1)
        found.append(_solved(inner, crossed.mT).mT.reshape(-1, blocks, rank))
    return Factors(first, second + torch.stack(found))


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right of symmetric matrices (..., n, n) without negative eigenvalues, which may be singular.

    Damped: factors are changed by the solution for what they miss, so that the error never grows.
    """
    size = matrix.shape[-1]
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = RIDGE * mean + torch.finfo(matrix.dtype).tiny
    chol, _ = torch.linalg.cholesky_ex(matrix + ridge * torch.eye(size, dtype=matrix.dtype, device=matrix.device))
    solution: Tensor = torch.cholesky_solve(right, chol)
    return solution


def blast_factors(
    weight: Tensor, num_blocks: int, rank: int, iterations: int, moments: Tensor | None = None
) -> Factors:
    """BLAST's factors, by alternating least squares from the best plain product of this rank: never worse than it.

    moments: second moments (K, P, P) of each block of the input with itself, none of them singular.
    """
    grid = grid_of(weight, num_blocks)
    roots = None if moments is None else _roots(moments)
    target = grid if roots is None else grid @ roots
    first, second, coupling = _plain(target, rank)
    for _ in range(iterations):
        second = _fitted_second(target, first, second, coupling)
        coupling = _fitted_coupling(target, first, second, coupling)
        first = _fitted_first(target, first, second, coupling)
    if roots is not None:
        first = torch.linalg.solve(roots, first.mT).mT  # the roots are symmetric
    return _balanced(Factors(first, second, coupling))


def _roots(moments: Tensor) -> Tensor:
    """Symmetric square roots of second moments, which have inverses."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=torch.finfo(values.dtype).tiny)
    roots: Tensor = (vectors * values.sqrt()[..., None, :]) @ vectors.mT
    return roots


def _plain(target: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of a plain product of low rank, coupled by ones; beyond full rank, small random ones."""
    out_blocks, blocks, rows, width = target.shape
    left, values, right = torch.linalg.svd(target.transpose(1, 2).reshape(out_blocks * rows, -1), full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    second = (left[:, :kept] * root).reshape(out_blocks, rows, kept)
    first = (root[:, None] * right[:kept]).reshape(kept, blocks, width).transpose(0, 1)
    coupling = target.new_ones(out_blocks, blocks, kept)
    if rank > kept:
        generator = torch.Generator(target.device).manual_seed(0)

        def more(like: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
            return torch.cat((like, 0.1 * like.std() * drawn), dim)

        second = more(second, (out_blocks, rows, rank - kept), -1)
        first = more(first, (blocks, rank - kept, width), 1)
        coupling = torch.cat((coupling, coupling.new_ones(out_blocks, blocks, rank - kept)), -1)
    return first, second, coupling


def _fitted_second(target: Tensor, first: Tensor, second: Tensor, coupling: Tensor) -> Tensor:
    """U_l, given what it is multiplied by: S_lb V_b for all b."""
    inner = torch.einsum("lbr,lbs,brs->lrs", coupling, coupling, first @ first.mT)
    crossed = torch.einsum("lbr,lbqr->lrq", coupling, target @ first.mT)
    return second + _solved(inner, crossed - inner @ second.mT).mT


def _fitted_first(target: Tensor, first: Tensor, second: Tensor, coupling: Tensor) -> Tensor:
    """V_b, given U_l S_lb for all l."""
    inner = torch.einsum("lbr,lbs,lrs->brs", coupling, coupling, second.mT @ second)
    crossed = torch.einsum("lbr,lbrp->brp", coupling, second.mT[:, None] @ target)
    return first + _solved(inner, crossed - inner @ first)


def _fitted_coupling(target: Tensor, first: Tensor, second: Tensor, coupling: Tensor) -> Tensor:
    """S_lb, given U_l and V_b: the normal equations have the elementwise product of both Gram matrices.

    A row of blocks at a time: these equations of all rows would be larger than the weight.
    """
    inputs, found = first @ first.mT, []
    for own, row, now in zip(second, target, coupling, strict=True):
        inner = (own.mT @ own) * inputs  # (K, rank, rank)
        wanted = (own * (row @ first.mT)).sum(-2)  # diagonal of U^T A V^T
        missing = wanted - (inner @ now[..., None])[..., 0]
        found.append(now + _solved(inner, missing[..., None])[..., 0])
    return torch.stack(found)


def _balanced(factors: Factors) -> Factors:
    """The same product, its size shared by the factors."""
    assert factors.coupling is not None
    first, second, coupling = factors.first, factors.second, factors.coupling
    sizes = [first.norm(dim=(0, 2)), second.norm(dim=(0, 1)), coupling.norm(dim=(0, 1))]
    sizes = [torch.where(size > 0, size, torch.ones_like(size)) for size in sizes]
    together = torch.stack(sizes).log().mean(0).exp()
    first, second = first * (together / sizes[0])[:, None], second * (together / sizes[1])
    return Factors(first.contiguous(), second.contiguous(), (coupling * (together / sizes[2])).contiguous())
