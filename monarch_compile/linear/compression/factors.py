"""Factors of a weight: Monarch's in closed form, block by block; with inputs, and BLAST's, by alternating between parts
of them that have closed forms. All in float64.

Errors are Frobenius norms; with second moments C of a layer's inputs they are those of its output, since
E |D x|^2 = tr(D C D^T) for an error D of the weight. The best product of a rank is the truncated singular value
decomposition (Eckart, Young, Psychometrika 1, 1936); of each block by itself for Monarch (Dao et al., arXiv
2204.00595).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from monarch_compile.linear.ir import BLAST
from monarch_compile.linear.modules import BlockLinearModule
from monarch_compile.linear.reference import expanded

RIDGE = 1e-8
"""Of the mean diagonal, added to it in least squares."""
DAMPING = 1e-6
"""Of the mean second moment, added to each: see `damped`."""
SWEEPS = 5
"""Over the blocks of the input: those after the third gain little."""


Fitter = Callable[[int], "Factors"]
"""From a layer's rank to factors."""


class Factors(NamedTuple):
    """As in `BlockLinear`, output blocked."""

    first: Tensor
    second: Tensor
    coupling: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The dense weight."""
        return expanded(self.first, self.second, self.coupling)


def fill(module: BlockLinearModule, factors: Factors) -> None:
    """Write factors into a module, in its dtype."""
    for parameter, value in zip((module.first, module.second, module.coupling), factors, strict=True):
        if parameter is not None and value is not None:
            parameter.data.copy_(value)


def stored_weight(module: BlockLinearModule) -> Tensor:
    """The dense weight (out_features, in_features) of a module's factors, as they are stored, in float64."""
    held = (module.first, module.second, module.coupling)
    return Factors(*(None if p is None else p.detach().double() for p in held)).weight  # type: ignore[arg-type]


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
    def of(weight: Tensor, num_blocks: int, moment: Tensor | None = None) -> Spectrum:
        """That of a weight. moment: of the input, of which each block with itself counts.

        The directions are eigenvectors of W W^T, or of W C W^T: those of the left singular vectors of W C^(1/2).
        """
        grid = grid_of(weight, num_blocks)
        moments = None if moment is None else _own_moments(damped(moment), num_blocks)
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


def fitter(kind: str, weight: Tensor, moment: Tensor | None, num_blocks: int, iterations: int) -> Fitter:
    """What fits factors of a kind to a weight (out_features, in_features) in float64, for any rank r of the layer.

    moment: the second moment (in_features, in_features) of the inputs on which outputs are to be close; None: the
    weights are to be close. iterations: of BLAST.
    """
    if kind == BLAST:
        return lambda rank: blast_factors(weight, num_blocks, rank, iterations, moment)
    spectrum = Spectrum.of(weight, num_blocks, moment)

    def fit(rank: int) -> Factors:
        factors = spectrum.factors(rank // num_blocks)
        return factors if moment is None else swept(factors, weight, moment)

    return fit


def _own_moments(moment: Tensor, num_blocks: int) -> Tensor:
    """(K, P, P): second moments of each block of the input with itself."""
    width = moment.shape[0] // num_blocks
    by_block = moment.reshape(num_blocks, width, num_blocks, width)
    return torch.stack([by_block[b, :, b] for b in range(num_blocks)])


def damped(moment: Tensor) -> Tensor:
    """A second moment (n, n) that has an inverse: directions that no input shows are chosen by the weight.

    Of no inputs but zeros, all directions are.
    """
    mean = moment.diagonal().mean()
    added = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    return moment + added * torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)


def swept(factors: Factors, weight: Tensor, moment: Tensor, sweeps: int = SWEEPS) -> Factors:
    """Monarch's factors fitted anew to the layer's whole input, whose blocks are correlated.

    Block coordinate descent on tr(E C E^T), with E what the weight misses: for each block b of the input, the products
    of low rank of its column of blocks become the best ones beside those of all other columns. With E_b what is missed
    without them, that is the truncated singular value decomposition of E_b C[:, b] C[b, b]^-1 C[b, b]^(1/2). At last,
    the second factor is fitted to all blocks at once. No step makes the error larger.

    moment: C (in_features, in_features), of which `damped` is taken.
    """
    blocks, out_blocks, rank, width = factors.first.shape
    moment = damped(moment)
    first, second = factors.first.clone(), factors.second.clone()
    missed = weight - factors.weight
    columns = [slice(b * width, (b + 1) * width) for b in range(blocks)]
    lower = [torch.linalg.cholesky(moment[own, own]) for own in columns]
    for _ in range(sweeps):
        for b, own in enumerate(columns):
            now = (second[:, :, b] @ first[b]).flatten(0, 1)  # (out_features, P)
            whole = now + torch.cholesky_solve((missed @ moment[:, own]).mT, lower[b]).mT
            grid = whole.reshape(out_blocks, -1, width)
            first[b], second[:, :, b] = _truncated(grid, lower[b], rank)
            missed[:, own] += now - (second[:, :, b] @ first[b]).flatten(0, 1)
    return _shared_evenly(first, _fitted_second(first, second, missed, moment))


def _fitted_second(first: Tensor, second: Tensor, missed: Tensor, moment: Tensor) -> Tensor:
    """Monarch's second factor by least squares over the whole input: all blocks of a row at once.

    missed: what the factors miss of the weight.
    """
    blocks, out_blocks, rank, _ = first.shape
    found = []
    for out, own in enumerate(missed.reshape(out_blocks, -1, missed.shape[1])):
        inwards: Tensor = torch.block_diag(*first[:, out])  # type: ignore[no-untyped-call]  # (K * rank, in_features)
        weighed = inwards @ moment
        found.append(_solved(weighed @ inwards.mT, weighed @ own.mT).mT.reshape(-1, blocks, rank))
    return second + torch.stack(found)


def _truncated(grid: Tensor, lower: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (L, rank, P) and (L, Q, rank) of blocks (L, Q, P), in the norm |block lower|."""
    rows, width = grid.shape[1:]
    weighed = grid @ lower
    if rows <= width:
        kept = torch.linalg.eigh(weighed @ weighed.mT).eigenvectors[..., -rank:]
        return kept.mT @ grid, kept
    kept = torch.linalg.eigh(weighed.mT @ weighed).eigenvectors[..., -rank:]
    return torch.linalg.solve_triangular(lower, kept.mT, upper=False, left=False), weighed @ kept


def _shared_evenly(first: Tensor, second: Tensor) -> Factors:
    """The same Monarch product, the size of each of its terms shared between the factors."""
    sizes = first.norm(dim=-1), second.norm(dim=1).permute(1, 0, 2)  # both (K, L, rank)
    ratio = (sizes[1] / sizes[0]).sqrt()
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), ratio, torch.ones_like(ratio))
    return Factors(first * ratio[..., None], second / ratio.permute(1, 0, 2)[:, None])


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


def blast_factors(weight: Tensor, num_blocks: int, rank: int, iterations: int, moment: Tensor | None = None) -> Factors:
    """BLAST's factors, by alternating least squares from the best plain product of this rank: never worse than it.

    moment: of the layer's whole input, (in_features, in_features), of which `damped` is taken; None: all features
    count alike, each by itself.
    """
    moment = None if moment is None else damped(moment)
    first, second, coupling = _plain(weight, num_blocks, rank, moment)
    fit = _Blast(weight, moment, first, second, coupling)
    for _ in range(iterations):
        fit.fit_second()
        fit.fit_coupling()
        fit.fit_first()
    return _balanced(Factors(fit.first, fit.second, fit.coupling))


@dataclass
class _Blast:
    """BLAST's factors while they are fitted, on tr(E C E^T) with E what the weight misses. Each is changed by the
    solution of its normal equations for what is missed, so that the error never grows."""

    weight: Tensor
    moment: Tensor | None
    first: Tensor
    second: Tensor
    coupling: Tensor

    def _weighed(self, missed: Tensor, own: slice) -> Tensor:
        """E C[:, b]."""
        return missed[:, own] if self.moment is None else missed @ self.moment[:, own]

    def _columns(self) -> Iterator[tuple[int, slice]]:
        width = self.first.shape[-1]
        yield from ((b, slice(b * width, (b + 1) * width)) for b in range(self.first.shape[0]))

    def _missed(self) -> Tensor:
        return self.weight - expanded(self.first, self.second, self.coupling)

    def fit_second(self) -> None:
        """U_l, given what it is multiplied by: S_lb V_b for all b. A row of blocks at a time, for its memory."""
        missed = self._missed().reshape(*self.second.shape[:2], -1)
        for out, own in enumerate(self.coupling):
            inwards = (own[..., None] * self.first).transpose(0, 1).flatten(1)  # (rank, in_features)
            weighed = inwards if self.moment is None else inwards @ self.moment
            self.second[out] += _solved(weighed @ inwards.mT, weighed @ missed[out].mT).mT

    def fit_coupling(self) -> None:
        """S_lb, given U_l and V_b: the normal equations have the elementwise product of both Gram matrices."""
        missed = self._missed()
        outputs = self.second.mT @ self.second  # (L, rank, rank)
        for b, own in self._columns():
            first = self.first[b]
            weighed = first if self.moment is None else first @ self.moment[own, own]
            error = self._weighed(missed, own).reshape(*self.second.shape[:2], -1)
            wanted = (self.second * (error @ first.mT)).sum(1)  # (L, rank), diagonal of U^T E C V^T
            changed = _solved(outputs * (weighed @ first.mT), wanted[..., None])[..., 0]
            self.coupling[:, b] += changed
            missed[:, own] -= ((self.second * changed[:, None]) @ first).flatten(0, 1)

    def fit_first(self) -> None:
        """V_b, given U_l S_lb for all l."""
        missed = self._missed()
        for b, own in self._columns():
            outwards = (self.second * self.coupling[:, b, None]).flatten(0, 1)  # (out_features, rank)
            changed = _solved(outwards.mT @ outwards, outwards.mT @ self._weighed(missed, own))
            if self.moment is not None:
                changed = _solved(self.moment[own, own], changed.mT).mT
            self.first[b] += changed
            missed[:, own] -= outwards @ changed


def _plain(weight: Tensor, num_blocks: int, rank: int, moment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of a plain product of low rank, coupled by ones; beyond full rank, small random ones."""
    lower = None if moment is None else torch.linalg.cholesky(moment)
    target = weight if lower is None else weight @ lower
    left, values, right = torch.linalg.svd(target, full_matrices=False)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    inwards = root[:, None] * right[:kept]
    if lower is not None:
        inwards = torch.linalg.solve_triangular(lower, inwards, upper=False, left=False)
    second = (left[:, :kept] * root).reshape(num_blocks, -1, kept)
    first = inwards.reshape(kept, num_blocks, -1).transpose(0, 1).contiguous()
    coupling = weight.new_ones(num_blocks, num_blocks, kept)
    if rank > kept:
        generator = torch.Generator(weight.device).manual_seed(0)

        def more(like: Tensor, dim: int) -> Tensor:
            shape = list(like.shape)
            shape[dim] = rank - kept
            drawn = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
            return torch.cat((like, 0.1 * like.std() * drawn), dim)

        second, first = more(second, -1), more(first, 1)
        coupling = torch.cat((coupling, coupling.new_ones(num_blocks, num_blocks, rank - kept)), -1)
    return first, second, coupling


def _balanced(factors: Factors) -> Factors:
    """The same product, its size shared by the factors."""
    assert factors.coupling is not None
    first, second, coupling = factors.first, factors.second, factors.coupling
    sizes = [first.norm(dim=(0, 2)), second.norm(dim=(0, 1)), coupling.norm(dim=(0, 1))]
    sizes = [torch.where(size > 0, size, torch.ones_like(size)) for size in sizes]
    together = torch.stack(sizes).log().mean(0).exp()
    first, second = first * (together / sizes[0])[:, None], second * (together / sizes[1])
    return Factors(first.contiguous(), second.contiguous(), (coupling * (together / sizes[2])).contiguous())
