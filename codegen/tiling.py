"""How one kernel is tiled, and the limits of the devices that it is tiled for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from monarch_compile.errors import CodegenError

MIN_TILE = 16  # the least size of a tl.dot operand on every tensor core generation we emit for
DTYPE_BYTES = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4}
"""The dtypes that kernels are emitted for, and the bytes of an element."""
SHARED_LIMITS = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227}
"""Shared memory that one program may use, in KiB, by compute capability."""
DEFAULT_SHARED_LIMIT = 99

WIDE_BYTES = 128
"""From this size on, rows of a tile in shared memory are all laid out alike for Hopper's products (swizzled by 128
bytes); narrower ones are laid out in other ways."""

TUNED_ON = ("NVIDIA H200", "NVIDIA H100 80GB HBM3")
"""The GPUs that shipped schedules were tuned on: made on the first; on the second, a search found nothing faster
(benchmarks/results/h100_tuned.json)."""

ALL = 0
"""`Tiling.turns`: all tiles of what a program may meet in turn."""

Capability = tuple[int, int]
"""The compute capability of a CUDA device."""


@dataclass(frozen=True)
class Tiling:
    """The tiling of one kernel: it owns `rows` output rows and streams over its reduction `step` at a time.

    turns: how many tiles of rows one program meets in turn, the next on its way while one is worked on. 1: one tile.
    `ALL`: as many as there are; what this means is the kernel's.
    """

    rows: int
    step: int
    num_warps: int
    num_stages: int
    turns: int = 1

    def __post_init__(self) -> None:
        for size in (self.rows, self.step):
            if size < MIN_TILE or size & (size - 1):
                raise CodegenError(f"a tile must be a power of two of at least {MIN_TILE}; found {size} in {self}")
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1 or self.turns < ALL:
            raise CodegenError(f"a kernel needs 1, 2, 4, 8 or 16 warps, stages and turns; found {self}")

    def __str__(self) -> str:
        turns = "" if self.turns == 1 else f"/t{self.turns or 'all'}"
        return f"{self.rows}x{self.step}/w{self.num_warps}/s{self.num_stages}{turns}"


def shared_limit(capability: Capability | None) -> int:
    """Bytes of shared memory that one program may use."""
    return 1024 * SHARED_LIMITS.get(capability or (0, 0), DEFAULT_SHARED_LIMIT)


def padded(size: int) -> int:
    """`size` as a tile of tl.dot sees it: the next power of two, at least 16."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())


def feature_tiles(head_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """The features of a key and of a value as tiles of tl.dot see them: `padded`, and both of `WIDE_BYTES` if one is.

    A kernel that multiplies tiles of both kinds is compiled wrongly by ptxas 12.8, which Triton 3.6 brings: it takes
    what no instruction has set for a part of the address (the descriptor) of a narrow tile in shared memory, and the
    product reads elsewhere. ptxas 12.9 does not. tests/attention/kernel/test_backward_gpu.py has cases.
    """
    head, value = padded(head_dim), padded(value_dim)
    wide = WIDE_BYTES // dtype.itemsize
    if dtype.itemsize != 2 or max(head, value) < wide:
        return head, value
    return max(head, wide), max(value, wide)
