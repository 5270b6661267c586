"""Attention in the bodies of cond, scan and while_loop, with masks from inside and from outside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.utils.checkpoint import checkpoint

from tests.corpus.entry import Entry
from tests.corpus.spellings import SEQ_LEN, Program, attend, hidden, inputs, scored

PLACE = torch.arange(SEQ_LEN)


def _branches(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    def then(q: Tensor) -> Tensor:
        return attend(scored(q, k), v)

    def other(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    return torch.cond(q.sum() > 0, then, other, (q,))


def _branches_masked(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    matrix = m[:, None, None, :].expand(-1, 1, SEQ_LEN, -1)

    def then(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=matrix)

    def other(q: Tensor) -> Tensor:
        return attend(scored(q, k).masked_fill(hidden(m), -1e9), v)

    return torch.cond(q.sum() > 0, then, other, (q,))


def _branches_causal(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    def then(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return torch.cond(q.sum() > 0, then, lambda q: q * 2, (q,))


def _steps(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return scan(lambda c, x: (attend(scored(c, k), v) + x, c * 1), q, torch.stack([q, k]))[0]


def _steps_masked(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    added = (1.0 - m[:, None, None, :].float()).expand(-1, 1, SEQ_LEN, -1) * -1e9
    return scan(lambda c, x: (attend(scored(c, k) + added, v) + x, c * 1), q, torch.stack([q, k]))[0]


def _steps_checkpointed(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(F.scaled_dot_product_attention, c, k, v, use_reentrant=False) + x, c * 1

    return scan(step, q, torch.stack([q, k]))[0]


def _steps_scanned_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    masks = torch.stack([m, ~m])[:, :, None, None, :].expand(-1, -1, 1, SEQ_LEN, -1) | (PLACE < 1)
    return scan(lambda c, x: (F.scaled_dot_product_attention(c, k, v, attn_mask=x), c * 1), q, masks.clone())[0]


def _loop(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    given = (torch.tensor(0), q * 1)
    return while_loop(lambda i, x: i < 2, lambda i, x: (i + 1, attend(scored(x, k), v)), given)[1]


def _loop_masked(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    matrix = torch.where(m, 0.0, float("-inf"))[:, None, None, :].expand(-1, 1, SEQ_LEN, -1)

    def step(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, F.scaled_dot_product_attention(x, k, v, attn_mask=matrix)

    return while_loop(lambda i, x: i < 2, step, (torch.tensor(0), q * 1))[1]


def _loop_carried_mask(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    def step(i: Tensor, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return i + 1, F.scaled_dot_product_attention(x, k, v, attn_mask=mask), mask & (PLACE[:, None] >= PLACE)

    given = (torch.tensor(0), q * 1, torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool))
    return while_loop(lambda i, x, mask: i < 2, step, given)[1]


def _nested(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    matrix = m[:, None, None, :].expand(-1, 1, SEQ_LEN, -1)

    def step(c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        def then(c: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(c, k, v, attn_mask=matrix)

        return torch.cond(x.sum() > 0, then, lambda c: c * 2, (c,)), c * 1

    return scan(step, q, torch.stack([q, k]))[0]


LOWERED: dict[str, Program] = {
    "cond": _branches,
    "cond_masked": _branches_masked,
    "scan": _steps,
    "scan_masked": _steps_masked,
    "scan_checkpointed": _steps_checkpointed,
    "while_loop": _loop,
    "while_loop_masked": _loop_masked,
    "cond_in_scan": _nested,
}
EXACT: dict[str, Program] = {
    "cond_causal": _branches_causal,
    "scanned_mask": _steps_scanned_mask,
    "carried_mask": _loop_carried_mask,
}


def entries() -> list[Entry]:
    """Every program under no_grad: in training such bodies stay exact."""
    lowered = [Entry(name, lambda p=program: (p, inputs()), want="lowered") for name, program in LOWERED.items()]
    return lowered + [Entry(name, lambda p=program: (p, inputs()), want="exact") for name, program in EXACT.items()]
