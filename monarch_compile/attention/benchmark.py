"""The CPU benchmark: attention alone, exact against Monarch form."""

from __future__ import annotations

import itertools
import json
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.attention.work import predict
from monarch_compile.cost.devices import DEVICES
from monarch_compile.tools.timing import Timing, environment, one_thread, time_interleaved

SEQ_LENS = (128, 256, 512, 1024, 1500, 2048, 4096)
LONG_SEQ_LENS = (*SEQ_LENS, 16384)
WINDOWS = (None, 1)


@dataclass(frozen=True)
class Row:
    """One line of the CPU benchmark; shapes are (batch, num_heads, seq_len, head_dim)."""

    shape: tuple[int, int, int, int]
    window: int | None
    block_size: int
    exact: Timing
    monarch: Timing
    predicted_speedup: float
    max_error: float

    @property
    def speedup(self) -> float:
        """Median exact time over median Monarch time."""
        return self.exact.p50 / self.monarch.p50


def cpu_attention(
    seq_lens: Sequence[int] = SEQ_LENS,
    *,
    num_heads: int = 12,
    head_dim: int = 64,
    block_size: int | None = None,
    seconds: float = 2.0,
) -> Iterator[Row]:
    """Time scaled_dot_product_attention against Monarch attention, both compiled by Inductor: float32, one thread."""
    with one_thread(), torch.no_grad():
        for seq_len, window in itertools.product(seq_lens, WINDOWS):
            yield _cpu_row((1, num_heads, seq_len, head_dim), window, block_size, seconds)


def run(
    seq_lens: Sequence[int] | None = None, *, long: bool = False, seconds: float = 2.0, json_path: Path | None = None
) -> list[Row]:
    """Run `cpu_attention`, print a table as rows come in, and write rows and machine to `json_path`."""
    with one_thread():
        machine = environment()
    print(f"{machine['cpu']}, {machine['threads']} thread, torch {machine['torch']}; float32, median [p20, p80] in ms")
    titles = f"{'(batch, heads, N, D)':>20} {'window':>6} {'block':>5}"
    print(f"{titles}  {'exact':>26}  {'monarch':>26}  {'faster':>7} {'predicted':>9}")
    rows = []
    for row in cpu_attention(seq_lens or (LONG_SEQ_LENS if long else SEQ_LENS), seconds=seconds):
        rows.append(row)
        print(
            f"{row.shape!s:>20} {row.window!s:>6} {row.block_size:>5}  {row.exact!s:>26}  {row.monarch!s:>26}  "
            f"{row.speedup:>6.2f}x {row.predicted_speedup:>8.2f}x",
            flush=True,
        )
    if json_path is not None:
        content = {"machine": machine, "rows": [asdict(row) | {"speedup": row.speedup} for row in rows]}
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return rows


def _cpu_row(shape: tuple[int, int, int, int], window: int | None, block_size: int | None, seconds: float) -> Row:
    batch, heads, seq_len, dim = shape
    generator = torch.Generator().manual_seed(seq_len)
    # As a projection leaves them: (batch, seq, heads, dim) in memory.
    q, k, v = (torch.randn(batch, seq_len, heads, dim, generator=generator).transpose(1, 2) for _ in range(3))
    cpu = DEVICES["cpu"]
    block = block_size or auto_block_size(seq_len, cpu.kind, window)
    form = Form(block, window=window)
    ir = MonarchAttention(batch, heads, heads, seq_len, seq_len, dim, dim, q.dtype, form, 1 / math.sqrt(dim))
    exact, monarch = compiled_attention({}), compiled_attention({"policy": "always", "strict": True, **asdict(form)})
    eager = monarch_attention(q.double(), k.double(), v.double(), block_size=block, window=window)
    error = (monarch(q, k, v) - eager).abs().max().item()
    calls = {"exact": lambda: exact(q, k, v), "monarch": lambda: monarch(q, k, v)}
    times = time_interleaved(calls, seconds)
    return Row(shape, window, block, times["exact"], times["monarch"], predict(ir, cpu).speedup, error)


def compiled_attention(options: dict[str, Any], *, causal: bool = False) -> Callable[..., Tensor]:
    """Attention of q, k, v and a mask of visible keys, if any, compiled with the backend's `options`; without options
    by stock Inductor. Keys and values may have fewer heads. causal: whether a query sees no later key; without a mask.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = None if mask is None else mask[:, None, None, :]
        grouped = q.shape[1] != k.shape[1]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal, enable_gqa=grouped
        )

    fresh = types.FunctionType(
        attention.__code__.replace(), attention.__globals__, argdefs=(None,), closure=attention.__closure__
    )
    compiled: Callable[..., Tensor] = torch.compile(
        fresh, backend="monarch" if options else "inductor", options=options or None, dynamic=False
    )
    return compiled
