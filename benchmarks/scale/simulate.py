"""Time, memory and communication of one attention on 1 to 1,024 GPUs, by the cost model and a description of links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.tables import markdown_table
from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.parallel.costs import cost_of, method_of
from monarch_compile.attention.work import predict
from monarch_compile.cost.devices import Device
from monarch_compile.cost.links import Fabric

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOKENS = (2**16, 2**18, 2**20, 10 * 2**20)
BLOCK_SIZES = (64, 128, 256, 512, 1024)
SCALES = 0.5
"""More GPUs are worth it as long as each does at least this part of what one would do alone."""


@dataclass(frozen=True)
class Attention:
    """Heads, their features and the dtype of one attention with a window of one block."""

    heads: int = 12
    head_dim: int = 64
    dtype: torch.dtype = torch.bfloat16

    def ir(self, tokens: int, block_size: int) -> MonarchAttention:
        """Its IR, one batch entry."""
        sizes = (1, self.heads, self.heads, tokens, tokens, self.head_dim, self.head_dim)
        return MonarchAttention(*sizes, self.dtype, Form(block_size, window=1), self.head_dim**-0.5)


def best_block_size(attention: Attention, tokens: int, device: Device) -> int:
    """The block size of `BLOCK_SIZES` with which one GPU is fastest by the cost model."""
    return min(BLOCK_SIZES, key=lambda size: predict(attention.ir(tokens, size), device).monarch_s)


def rows(attention: Attention, device: Device, fabric: Fabric) -> list[dict[str, Any]]:
    """What is predicted for each number of tokens and GPUs, the way to share the work by the cost model."""
    found = []
    for tokens in TOKENS:
        block_size = best_block_size(attention, tokens, device)
        ir = attention.ir(tokens, block_size)
        alone = cost_of(ir, 1, device, fabric, "offsets").total_s
        for gpus in GPUS:
            method = method_of(ir, gpus, device, fabric)
            cost = cost_of(ir, gpus, device, fabric, method)
            row = {"tokens": tokens, "gpus": gpus, "block_size": block_size, "method": method, **asdict(cost)}
            found.append({**row, "total_s": cost.total_s, "speedup": alone / cost.total_s})
    return found


def limits(found: Sequence[dict[str, Any]]) -> list[str]:
    """For each number of tokens, up to how many GPUs it scales, and what stops it."""
    lines = []
    for tokens in dict.fromkeys(row["tokens"] for row in found):
        own = [row for row in found if row["tokens"] == tokens]
        good = [row for row in own if row["speedup"] >= SCALES * row["gpus"]]
        last = good[-1]
        after = next((row for row in own if row["gpus"] > last["gpus"]), last)
        part = after["send_s"] / after["total_s"]
        why = "sending" if part > 0.5 else "launches and copies that do not shrink"
        said = f"{tokens} tokens: at least {SCALES:.0%} of linear up to {last['gpus']} GPUs"
        lines.append(said if after is last else f"{said}; then {why} ({part:.0%} of the time is sending)")
    return lines


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = ["tokens", "GPUs", "block", "by", "ms", "of it sending", "MiB a GPU", "MiB sent a GPU", "speedup"]
    cells = [
        [
            str(row["tokens"]),
            str(row["gpus"]),
            str(row["block_size"]),
            row["method"] if row["gpus"] > 1 else "",
            f"{row['total_s'] * 1e3:.3f}",
            f"{row['send_s'] * 1e3:.3f}",
            f"{row['memory'] / 2**20:.1f}",
            f"{row['sent'] / 2**20:.1f}",
            f"{row['speedup']:.2f}",
        ]
        for row in found
    ]
    return "\n".join(markdown_table(head, cells))
