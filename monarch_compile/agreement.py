"""Whether the ranks of torch.distributed were given the same: a difference is found before it becomes a wrong number
or a rank that waits for ever."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from monarch_compile.errors import ConfigError

logger = logging.getLogger(__name__)

MOST_SHOWN = 100
"""Characters of a value that are shown; of a longer one, a hash follows."""


def shown(value: object) -> str:
    """A value as ranks compare it: its text, cut with a hash of the whole."""
    text = repr(value)
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[:MOST_SHOWN]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def require_equal(what: str, own: Mapping[str, object], group: Any) -> None:
    """Compare named values with those of the other ranks of a group; every rank of it must call this.

    Raises:
        ConfigError: a value differs. All ranks raise it, and it names the value and the ranks.
    """
    import torch.distributed as dist

    mine = {name: shown(value) for name, value in own.items()}
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    for name in dict.fromkeys(name for values in found for name in values):
        by_rank = [values.get(name, "missing") for values in found]
        if len(set(by_rank)) > 1:
            usual = Counter(by_rank).most_common(1)[0][0]
            odd = next(rank for rank, value in enumerate(by_rank) if value != usual)
            here = by_rank.index(usual)
            where = f"{usual} on rank {here}, {by_rank[odd]} on rank {odd}"
            raise ConfigError(f"{what} must be the same on all ranks; {name!r} is {where}")


_COMPILED: Counter[str] = Counter()
"""How often this process has compiled a graph, by its text."""


def require_equal_compilation(graph: str, own: Mapping[str, object]) -> None:
    """Compare the options of a compilation with those of the rank that compiled the same graph first.

    They are exchanged by the store of the default process group, so no rank waits for another: ranks need not compile
    at the same time, nor the same graphs. Of a graph that is compiled several times, the n-th times are compared.
    Nothing is done where torch.distributed is not in use.

    Raises:
        ConfigError: an option differs; it names the option and both ranks.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if torch.distributed.get_world_size() == 1:
        return
    key = hashlib.sha256(graph.encode()).hexdigest()[:24]
    _COMPILED[key] += 1
    rank = torch.distributed.get_rank()
    mine = {"rank": str(rank), **{name: shown(value) for name, value in own.items()}}
    try:
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store()
        first = json.loads(store.compare_set(f"monarch_compile/{key}/{_COMPILED[key]}", "", json.dumps(mine)))
    except Exception as error:  # a store that cannot compare, or whose host is gone: the options may still be equal
        logger.debug("options were not compared with other ranks: %r", error)
        return
    for name in mine:
        if name != "rank" and first.get(name) != mine[name]:
            raise ConfigError(
                f"ranks must compile a graph with the same options; {name!r} is {first.get(name)} on rank "
                f"{first['rank']}, {mine[name]} on rank {rank}"
            )
