"""Random attention programs: steps on scores and probabilities, right and wrong, with escapes and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores or probabilities, q, visible) -> the same after a step."""
INF = float("inf")


def _hidden(m: Tensor) -> Tensor:
    return ~m[:, None, None, :]


def _put(s: Tensor, q: Tensor, m: Tensor) -> Tensor:
    s = s.clone()
    s[_hidden(m).expand_as(s)] = -1e9
    return s


SCORES: dict[str, Step] = {
    "scale": lambda s, q, m: s * 0.5,
    "negate_twice": lambda s, q, m: (-s).neg(),
    "negate": lambda s, q, m: -s,
    "run_time_scale": lambda s, q, m: s * q.std(),
    "scale_a_head": lambda s, q, m: s * q[:, :, :1, :1],
    "scale_a_row": lambda s, q, m: s * q[..., :1],
    "scale_a_key": lambda s, q, m: s * q[..., :1].mT,
    "scale_inplace": lambda s, q, m: s.mul_(0.7),
    "top_off": lambda s, q, m: s - s.amax(-1, keepdim=True),
    "top_off_keys": lambda s, q, m: s - s.amax(-2, keepdim=True),
    "shift_rows": lambda s, q, m: s + q[..., :1],
    "shift_keys": lambda s, q, m: s + q[..., 0][:, :, None, :],
    "constant": lambda s, q, m: s + 3.0,
    "fill": lambda s, q, m: s.masked_fill(_hidden(m), -INF),
    "fill_low": lambda s, q, m: s.masked_fill(_hidden(m), -1e9),
    "fill_inplace": lambda s, q, m: s.masked_fill_(_hidden(m), -INF),
    "fill_weak": lambda s, q, m: s.masked_fill(_hidden(m), -1.0),
    "fill_queries": lambda s, q, m: s.masked_fill(~m[:, None, :, None] & _hidden(m), -1e9),
    "fill_heads": lambda s, q, m: s.masked_fill((q[:, :, :1, :1] > 0) & _hidden(m), -1e9),
    "where": lambda s, q, m: torch.where(m[:, None, None, :], s, -1e9),
    "added": lambda s, q, m: s + (1 - m[:, None, None, :].float()) * -1e9,
    "added_log": lambda s, q, m: s + m[:, None, None, :].float().log(),
    "times_and_added": lambda s, q, m: s * m[:, None, None].float() - (~m[:, None, None]).float() * 1e9,
    "times": lambda s, q, m: s * m[:, None, None].float(),
    "put": _put,
    "there_and_back": lambda s, q, m: s.mT.clone().mT,
    "transposed": lambda s, q, m: s.mT,
    "double": lambda s, q, m: s.double(),
    "float": lambda s, q, m: s.float(),
    "merged": lambda s, q, m: s.flatten(0, 1).view(s.shape),
    "rolled": lambda s, q, m: s.roll(1, -1),
    "tanh": lambda s, q, m: s.tanh(),
}


def _safe(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def _masked_weights(s: Tensor, m: Tensor) -> Tensor:
    e = s.exp() * m[:, None, None, :]
    return e / e.sum(-1, keepdim=True)


SOFTMAXES: dict[str, Step] = {
    "softmax": lambda s, q, m: s.softmax(-1),
    "columns": lambda s, q, m: s.mT.softmax(-2).mT,
    "wrong_dim": lambda s, q, m: s.softmax(-2),
    "exp_sum": lambda s, q, m: s.exp() / s.exp().sum(-1, keepdim=True),
    "safe": lambda s, q, m: _safe(s),
    "masked_weights": lambda s, q, m: _masked_weights(s, m),
    "log_softmax": lambda s, q, m: s.log_softmax(-1).exp(),
    "log_sum_exp": lambda s, q, m: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "quiet": lambda s, q, m: s.exp() / (1 + s.exp().sum(-1, keepdim=True)),
    "columns_summed": lambda s, q, m: s.exp() / s.exp().sum(-2, keepdim=True),
}
PROBS: dict[str, Step] = {
    "dropout": lambda p, q, m: F.dropout(p, 0.5, training=False),
    "nan_to_num": lambda p, q, m: p.nan_to_num(),
    "hidden": lambda p, q, m: p.masked_fill(_hidden(m), 0.0),
    "times": lambda p, q, m: p * m[:, None, None, :],
    "anew": lambda p, q, m: p * m[:, None, None] / (p * m[:, None, None]).sum(-1, keepdim=True),
    "half": lambda p, q, m: p * 0.5,
    "double": lambda p, q, m: p.double(),
    "there_and_back": lambda p, q, m: p.mT.mT,
    "transposed": lambda p, q, m: p.mT,
    "written": lambda p, q, m: p.mul_(2.0),
    "squared": lambda p, q, m: p * p,
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: q @ k.mT,
    "keys_first": lambda q, k: (k @ q.mT).mT,
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum_keys_first": lambda q, k: torch.einsum("bhqd,bhkd->bhkq", q, k).transpose(-1, -2),
}
VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda p, v: p @ v,
    "left": lambda p, v: (v.mT @ p.mT).mT,
    "einsum": lambda p, v: torch.einsum("bhqk,bhkd->bhqd", p, v),
    "einsum_out": lambda p, v: torch.einsum("bhqk,bhkd->bqhd", p, v),
    "wrong": lambda p, v: p.mT @ v,
}
Run = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def _plain(run: Run, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    return run(q, k, v, m)


def _checkpointed(run: Run, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = checkpoint(run, q, k, v, m, use_reentrant=False)
    return results


def _in_a_branch(run: Run, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = torch.cond(q.sum() < 1e9, lambda q: run(q, k, v, m), lambda q: run(q, q, v, m), (q,))
    return results


def _in_a_step(run: Run, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    _, results = scan(lambda c, x: (c * 1, run(x, k, v, m)), q, torch.stack([q, k]))
    return tuple(results)


BODIES: dict[str, Callable[[Run, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "": _plain,
    "checkpoint": _checkpointed,
    "cond": _in_a_branch,
    "scan": _in_a_step,
}

MISCHIEF = ("none", "returned", "written_before", "written_after", "written_by_another_name", "written_later")
"""What happens to one intermediate beside the chain."""


@dataclass(frozen=True)
class RandomProgram:
    """Names from the tables above; `which` intermediate (counted round) the mischief happens to.

    body: all of it is the body of an activation checkpoint, of cond or of scan, but for what makes the mask.
    """

    product: str
    scores: tuple[str, ...]
    softmax: str
    probs: tuple[str, ...]
    values: str
    mischief: str
    which: int
    body: str = ""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        m = m & m
        return BODIES[self.body](self._run, q, k, v, m)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        q, k, v = q * 1, k * 1, v * 1
        made = [q, k, v, PRODUCTS[self.product](q, k)]
        for name in self.scores:
            made.append(SCORES[name](made[-1], q, m))
        victim = made[self.which % len(made)]
        alias = victim[:1]
        if self.mischief == "written_before":
            victim.mul_(1.5)
        scores = made[-1]
        probs = SOFTMAXES[self.softmax](scores, q, m)
        if self.mischief == "written_after":
            victim.mul_(1.5)
        if self.mischief == "written_by_another_name":
            alias.mul_(1.5)
        for name in self.probs:
            probs = PROBS[name](probs, q, m)
        result = VALUES[self.values](probs, v.to(probs.dtype))
        if self.mischief == "written_later":
            victim.mul_(1.5)
        return (result, victim * 1) if self.mischief == "returned" else (result,)
