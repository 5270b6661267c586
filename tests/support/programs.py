"""Attention written in many ways: a grammar of spellings for property tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LOW = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Program:
    """One way to write attention: a name from each table below."""

    product: str
    scale: str
    mask: str
    softmax: str
    after: str
    values: str

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        factor = 1 / math.sqrt(q.shape[-1])
        if self.scale == "on_q":
            q = q * factor
        elif self.scale == "on_k":
            k = k / math.sqrt(q.shape[-1])
        elif self.scale == "split":
            q, k = q * math.sqrt(factor), k * math.sqrt(factor)
        scores = SCALES[self.scale](PRODUCTS[self.product](q, k), factor)
        scores = MASKS[self.mask](scores, visible)
        return VALUES[self.values](AFTER[self.after](SOFTMAXES[self.softmax](scores)), v)


def _bmm(q: Tensor, k: Tensor) -> Tensor:
    b, h, n, d = q.shape
    return torch.bmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(1, 2)).view(b, h, n, n)


def _bmm_values(p: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = v.shape
    return torch.bmm(p.reshape(b * h, n, n), v.reshape(b * h, n, d)).view(b, h, n, d)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-2, -1)),
    "linalg": lambda q, k: torch.linalg.matmul(q, k.mT),
    "at_mT": lambda q, k: q @ k.mT,
    "permute": lambda q, k: q @ k.permute(0, 1, 3, 2),
    "bmm": _bmm,
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum_letters": lambda q, k: torch.einsum("xyie, xyje -> xyij", q, k),
    "einsum_swapped": lambda q, k: torch.einsum("bhkd,bhqd->bhqk", k, q),
    "einsum_ellipsis": lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
}

SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mul": lambda s, f: s * f,
    "mul_left": lambda s, f: f * s,
    "div": lambda s, f: s / (1 / f),
    "div_tensor": lambda s, f: s / torch.tensor(1 / f),
    "div_inplace": lambda s, f: s.div_(1 / f),
    "on_q": lambda s, f: s,
    "on_k": lambda s, f: s,
    "split": lambda s, f: s,
}

MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda s, m: s,
    "masked_fill": lambda s, m: s.masked_fill(~m[:, None, None, :], float("-inf")),
    "masked_fill_low": lambda s, m: s.masked_fill(m[:, None, None, :] == 0, -1e9),
    "masked_fill_inplace": lambda s, m: s.masked_fill_(m.logical_not()[:, None, None, :], LOW),
    "where": lambda s, m: torch.where(m[:, None, None, :], s, LOW),
    "where_drop": lambda s, m: torch.where(~m[:, None, None, :], float("-inf"), s),
    "additive": lambda s, m: s + (1.0 - m[:, None, None, :].float()) * LOW,
    "additive_where": lambda s, m: s + torch.where(m, 0.0, float("-inf"))[:, None, None, :],
    "additive_zeros": lambda s, m: s + torch.zeros_like(s).masked_fill_(~m[:, None, None, :], float("-inf")),
    "additive_left": lambda s, m: torch.zeros(m.shape).masked_fill(~m, LOW)[:, None, None, :] + s,
    "expanded": lambda s, m: s.masked_fill(~m[:, None, None, :].expand(-1, 1, s.shape[-2], -1), LOW),
}

SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "functional": lambda s: F.softmax(s, dim=-1),
    "method": lambda s: s.softmax(-1),
    "dim_3": lambda s: torch.softmax(s, dim=3),
    "float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "upcast": lambda s: s.float().softmax(dim=-1).type_as(s),
    "safe_op": lambda s: torch.ops.aten._safe_softmax.default(s, -1),
    "special": lambda s: torch.special.softmax(s, -1),
}

AFTER: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda p: p,
    "dropout_eval": lambda p: F.dropout(p, 0.1, training=False),
    "dropout_inplace": lambda p: F.dropout(p, 0.1, training=False, inplace=True),
    "dropout_zero": lambda p: F.dropout(p, 0.0, training=True),
    "contiguous": lambda p: p.contiguous(),
}

VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda p, v: torch.matmul(p, v),
    "bmm": _bmm_values,
    "einsum": lambda p, v: torch.einsum("bhqk,bhkd->bhqd", p, v),
    "einsum_merged": lambda p, v: torch.einsum("bhqk,bhkd->bqhd", p, v).transpose(1, 2),
}
