"""Exchanges between ranks, each one all-to-all: its gradient is the all-to-all back.

Every rank must take part in the backward pass of an exchange: parts are slices of tensors that need gradients on all
ranks alike, empty where nothing is sent, and what is received must be used, also where it is empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Ranks:
    """The ranks of one group: its process group, how many they are, which of them this process is, and its name."""

    group: Any
    size: int
    rank: int
    name: str

    @staticmethod
    def of(group: Any) -> Ranks:
        """Those of a process group."""
        return Ranks(group, dist.get_world_size(group), dist.get_rank(group), group.group_name)


def exchange(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], ranks: Ranks) -> list[Tensor]:
    """Send `parts[d]` to rank d; what rank s sends has `shapes[s]`. One dtype for all."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    received_sizes, sent_sizes = [math.prod(shape) for shape in shapes], [part.numel() for part in parts]
    received = sent if ranks.size == 1 else _all_to_all(sent, received_sizes, sent_sizes, ranks.group)
    pieces = torch.split(received, received_sizes)
    return [piece.reshape(tuple(shape)) for piece, shape in zip(pieces, shapes, strict=True)]


Waits = Callable[[], None]
"""Waits for what was sent and received; on CUDA the device does, not the host."""

Received = Callable[[], list[list[Tensor]]]
"""Waits for what was sent, and gives what each rank sent."""


def started(parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Any]], ranks: Ranks) -> Received:
    """Send the tensors `parts[d]`, of one dtype, to rank d; those that rank s sends have `shapes[s]`. No gradients.

    On CUDA they are on their way while the device does what follows, until the result is asked for. Each tensor is
    copied once, however it lies.
    """
    sent_sizes = [sum(x.numel() for x in own) for own in parts]
    received_sizes = [sum(math.prod(shape) for shape in own) for own in shapes]
    sent, place = parts[0][0].new_empty(sum(sent_sizes)), 0
    for x in (x for own in parts for x in own):
        sent[place : place + x.numel()].view(x.shape).copy_(x)
        place += x.numel()
    on_its_way = sent
    if ranks.size > 1:
        on_its_way = collectives.all_to_all_single(sent, received_sizes, sent_sizes, ranks.group)

    def received() -> list[list[Tensor]]:
        flat = _waited(on_its_way) if ranks.size > 1 else on_its_way
        pieces = iter(torch.split(flat, [math.prod(shape) for own in shapes for shape in own]))
        return [[next(pieces).view(tuple(shape)) for shape in own] for own in shapes]

    return received


def exchange_lists(
    parts: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Any]], ranks: Ranks
) -> list[list[Tensor]]:
    """`started`, and waited for."""
    return started(parts, shapes, ranks)()


def started_in_place(sent: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]], ranks: Ranks) -> Waits:
    """Send the tensors `sent[d]`, each contiguous, to rank d, and receive into `targets[s]`, likewise, what rank s
    sends, in the same order: no copy but of what a rank sends to itself. No gradients."""
    for x, target in zip(sent[ranks.rank], targets[ranks.rank], strict=True):
        target.copy_(x)
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    calls = [dist.P2POp(dist.isend, x, group=ranks.group, group_peer=rank) for rank in others for x in sent[rank]]
    calls += [dist.P2POp(dist.irecv, x, group=ranks.group, group_peer=rank) for rank in others for x in targets[rank]]
    works = dist.batch_isend_irecv(calls) if calls else []

    def wait() -> None:
        for work in works:
            work.wait()

    return wait


def _all_to_all(*arguments: Any) -> Tensor:
    apply: Any = _AllToAll.apply
    return apply(*arguments)  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """An all-to-all of one flat tensor; its gradient is the all-to-all back. torch 2.11 has no gradient of the wait."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, received_sizes: list[int], sent_sizes: list[int], group: Any) -> Tensor:
        ctx.options = sent_sizes, received_sizes, group
        return _waited(collectives.all_to_all_single(sent, received_sizes, sent_sizes, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _waited(collectives.all_to_all_single(grad.contiguous(), *ctx.options)), None, None, None


def _waited(x: Tensor) -> Tensor:
    """What a collective gives; on CUDA the device waits for it, not the host."""
    if isinstance(x, collectives.AsyncCollectiveTensor):
        return x.wait()
    wait: Any = collectives.wait_tensor
    return wait(x)  # type: ignore[no-any-return]


def to_rank(x: Tensor, target: int, shapes: Sequence[Sequence[int]], ranks: Ranks) -> list[Tensor]:
    """Each rank's `x`, on rank `target`, where they have `shapes`; elsewhere empty tensors."""
    parts = [x if rank == target else _nothing(x) for rank in range(ranks.size)]
    received = shapes if ranks.rank == target else [(0, *shape[1:]) for shape in shapes]
    return exchange(parts, received, ranks)


def from_rank(x: Tensor, source: int, shape: Sequence[int], ranks: Ranks) -> Tensor:
    """Rank `source`'s `x` of this shape, on all ranks. Elsewhere x may be any tensor of the dtype."""
    own = x if ranks.rank == source else _nothing(x)
    shapes = [shape if rank == source else (0, *shape[1:]) for rank in range(ranks.size)]
    found = exchange([own] * ranks.size, shapes, ranks)
    return torch.cat(found)


def from_all(x: Tensor, dim: int, sizes: Sequence[int], ranks: Ranks) -> Tensor:
    """The pieces of all ranks, joined along `dim`, of which rank s has `sizes[s]`."""
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
    return torch.cat(exchange([x] * ranks.size, shapes, ranks), dim)


def _nothing(x: Tensor) -> Tensor:
    """An empty part that depends on x."""
    return x.reshape(-1).narrow(0, 0, 0)
