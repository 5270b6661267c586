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
    """Self-attention of q (batch, num_heads, seq_len, head_dim), k and v (batch, num_kv_heads, seq_len, head_dim).

    masked: key padding. num_kv_heads: None for as many as of queries. causal: without it, every query sees every key.
    """

    batch: int
    seq_len: int
    num_heads: int = 12
    head_dim: int = 64
    dtype: str = "float16"
    masked: bool = False
    num_kv_heads: int | None = None
    causal: bool = False

    def __str__(self) -> str:
        padding = " key padding" if self.masked else ""
        shared = "" if self.num_kv_heads is None else f" on {self.num_kv_heads}"
        order = ", causal" if self.causal else ""
        heads = f"{self.num_heads} heads of {self.head_dim}{shared}"
        return f"{self.batch} x {self.seq_len}, {heads}, {self.dtype}{padding}{order}"

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

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
    """A Monarch form; its block size is what "auto" gives, or what a tile holds, unless it is given.

    With a tile, the tokens lie on the largest square grid that they fill, and those that are left over before it.
    """

    num_iters: int = 1
    window: int | None = None
    prefix: int = 0
    tile: tuple[int, ...] | None = None
    window_shape: str = "box"
    chosen: int = 0
    block_size: int | None = None

    def __str__(self) -> str:
        prefix = f" prefix={self.prefix}" if self.prefix else ""
        tile = "" if self.tile is None else f" {'x'.join(map(str, self.tile))} tiles {self.window_shape}"
        chosen = f" chosen={self.chosen}" if self.chosen else ""
        return f"T={self.num_iters} window={self.window}{prefix}{chosen}{tile}"

    def ir(self, problem: Problem, device: Device) -> MonarchAttention:
        """The IR of `problem` in this form on `device`."""
        dim, dtype = problem.head_dim, problem.torch_dtype
        block = self.block_size or auto_block_size(problem.seq_len, device.kind, self.window, self.prefix)
        form, grid = Form(block, self.num_iters, window=self.window, prefix=self.prefix, chosen=self.chosen), None
        if self.tile is not None:
            side = math.isqrt(problem.seq_len)
            grid, prefix = (side, side), problem.seq_len - side**2
            form = replace(
                form, block_size=math.prod(self.tile), prefix=prefix, tile=self.tile, window_shape=self.window_shape
            )
        return MonarchAttention(
            *(problem.batch, problem.num_heads, problem.key_heads, problem.seq_len, problem.seq_len, dim, dim),
            dtype=dtype,
            form=form,
            grid=grid,
            scale=dim**-0.5,
            mask=MaskKind.KEY_PADDING if problem.masked else MaskKind.NONE,
            is_causal=problem.causal,
        )


@dataclass(frozen=True)
class Inputs:
    """Tensors of a problem. mask: (batch, seq_len), True where a key is visible; None where all are.

    causal: whether a query sees no later key.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    causal: bool = False

    def trained(self) -> Inputs:
        """The same as leaves that want gradients."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        return Inputs(q, k, v, self.mask, self.causal)


def inputs(problem: Problem, device: str) -> Inputs:
    """Standard normal q, k, v as a fused projection gives them: views of one (batch, seq, all heads, dim) tensor."""
    generator = torch.Generator(device).manual_seed(problem.seq_len)
    heads = [problem.num_heads, problem.key_heads, problem.key_heads]
    shape = (problem.batch, problem.seq_len, sum(heads), problem.head_dim)
    packed = torch.randn(shape, device=device, dtype=problem.torch_dtype, generator=generator)
    q, k, v = packed.transpose(1, 2).split(heads, 1)
    if not problem.masked:
        return Inputs(q, k, v, causal=problem.causal)
    lengths = torch.tensor(problem.lengths(), device=device)
    return Inputs(q, k, v, torch.arange(problem.seq_len, device=device) < lengths[:, None], problem.causal)


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
PREFILLS = tuple(Problem(1, n, 32, 128, "bfloat16", num_kv_heads=8, causal=True) for n in (8192 << p for p in range(5)))
_CAUSAL = tuple(AutoForm(1, 2, prefix=64, chosen=chosen, block_size=64) for chosen in (8, 16, 32))
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
    "causal": Preset("cuda", PREFILLS, _CAUSAL),
    "cpu": Preset("cpu", tuple(Problem(1, n, dtype="float32") for n in CPU_LENGTHS), _ONE_ITERATION),
}
