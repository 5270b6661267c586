"""Attention on the command line."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from monarch_compile.errors import InputError
from monarch_compile.tools.commands import Commands

if TYPE_CHECKING:
    from monarch_compile.attention.ir import MonarchAttention


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes and options of attentions to tune."""

    def window(text: str) -> int | tuple[int, ...] | None:
        if text == "none":
            return None
        return tuple(map(int, text.split(","))) if "," in text else int(text)

    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], metavar="N")
    parser.add_argument(
        "--windows", type=window, nargs="+", default=[None, 1], metavar="W", help="'none', a number, or 0,1,1"
    )
    parser.add_argument("--block-size", type=int, metavar="B", help='default: what "auto" gives')
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--iters", type=int, default=1)
    parser.add_argument("--masked", action="store_true", help="with key padding")
    parser.add_argument("--grid", type=int, nargs="+", metavar="N", help="sizes of a token grid, instead of --lengths")
    parser.add_argument(
        "--tile", type=int, nargs="+", metavar="B", help="tokens of a block along each axis of the grid"
    )
    parser.add_argument("--window-shape", choices=("box", "plus"), default="box")
    parser.add_argument("--prefix", type=int, default=0, help="tokens before the grid, or the blocks")
    parser.add_argument("--prefix-at-end", action="store_true", help="these tokens come after the grid, or the blocks")


def problems(args: argparse.Namespace, device_type: str) -> list[MonarchAttention]:
    """The IRs of the lengths and windows in `args`; no block size is what "auto" gives on such a device."""
    import torch

    from monarch_compile.attention.form import Form
    from monarch_compile.attention.ir import MaskKind, MonarchAttention
    from monarch_compile.attention.lengths import auto_block_size

    if (args.grid is None) != (args.tile is None):
        raise InputError("--grid needs --tile, and --tile needs --grid")
    tile, grid = (None if x is None else tuple(x) for x in (args.tile, args.grid))
    lengths = args.lengths if grid is None else [args.prefix + math.prod(grid)]
    dim, found = args.head_dim, []
    mask = MaskKind.KEY_PADDING if args.masked else MaskKind.NONE
    for seq_len, window in itertools.product(lengths, args.windows):
        block = math.prod(tile) if tile else args.block_size or auto_block_size(seq_len, device_type, window)
        shape = (args.batch, args.heads, args.heads, seq_len, seq_len, dim, dim)
        ends = {"prefix": args.prefix, "prefix_at_end": args.prefix_at_end}
        form = Form(block, args.iters, window=window, tile=tile, window_shape=args.window_shape, **ends)
        found.append(MonarchAttention(*shape, getattr(torch, args.dtype), form, dim**-0.5, mask, grid=grid))
    return found


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the CPU benchmark, shared with benchmarks/cpu_attention.py."""
    parser.add_argument("--long", action="store_true", help="also time N = 16384")
    parser.add_argument("--seq-lens", type=int, nargs="+", metavar="N", help="sequence lengths instead of the usual")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on each row")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows and the machine as JSON")


def bench(args: argparse.Namespace) -> None:
    """Run the CPU benchmark."""
    from monarch_compile.attention.benchmark import run

    run(seq_lens=args.seq_lens, long=args.long, seconds=args.seconds, json_path=args.json)


COMMANDS = Commands(add_tune_arguments, problems, add_bench_arguments, bench)
