"""Attention by offsets on the emitted kernels: stage 1 of a rank's blocks, stage 2 of its offsets. No gradients.

Three steps, with an exchange after each but the last. Shapes as in `by_offsets`; blocks of one head stand in the order
(head, offset, block) that the kernels have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.attention.form import Form


@dataclass(frozen=True)
class OwnBlocks:
    """What a rank keeps of its blocks: values (E, b * i, H, D_v) and logsumexps (E, H, b * i) of the windows; None
    where there are none."""

    near: tuple[Tensor, Tensor] | None


def summaries_by_offsets(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, lead: int, form: Form, scale: float, ranks: int
) -> tuple[OwnBlocks, list[list[Tensor]]]:
    """Stage 1: what the rank keeps, and for each rank q, a, y and c of its offsets.

    q (E, H, n, D): the rank's queries, in whole blocks. k, v (E, H_kv, m, D), visible (E, m): its keys, between those
    of `lead` blocks before and of some after, whose windows see them.
    """
    from monarch_compile.codegen.attention.partial import launch_summaries, natural

    batch, heads, length, _ = q.shape
    before, count = lead * form.block_size, length // form.block_size
    around = F.pad(q, (0, 0, before, k.shape[2] - before - length))  # the kernel has as many queries as keys
    a, y, c, *groups = launch_summaries(around, k, v, visible, form, scale)
    near = None
    if groups:
        lses = torch.unflatten(groups[0][:, :, lead : lead + count], 0, (batch, heads))
        rows = natural(lses).transpose(2, 3).flatten(2)
        near = (groups[1][:, before : before + length], rows)
    share = -(-form.block_size // ranks)
    missing = share * ranks - form.block_size
    queries = F.pad(torch.unflatten(q, 2, (count, form.block_size)), (0, 0, 0, missing))
    own = [x[:, :, lead : lead + count] for x in (a, y)]
    own = [F.pad(x, (0, 0, 0, 0, 0, missing)) for x in own]
    own.append(F.pad(c[:, :, lead : lead + count], (0, 0, 0, missing)))
    at = [[*(x[:, rank * share : (rank + 1) * share] for x in own)] for rank in range(ranks)]
    parts = [[queries[:, :, :, rank * share : (rank + 1) * share], *of_rank] for rank, of_rank in enumerate(at)]
    return OwnBlocks(near), parts


def far_field_of_offsets(
    received: list[list[Tensor]], window: int | None, value_dim: int, *, masked: bool
) -> list[tuple[Tensor, Tensor]]:
    """Stage 2 of the rank's offsets, from what each rank sent: values (E, b * j, H, D_v) and logsumexps (E, H, b, j)
    of the far field, for each rank those of its blocks."""
    from monarch_compile.codegen.attention.partial import launch_far_field

    queries = torch.cat([of_rank[0] for of_rank in received], 2)  # (E, H, b, j, D)
    a, y, c = (torch.cat([of_rank[place] for of_rank in received], 2) for place in (1, 2, 3))
    counts = [of_rank[0].shape[2] for of_rank in received]
    share = queries.shape[3]
    z, lse = launch_far_field(queries.flatten(2, 3), a, y, c, window, value_dim, masked=masked)
    sizes = [count * share for count in counts]
    return list(zip(torch.split(z, sizes, 1), torch.split(lse, sizes, 2), strict=True))


def merged(own: OwnBlocks, received: list[tuple[Tensor, Tensor]], form: Form) -> tuple[Tensor, Tensor]:
    """Values (E, n, H, D_v) and logsumexps (E, H, n) of the rank's rows, from the far fields that each rank sent."""
    ranks, (batch, length, heads, dim) = len(received), received[0][0].shape
    share = -(-form.block_size // ranks)
    count = length // share
    values = torch.cat([z.view(batch, count, share, heads, dim) for z, _ in received], 2)[:, :, : form.block_size]
    lses = torch.cat([lse.view(batch, heads, count, share) for _, lse in received], 3)[..., : form.block_size]
    values, lses = values.flatten(1, 2), lses.flatten(2)
    if own.near is None:
        return values, lses
    near_values, near_lses = own.near
    total = torch.logaddexp(near_lses, lses)
    part = (lses - total).exp().masked_fill(total == float("-inf"), 0.0).transpose(1, 2).unsqueeze(-1)
    return (near_values + (values - near_values.float()) * part).to(values.dtype), total
