"""Pieces of a prompt after a cache, attention alone, on a CUDA device: emitted kernels and exact attention.

    python -m benchmarks.cached_prefill result.json [--queries 2048 8192]

Times are medians of CUDA-graph replays, in milliseconds; memory is what a call allocates at its peak beside q, k and v,
in MiB. `predicted` is the cost model's exact and Monarch milliseconds on an H100. Errors of each exact subject are
relative, against the float64 triangle of the last queries. The file is written after each row.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clocks import cuda_clocks, peak_mib, reason, tidy
from benchmarks.resumable import machine
from monarch_compile.attention.form import Form
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.work import predict
from monarch_compile.cost.devices import DEVICES

HEADS, KEY_HEADS, HEAD_DIM, DTYPE = 32, 8, 128, torch.bfloat16
KEYS, QUERIES = (8192, 32768, 65536, 131072), (2048, 8192)
AT_ODD_PLACES = ((2048, 65536 - 13),)
"""Queries and keys whose first query is inside of a block, and whose last key fills none."""
FORM = {"block_size": 64, "window": 2, "prefix": 64}
CHOSEN = (8, 16, 32)
CHECKED = (300, 1500)

Call = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cached_prefill", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--queries", type=int, nargs="+", default=QUERIES)
    given = parser.parse_args()
    results: dict[str, Any] = {"environment": machine("cuda"), "what": __doc__, "form": FORM, "pieces": []}
    results |= {"heads": HEADS, "key_heads": KEY_HEADS, "head_dim": HEAD_DIM, "errors": _errors()}
    print(results["errors"], flush=True)
    for rows, keys in (*itertools.product(given.queries, KEYS), *AT_ODD_PLACES):
        if rows < keys:
            results["pieces"].append(_timed(rows, keys))
            given.path.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(results["pieces"][-1]), flush=True)


def inputs(rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """q of the last `rows` tokens, k and v of all `keys`, in the layout of a cache: (heads, tokens, features)."""
    draw = functools.partial(torch.randn, generator=torch.Generator("cuda").manual_seed(0), device="cuda", dtype=DTYPE)
    q = draw(1, rows, HEADS, HEAD_DIM).transpose(1, 2)
    k, v = (draw(1, KEY_HEADS, keys, HEAD_DIM) for _ in range(2))
    return q, k, v


def exact_calls(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Exact attention by each hand, which aligns the triangle with the last key; made when it is asked for."""

    def flash() -> Call:
        op = torch.ops.aten._scaled_dot_product_flash_attention
        return lambda: op(q, k, v, is_causal=True, scale=HEAD_DIM**-0.5)[0]

    def flex() -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        torch._dynamo.reset()
        rows, keys = q.shape[2], k.shape[2]
        cached = keys - rows
        mask = create_block_mask(lambda b, h, i, j: j <= i + cached, None, None, rows, keys, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)

    yield "flash", flash
    yield "flex", flex


def monarch_call(q: Tensor, k: Tensor, v: Tensor, chosen: int) -> Call:
    return lambda: monarch_attention(q, k, v, **FORM, chosen=chosen, causal=True)  # type: ignore[arg-type]


@torch.no_grad()
def _timed(rows: int, keys: int) -> dict[str, Any]:
    q, k, v = inputs(rows, keys)
    row: dict[str, Any] = {"queries": rows, "keys": keys, "ms": {}, "mib": {}, "predicted": {}}
    calls = [*exact_calls(q, k, v)]
    calls += [(f"chosen {n}", functools.partial(lambda n: monarch_call(q, k, v, n), n)) for n in CHOSEN]
    for name, make in calls:
        try:
            call = make()
            call()
            row["mib"][name] = peak_mib(call, "cuda")
            row["ms"][name] = {clock: take(call).p50 for clock, take in cuda_clocks(100).items()}
        except Exception as error:
            row["ms"][name] = reason(error)
        tidy("cuda")
    for n in CHOSEN:
        ir = MonarchAttention(
            1, HEADS, KEY_HEADS, rows, keys, HEAD_DIM, HEAD_DIM, DTYPE, Form(**FORM, chosen=n), 0.1, is_causal=True
        )
        found = predict(ir, DEVICES["h100"])
        row["predicted"][f"chosen {n}"] = [1e3 * found.exact_s, 1e3 * found.monarch_s]
    return row


@torch.no_grad()
def _errors() -> dict[str, Any]:
    """Of exact attention, and of the Monarch form where every block is chosen, which is exact, too."""
    q, k, v = inputs(*CHECKED)
    seen = torch.ones(*CHECKED, dtype=torch.bool, device="cuda").tril(CHECKED[1] - CHECKED[0])
    wide = (x.double().repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), *wide, attn_mask=seen)
    errors: dict[str, Any] = {}
    for name, make in (*exact_calls(q, k, v), ("all chosen", lambda: monarch_call(q, k, v, 1000))):
        try:
            found = make()().double()
            errors[name] = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
        except Exception as error:
            errors[name] = reason(error)
    return errors


if __name__ == "__main__":
    main()
