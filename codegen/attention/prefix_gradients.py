"""What the kernels of gradients leave to torch where a form has a prefix: all that has as many rows as the prefix.

Index letters: p a key or a row of the prefix, n any position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monarch_compile.attention.groups import cut, split_mask


@dataclass(frozen=True, eq=False)
class PrefixGradients:
    """The rows of a prefix of attention, which see every key, and its keys, which every row sees.

    q (E, H, N, D), k (E, H_kv, N, D), v (E, H_kv, N, D_v); key_mask (E, N), bool or a centred bias. at_end: whether the
    `prefix` tokens are the last of the sequence, not the first.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    scale: float
    prefix: int
    at_end: bool

    def write_lse(self, lse: Tensor) -> None:
        """Writes the logarithms of the total weights of the prefix's rows into lse (E, H, N), float32."""
        _write(self._first(lse), self._by_head(self._scores(self.k, self.key_mask).logsumexp(-1)))

    def delta_of_rows(self, dz: Tensor, z: Tensor) -> Tensor:
        """(E, H, P) float32: dz . z of each row of the prefix."""
        dz, z = (self._first(x).float() for x in (dz, z))
        return (dz * z).sum(-1).contiguous()

    def add(
        self,
        dz: Tensor,
        z: Tensor,
        lse: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor, Tensor | None],
        weights: Tensor,
        dscores: Tensor,
        rows: Tensor,
    ) -> None:
        """Writes the gradients of the prefix's rows and keys into dq, dk, dv (E, heads, N, dim) and dbias (E, N).

        weights, dscores: (E, H, N, p) of all rows but the prefix's with the prefix's keys; p up to a tile's size.
        rows: (E, H, p, N), dscores of the prefix's rows with all keys but the prefix's.
        """
        dq, dk, dv, dbias = gradients
        prefix = self.prefix
        near_weights, near_dscores = self._among_themselves(dz, z, lse)  # (E, H_kv, G * P, p)
        q_lead, dz_lead = (self._by_key_head(self._first(x)).float() for x in (self.q, dz))
        q_rest, dz_rest = (self._by_key_head(self._rest(x)) for x in (self.q, dz))
        weights, dscores = (self._by_key_head(_slice(self._rest(x), 3, prefix)) for x in (weights, dscores))
        dk_lead = (dscores.mT @ q_rest).float() + near_dscores.mT @ q_lead
        dv_lead = (weights.mT @ dz_rest).float() + near_weights.mT @ dz_lead
        rows = self._by_key_head(self._cut(_slice(rows, 2, prefix), 3)[1])
        dq_lead = (rows @ self._rest(self.k)).float() + near_dscores @ self._first(self.k).float()
        _write(self._first(dq), self.scale * self._by_head(dq_lead))
        _write(self._first(dk), self.scale * dk_lead)
        _write(self._first(dv), dv_lead)
        if dbias is not None:
            _write(self._cut(dbias, 1)[0], dscores.float().sum((1, 2)) + near_dscores.sum((1, 2)))

    def _among_themselves(self, dz: Tensor, z: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(E, H_kv, G * P, p) float32: weights of the prefix's rows with its keys, and gradients of their scores."""
        mask = None if self.key_mask is None else self._cut(self.key_mask, 1)[0]
        scores = self._scores(self._first(self.k), mask)
        row_lse = self._by_key_head(self._first(lse).unsqueeze(-1))
        weights = (scores - row_lse.masked_fill(row_lse == float("-inf"), float("inf"))).exp()
        delta = self._by_key_head(self.delta_of_rows(dz, z).unsqueeze(-1))
        dweights = self._by_key_head(self._first(dz)).float() @ self._first(self.v).float().mT
        return weights, weights * (dweights - delta)

    def _scores(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """(E, H_kv, G * P, keys) float32: of the prefix's rows with some keys."""
        scores = self.scale * self._by_key_head(self._first(self.q)).float() @ k.float().mT
        if key_mask is None:
            return scores
        seen, bias = split_mask(key_mask, torch.float32)
        scores = scores if bias is None else scores + bias.unsqueeze(1).unsqueeze(1)
        return torch.where(seen.unsqueeze(1).unsqueeze(1), scores, float("-inf"))

    def _by_key_head(self, x: Tensor) -> Tensor:
        """From (E, H, rows, ...) to (E, H_kv, G * rows, ...)."""
        return torch.unflatten(x, 1, (self.k.shape[1], -1)).flatten(2, 3)

    def _by_head(self, x: Tensor) -> Tensor:
        """From (E, H_kv, G * P, ...) to (E, H, P, ...)."""
        return torch.unflatten(x, 2, (-1, self.prefix)).flatten(1, 2)

    def _first(self, x: Tensor) -> Tensor:
        """What x (E, heads, N, ...) holds of the prefix."""
        return self._cut(x, 2)[0]

    def _rest(self, x: Tensor) -> Tensor:
        """What it holds of all other positions."""
        return self._cut(x, 2)[1]

    def _cut(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """What x holds of the prefix and of all other positions, along a dim of positions."""
        return cut(x, dim, self.prefix, self.at_end)


def _slice(x: Tensor, dim: int, end: int) -> Tensor:
    """A view of the start of x along a dim; indexing would ask for a device."""
    found: Tensor = torch.ops.aten.slice.Tensor(x, dim, 0, end)
    return found


def _write(part: Tensor, values: Tensor) -> None:
    """Copies values into a view; the method of tensors would ask for a device."""
    torch.ops.aten.copy_.default(part, values)
