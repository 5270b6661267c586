"""The emitted kernels on a CUDA device, checked against the float64 reference.

    python -m benchmarks.gpu_kernels result.json

`monarch-compile bench speed` times them; `monarch-compile tune` looks for better schedules.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.resumable import machine
from benchmarks.speed.problems import Problem as Attention
from benchmarks.speed.problems import inputs
from monarch_compile.attention.form import as_arguments
from monarch_compile.attention.op import attention
from monarch_compile.attention.reference import reference
from monarch_compile.codegen import launcher as launching

CHECKS = (
    # batch, num_heads, N, head_dim, block_size, num_iters, init, pad, masked, window, prefix
    (2, 3, 1000, 64, 39, 1, "identity", "post", False, None, 0),
    (2, 3, 1000, 64, 39, 2, "mean", "pre", True, None, 0),
    (1, 2, 4999, 128, 70, 3, "identity", "post", True, None, 0),
    (1, 2, 1500, 25, 300, 1, "identity", "pre", False, None, 0),
    (1, 2, 777, 80, 32, 1, "mean", "post", True, None, 0),
    (1, 2, 700, 256, 100, 2, "identity", "post", False, None, 0),
    (1, 2, 16384, 64, 128, 1, "identity", "post", False, None, 0),
    (2, 3, 1000, 64, 39, 1, "identity", "post", False, 1, 0),
    (2, 3, 1000, 64, 39, 1, "identity", "pre", True, 1, 4),
    (1, 2, 4999, 128, 70, 1, "identity", "post", False, 2, 100),
    (1, 2, 1500, 25, 300, 1, "identity", "post", True, 0, 0),
    (2, 3, 1000, 64, 39, 2, "mean", "pre", True, 1, 4),
    (1, 2, 777, 80, 32, 3, "identity", "post", False, 40, 0),
    (1, 2, 700, 256, 100, 1, "mean", "post", False, 1, 0),
    (1, 2, 16384, 64, 128, 1, "identity", "post", False, 1, 0),
)
TILED = (
    # batch, num_heads, grid, head_dim, tile, num_iters, init, masked, window, window_shape, prefix
    (2, 3, (37, 37), 64, (4, 8), 1, "identity", False, 0, "box", 1),
    (2, 3, (37, 37), 64, (4, 8), 1, "identity", True, 1, "plus", 5),
    (1, 2, (37, 37), 80, (8, 8), 2, "mean", True, 1, "box", 1),
    (1, 2, (128, 128), 64, (8, 8), 1, "identity", False, 0, "box", 0),
    (1, 2, (128, 128), 64, (8, 8), 2, "identity", False, None, "box", 0),
    (1, 2, (61, 67), 25, (8, 16), 1, "identity", True, 2, "box", 0),
    (1, 2, (9, 30, 31), 128, (4, 4, 4), 1, "identity", True, 1, "plus", 5),
    (1, 2, (16, 32, 32), 64, (2, 4, 4), 1, "identity", False, 0, "box", 0),
)
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py needs a CUDA device")
    result: dict[str, Any] = {"environment": machine("cuda")}
    print(result["environment"], flush=True)
    result["check"] = check()
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not all(row["fine"] for row in result["check"]):
        sys.exit("the kernels disagree with the reference")


def check() -> list[dict[str, Any]]:
    """Relative Frobenius error of every check and dtype against the float64 reference."""
    rows, allocate = [], launching._allocate
    launching._allocate = lambda like, shape, kind: allocate(like, shape, kind).fill_(float("nan"))
    try:
        for case, dtype in itertools.product((*CHECKS, *TILED), TOLERANCES):
            error = _error(case, dtype)
            fine = error <= TOLERANCES[dtype]
            rows.append({"case": case, "dtype": str(dtype), "error": error, "fine": fine})
            print(f"{'ok  ' if fine else 'FAIL'} {error:.1e} {dtype} {case}", flush=True)
    finally:
        launching._allocate = allocate
    return rows


def _error(case: tuple[Any, ...], dtype: torch.dtype) -> float:
    batch, num_heads, head_dim, seq_len, masked, options = _problem(case)
    q, k, v = random_inputs(batch, num_heads, seq_len, head_dim, dtype)
    mask = None
    if masked:
        mask = torch.rand(batch, seq_len, device="cuda") > 0.3
        mask[0, -2 * options["block_size"] :] = False
    found = attention(q, k, v, mask, **dict(zip(options, as_arguments(options), strict=True)))
    expected = reference(q.double(), k.double(), v.double(), mask, **options)
    error = ((found - expected).norm() / expected.norm()).item()
    return math.inf if math.isnan(error) else error


def _problem(case: tuple[Any, ...]) -> tuple[int, int, int, int, bool, dict[str, Any]]:
    """batch, num_heads, head_dim, N and masked of a row of `CHECKS` or `TILED`, and the operator's options."""
    tile = grid = None
    if case in TILED:
        batch, num_heads, grid, head_dim, tile, num_iters, init, masked, window, shape, prefix = case
        seq_len, block_size, pad = prefix + math.prod(grid), math.prod(tile), "post"
    else:
        batch, num_heads, seq_len, head_dim, block_size, num_iters, init, pad, masked, window, prefix = case
        shape = "box"
    options = {"block_size": block_size, "num_iters": num_iters, "init": init, "pad": pad, "scale": head_dim**-0.5}
    options |= {"window": window, "prefix": prefix, "tile": tile, "window_shape": shape, "grid": grid}
    return batch, num_heads, head_dim, seq_len, masked, options


def random_inputs(
    batch: int, num_heads: int, seq_len: int, head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v on the device."""
    x = inputs(Attention(batch, seq_len, num_heads, head_dim, str(dtype).removeprefix("torch.")), "cuda")
    return x.q, x.k, x.v


if __name__ == "__main__":
    main()
