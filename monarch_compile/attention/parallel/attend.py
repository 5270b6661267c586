"""Attention of one rank's piece of a sequence, by whichever way to share the work is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from monarch_compile import autocast
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.attention.parallel.by_heads import attend_by_heads
from monarch_compile.attention.parallel.by_offsets import attend_by_offsets
from monarch_compile.attention.parallel.costs import HEADS, method_of
from monarch_compile.attention.parallel.exchange import Ranks
from monarch_compile.attention.parallel.spread import Spread
from monarch_compile.cost.devices import installed
from monarch_compile.cost.links import fabric_of
from monarch_compile.errors import InputError


@dataclass(frozen=True)
class Shared:
    """How the ranks share one attention. form, grid, causal, scale: as in `monarch_attention`. method: "heads",
    "offsets" or "auto"."""

    spread: Spread
    form: Form
    scale: float
    grid: tuple[int, ...] | None = None
    causal: bool = False
    method: str = "auto"


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, shared: Shared, ranks: Ranks) -> Tensor:
    """Monarch attention of this rank's piece, equal to the rows that one process would compute of the sequence.

    q (E, H, n, D), k (E, H_kv, n, D), v (E, H_kv, n, D_v) -> (E, H, n, D_v). key_mask: (E, n), of the rank's own
    tokens, as in `reference.reference`; None on all ranks or on none. The output's memory order is that of `reference`.

    Raises:
        InputError: the tensors are not what the rank holds, or the attention cannot be shared so.
    """
    _require_pieces(q, k, v, key_mask, shared.spread, ranks)
    spread, form = shared.spread, shared.form
    sizes = (q.shape[0], q.shape[1], k.shape[1], spread.seq_len, spread.seq_len, q.shape[3], v.shape[3])
    mask = MaskKind.NONE if key_mask is None else MaskKind.KEY_PADDING
    ir = MonarchAttention(*sizes, q.dtype, form, shared.scale, mask, shared.causal, shared.grid)
    if _chosen(ir, ranks.size, q.device.type, shared.method) == HEADS:

        def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            named: dict[str, Any] = {"scale": shared.scale, "grid": shared.grid, "causal": shared.causal, **vars(form)}
            if mask is not None:
                named |= {"key_padding_mask": ~mask} if mask.dtype == torch.bool else {"key_bias": mask}
            return monarch_attention(q, k, v, **named)

        output = attend_by_heads(q, k, v, key_mask, spread, ranks, whole)
    else:
        with autocast.switched_off(q.device.type):
            output = attend_by_offsets(q, k, v, key_mask, spread, ranks, form, shared.scale)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


@lru_cache(maxsize=1024)
def _chosen(ir: MonarchAttention, ranks: int, device_type: str, asked: str) -> str:
    return method_of(ir, ranks, installed(device_type), fabric_of(device_type), asked)


def _require_pieces(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, spread: Spread, ranks: Ranks) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise InputError(f"q, k and v must be (batch, num_heads, tokens, dim); found {shapes}")
    fit = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
    if not fit or q.shape[2] != k.shape[2] or q.shape[1] % k.shape[1]:
        raise InputError(
            f"q, k and v must be of one sequence, and num_heads a multiple of num_kv_heads; found {shapes}"
        )
    if not (q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point):
        raise InputError(f"q, k and v must share one floating dtype; found {q.dtype}, {k.dtype}, {v.dtype}")
    spread.require_piece(ranks.rank, q.shape[2])
    if key_mask is not None and tuple(key_mask.shape) != (k.shape[0], k.shape[2]):
        raise InputError(f"the mask must be {(k.shape[0], k.shape[2])}; found {tuple(key_mask.shape)}")
