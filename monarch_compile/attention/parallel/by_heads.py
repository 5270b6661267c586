"""Sequence parallelism by an all-to-all over heads: each rank computes some heads of the whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monarch_compile.attention.parallel.exchange import Ranks, exchange, from_all, started, started_in_place
from monarch_compile.attention.parallel.spread import Spread
from monarch_compile.calls import is_trained

MOST_TURNS = 4
LEAST_BYTES = 4 * 2**20
"""How many turns there are at most where heads are not long, and what they send at least."""
LEAST_MESSAGE = 8 * 2**20
"""Bytes of a head's rows from which on they are sent from where they lie. Each such head is a message of its own, which
takes the host longer than copies of less than this take the device."""
LONG_HEAD = 64 * 2**20
"""Bytes of a head's rows from which on a turn is as short as can be, one key head, since nothing is computed while the
first turn is sent. Below, the host takes longer to begin a turn than the device to compute it (1.5 ms on two H200, and
.4 ms for a head of 32 MiB). All ranks must take as many turns, so that shapes alone decide."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of q, k, v and a key mask of the whole sequence."""


def heads_divide(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether each rank can take as many heads, query heads with the key heads that they share."""
    return heads % ranks == 0 and kv_heads % ranks == 0


def attend_by_heads(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, spread: Spread, ranks: Ranks, attend: Attend
) -> Tensor:
    """Attention of this rank's piece: q (E, H, n, D), k (E, H_kv, n, D), v (E, H_kv, n, D_v) -> (E, H, n, D_v).

    key_mask: (E, n), of the rank's own tokens, or None on all ranks. H and H_kv are multiples of the number of ranks.
    Where no gradient is wanted, heads are taken in turns, so that some are sent while others are computed.
    """
    sizes = [spread.tokens_of(rank) for rank in range(ranks.size)]
    if not is_trained([x for x in (q, k, v, key_mask) if x is not None]):
        return _in_turns(q, k, v, _whole_mask(key_mask, sizes, ranks), spread, ranks, attend)
    whole = [_by_heads(x, sizes, ranks) for x in (q, k, v)]
    key_mask = _whole_mask(key_mask, sizes, ranks)
    output = attend(whole[0], whole[1], whole[2], key_mask)
    batch, own_heads, _, value_dim = output.shape
    parts = list(torch.split(output, sizes, 2))
    shapes = [(batch, own_heads, sizes[ranks.rank], value_dim)] * ranks.size
    return torch.cat(exchange(parts, shapes, ranks), 1)


def _by_heads(x: Tensor, sizes: list[int], ranks: Ranks) -> Tensor:
    """From a piece (E, H, n, D) of all heads to some heads (E, H / ranks, N, D) of the sequence."""
    parts = list(x.chunk(ranks.size, 1))
    batch, heads, _, dim = parts[0].shape
    return torch.cat(exchange(parts, [(batch, heads, size, dim) for size in sizes], ranks), 2)


def _whole_mask(key_mask: Tensor | None, sizes: list[int], ranks: Ranks) -> Tensor | None:
    """The key mask of the whole sequence, (E, N)."""
    if key_mask is None or key_mask.dtype != torch.bool:
        return None if key_mask is None else from_all(key_mask, 1, sizes, ranks)
    return from_all(key_mask.to(torch.uint8), 1, sizes, ranks).to(torch.bool)


def _in_turns(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, spread: Spread, ranks: Ranks, attend: Attend
) -> Tensor:
    """The attention, some heads of each rank at a time: the next ones, and results, are sent while heads are computed.

    No more is sent ahead, since the host takes its time for it, in which it launches no kernel.
    """
    sizes = [spread.tokens_of(rank) for rank in range(ranks.size)]
    in_place = _lies_by_heads((q, k, v), spread)
    short = in_place and _rows_bytes((q, k, v), spread) >= LONG_HEAD
    turns = k.shape[1] // ranks.size if short else turns_of(q, k, spread, ranks.size)
    split = [_heads_of(x, turns, ranks.size) for x in (q, k, v)]
    send = _send_in_place if in_place else _send_copies
    there: list[Joined] = []
    back = []
    for turn in range(turns):
        ahead = range(turn + len(there), min(turn + 2, turns))
        there += [send([x[:, :, next_turn] for x in split], sizes, ranks) for next_turn in ahead]
        output = attend(*there.pop(0)(), key_mask)
        batch, heads, _, dim = output.shape
        own = [[(batch, sizes[ranks.rank], heads, dim)]] * ranks.size  # sent in the output's memory order
        parts = [[part] for part in torch.split(output.transpose(1, 2), sizes, 1)]
        back.append(started(parts, own, ranks))
    found = split[0].new_empty(batch, sizes[ranks.rank], turns * ranks.size * heads, dim)
    at = torch.unflatten(found, 2, (ranks.size, turns, heads))
    for turn, received_back in enumerate(back):
        for rank, (part,) in enumerate(received_back()):
            at[:, :, rank, turn].copy_(part)
    return found.transpose(1, 2)


Joined = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Waits for q, k and v of some heads and of the whole sequence."""


def _lies_by_heads(tensors: tuple[Tensor, ...], spread: Spread) -> bool:
    """Whether rows of one head are many, and side by side on all ranks, so that a head is sent from where it lies.

    Ranks must agree: pieces that differ in size are not asked about.
    """
    return (
        not spread.has_empty_places
        and not spread.prefix
        and _rows_bytes(tensors, spread) >= LEAST_MESSAGE
        and all(x.stride(3) == 1 and x.stride(2) == x.shape[3] for x in tensors)
    )


def _rows_bytes(tensors: tuple[Tensor, ...], spread: Spread) -> int:
    """Of a head that has the fewest features, and a whole piece of the sequence."""
    return min(spread.places * x.shape[3] * x.element_size() for x in tensors)


def _send_in_place(split: list[Tensor], sizes: list[int], ranks: Ranks) -> Joined:
    """Send each head from where it lies to where it belongs. split: q, k, v, each (E, ranks, heads, n, D)."""
    whole = [x.new_empty(x.shape[0], x.shape[2], sum(sizes), x.shape[4]) for x in split]
    places = [torch.split(x, sizes, 2) for x in whole]
    sent = [[row for x in split for row in _rows(x[:, rank])] for rank in range(ranks.size)]
    targets = [[row for of_x in places for row in _rows(of_x[rank])] for rank in range(ranks.size)]
    wait = started_in_place(sent, targets, ranks)

    def joined() -> tuple[Tensor, Tensor, Tensor]:
        wait()
        return whole[0], whole[1], whole[2]

    return joined


def _rows(x: Tensor) -> list[Tensor]:
    """The rows of each head of (E, heads, n, D)."""
    return [x[entry, head] for entry in range(x.shape[0]) for head in range(x.shape[1])]


def _send_copies(split: list[Tensor], sizes: list[int], ranks: Ranks) -> Joined:
    """Send heads by copies side by side. split: q, k, v, each (E, ranks, heads, n, D)."""
    parts = [[x[:, rank] for x in split] for rank in range(ranks.size)]
    shapes = [[(x.shape[0], x.shape[2], size, x.shape[4]) for x in split] for size in sizes]
    received = started(parts, shapes, ranks)

    def joined() -> tuple[Tensor, Tensor, Tensor]:
        found = received()
        q, k, v = (torch.cat([of_rank[place] for of_rank in found], 2) for place in range(3))
        return q, k, v

    return joined


def turns_of(q: Tensor, k: Tensor, spread: Spread, ranks: int) -> int:
    """In how many turns the heads of a rank are taken where these are not long, as many on all ranks: what a rank with
    a whole piece sends to another in one turn is no smaller than `LEAST_BYTES`."""
    numbers = q.shape[0] * q.shape[1] * q.shape[3] * spread.places
    most = max(1, min(MOST_TURNS, numbers * q.element_size() // ranks // LEAST_BYTES))
    return max(turns for turns in range(1, most + 1) if k.shape[1] // ranks % turns == 0)


def _heads_of(x: Tensor, turns: int, ranks: int) -> Tensor:
    """From (E, H, n, D) to (E, ranks, turns, heads, n, D), a view."""
    return torch.unflatten(x, 1, (ranks, turns, -1))
