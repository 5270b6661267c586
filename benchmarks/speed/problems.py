"""What is timed: problems, the Monarch forms of each, and presets of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.cost.devices import Device


@dataclass(frozen=True)
class Problem:
    """Bidirectional self-attention of q, k, v, each (batch, num_heads, seq_len, head_dim); `masked`: key padding."""

    batch: int
    seq_len: int
    num_heads: int = 12
    head_dim: int = 64
    dtype: str = "float16"
    masked: bool = False

    def __str__(self) -> str:
        padding = " key padding" if self.masked else ""
        return f"{self.batch} x {self.seq_len}, {self.num_heads} heads of {self.head_dim}, {self.dtype}{padding}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def lengths(self) -> list[int]:
        """Visible keys of each batch entry: from half of the sequence to all of it."""
        return [self.seq_len - (self.seq_len // 2) * (i + 1) // (self.batch + 1) for i in range(self.batch)]


@dataclass(frozen=True)
class AutoForm:
    """A Monarch form; its block size is what "auto" gives, or what a tile holds.

    With a tile, the tokens lie on the largest square grid that they fill, and those that are left over before it.
    """

    num_iters: int = 1
    window: int | None = None
    prefix: int = 0
    tile: tuple[int, ...] | None = None
    window_shape: str = "box"

    def __str__(self) -> str:
        prefix = f" prefix={self.prefix}" if self.prefix else ""
        tile = "" if self.tile is None else f" {'x'.join(map(str, self.tile))} tiles {self.window_shape}"
        return f"T={self.num_iters} window={self.window}{prefix}{tile}"

    def ir(self, problem: Problem, device: Device) -> MonarchAttention:
        """The IR of `problem` in this form on `device`."""
        dim, dtype = problem.head_dim, problem.torch_dtype
        block = auto_block_size(problem.seq_len, device.kind, self.window, self.prefix)
        form, grid = Form(block, self.num_iters, window=self.window, prefix=self.prefix), None
        if self.tile is not None:
            side = math.isqrt(problem.seq_len)
            grid, prefix = (side, side), problem.seq_len - side**2
            form = replace(
                form, block_size=math.prod(self.tile), prefix=prefix, tile=self.tile, window_shape=self.window_shape
            )
        return MonarchAttention(
            *(problem.batch, problem.num_heads, problem.num_heads, problem.seq_len, problem.seq_len, dim, dim),
            dtype=dtype,
            form=form,
            grid=grid,
            scale=dim**-0.5,
            mask=MaskKind.KEY_PADDING if problem.masked else MaskKind.NONE,
        )


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem. mask: (batch, seq_len), True where a key is visible; None where all are."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None

    def trained(self) -> Inputs:
        """The same as leaves that want gradients."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.mask)


def inputs(problem: Problem, device: str) -> Inputs:
    """Standard normal q, k, v as a fused projection gives them: views of one (batch, seq, 3, heads, dim) tensor."""
    generator = torch.Generator(device).manual_seed(problem.seq_len)
    shape = (problem.batch, problem.seq_len, 3, problem.num_heads, problem.head_dim)
    packed = torch.randn(shape, device=device, dtype=problem.torch_dtype, generator=generator)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    if not problem.masked:
        return Inputs(q, k, v)
    lengths = torch.tensor(problem.lengths(), device=device)
    return Inputs(q, k, v, torch.arange(problem.seq_len, device=device) < lengths[:, None])


@dataclass(frozen=True)
class Preset:
    """Every problem is timed in every form, and exactly."""

    device: str
    problems: tuple[Problem, ...]
    forms: tuple[AutoForm, ...]


H200_SHAPES = ((1024, 256), (64, 1024), (1, 1024), (16, 4096), (1, 4096))
H200_SHAPES += ((4, 16384), (1, 16384), (1, 32768), (1, 65536))
LENGTHS = tuple(256 << power for power in range(10))
BATCHES = ((64, 256), (1024, 256), (8, 1024), (64, 1024), (256, 1024), (16, 4096), (64, 4096), (4, 16384), (16, 16384))
HEADS = ((12, 64), (16, 128))
H200_WIDE = ((1, 4096), (1, 16384))
HEAD_DIMS = (16, 32, 40, 64, 72, 80, 96, 128, 160, 192, 256)
ODD_SHAPES = ((4, 4097, 16), (1, 16385, 16), (8, 1500, 8))
CPU_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
WINDOWS = (None, 1)


def _full() -> Iterator[Problem]:
    """Every length at batch 1, then the batch sizes."""
    shapes = [*((1, seq_len) for seq_len in LENGTHS), *BATCHES]
    for (batch, seq_len), heads, dtype, masked in itertools.product(
        shapes, HEADS, ("float16", "bfloat16"), (False, True)
    ):
        yield Problem(batch, seq_len, *heads, dtype, masked)


def _heads() -> Iterator[Problem]:
    """Heads of other sizes at one length."""
    for head_dim in HEAD_DIMS:
        yield Problem(4, 4096, 16, head_dim, "bfloat16")


def _odd() -> Iterator[Problem]:
    """Lengths with a class token before whole blocks, and one that cuts its last block."""
    for batch, seq_len, num_heads in ODD_SHAPES:
        yield Problem(batch, seq_len, num_heads, dtype="bfloat16")


STEP_SHAPES = ((4, 1024), (16, 1024), (1, 4096), (4, 4096), (1, 16384), (4, 16384))
_GRIDS = ((4, 4096, 16), (4, 4097, 16), (16, 4096, 12), (1, 16384, 16), (1, 16385, 16))
_TILED = (
    AutoForm(1, 1, tile=(8, 8), window_shape="plus"),
    AutoForm(1, 1, tile=(8, 8)),
    AutoForm(1, None, tile=(8, 8)),
    AutoForm(1, 1, tile=(4, 8), window_shape="plus"),
    AutoForm(1, None, tile=(4, 8)),
)
_ONE_ITERATION = tuple(AutoForm(1, window) for window in WINDOWS)
PRESETS: dict[str, Preset] = {
    "h200": Preset(
        "cuda",
        (*(Problem(*shape) for shape in H200_SHAPES), *(Problem(*shape, *HEADS[1]) for shape in H200_WIDE)),
        (*_ONE_ITERATION, AutoForm(2)),
    ),
    "h200-heads": Preset("cuda", tuple(_heads()), _ONE_ITERATION),
    "h200-odd": Preset("cuda", tuple(_odd()), (*_ONE_ITERATION, *(AutoForm(1, 1, prefix=prefix) for prefix in (1, 4)))),
    "grids": Preset("cuda", tuple(Problem(*shape, dtype="bfloat16") for shape in _GRIDS), (AutoForm(1, 1), *_TILED)),
    "steps": Preset("cuda", tuple(Problem(*shape, dtype="bfloat16") for shape in STEP_SHAPES), _ONE_ITERATION),
    "full": Preset("cuda", tuple(_full()), tuple(AutoForm(*x) for x in itertools.product((1, 2, 3), WINDOWS))),
    "cpu": Preset("cpu", tuple(Problem(1, n, dtype="float32") for n in CPU_LENGTHS), _ONE_ITERATION),
}
