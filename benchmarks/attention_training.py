"""Steps of training of attention alone, forward and backward, on a CUDA device: emitted kernels and exact attention.

    python -m benchmarks.attention_training result.json

Times are medians of CUDA-graph replays, in milliseconds; memory is what a step allocates at its peak beside q, k, v and
the gradient of the output, in MiB. Errors are relative, against float64.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench_cudagraph

from benchmarks.resumable import machine
from monarch_compile.attention.reference import reference
from monarch_compile.codegen.attention.gradients import launch_backward, launch_with_lse

HEADS, HEAD_DIM, DTYPE = 12, 64, torch.bfloat16
SHAPES = ((4, 1024), (4, 4096), (1, 16384))
BLOCKS, WINDOWS = (64, 128), (1, None)
EXACT = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
CHECKED = (1, 2, 4096)
"""Batch, heads and tokens of the problem whose gradients are compared with float64."""


def main(path: str) -> None:
    results = {
        "environment": machine("cuda"),
        "what": __doc__,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "steps": [_timed(batch, seq_len) for batch, seq_len in SHAPES],
        "errors": [_errors(block, window) for block, window in itertools.product(BLOCKS, WINDOWS)],
    }
    Path(path).write_text(json.dumps(results, indent=1) + "\n")


def inputs(batch: int, heads: int, seq_len: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, as one projection lays them out."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (batch, seq_len, 4, heads, HEAD_DIM)
    return list(torch.randn(size, generator=generator, device="cuda", dtype=DTYPE).permute(2, 0, 3, 1, 4))


def _timed(batch: int, seq_len: int) -> dict[str, Any]:
    q, k, v, dz = inputs(batch, HEADS, seq_len)
    row: dict[str, Any] = {"batch": batch, "seq_len": seq_len}
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    for name, backend in EXACT.items():
        with sdpa_kernel(backend):
            row[name] = _measured(lambda: torch.autograd.grad(scaled_dot_product_attention(*given), given, dz))
    for block, window in itertools.product(BLOCKS, WINDOWS):
        row[f"blocks of {block}, window {window}"] = _monarch(q, k, v, dz, _options(block, window))
    print(row, flush=True)
    return row


def _monarch(q: Tensor, k: Tensor, v: Tensor, dz: Tensor, options: dict[str, Any]) -> dict[str, float]:
    def forward() -> tuple[Tensor, Tensor]:
        return launch_with_lse(q, k, v, None, **options)

    def step() -> tuple[Tensor | None, ...]:
        return launch_backward(dz, q, k, v, None, *forward(), **options)

    return {**_measured(step), "forward": round(do_bench_cudagraph(forward, rep=50), 4)}


def _options(block: int, window: int | None) -> dict[str, Any]:
    return {"scale": HEAD_DIM**-0.5, "block_size": block, "window": window}


def _measured(step: Callable[[], Any]) -> dict[str, float]:
    """Time and peak memory of a step."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"step": round(do_bench_cudagraph(step, rep=100), 4), "peak_mib": round(peak, 1)}


def _errors(block: int, window: int | None) -> dict[str, Any]:
    q, k, v, dz = inputs(*CHECKED)
    options = _options(block, window)
    found = launch_backward(dz, q, k, v, None, *launch_with_lse(q, k, v, None, **options), **options)[:3]
    given = [x.double().requires_grad_() for x in (q, k, v)]
    right = torch.autograd.grad(reference(*given, None, **options), given, dz.double())
    errors = {f"d{name}": float((x - y).norm() / y.norm()) for name, x, y in zip("qkv", found, right, strict=True)}
    return {"block": block, "window": window, **errors}


if __name__ == "__main__":
    main(sys.argv[1])
