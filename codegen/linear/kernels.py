"""The program of a Monarch linear: one kernel, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from monarch_compile.codegen.linear.schedule import Schedule, in_width, out_width
from monarch_compile.codegen.program import Buffer, Kernel, Program, Tiles
from monarch_compile.codegen.tiling import padded
from monarch_compile.linear.ir import INTERLEAVED, BlockLinear
from monarch_compile.version import __version__


def program(ir: BlockLinear, schedule: Schedule, partial_tokens: bool) -> Program:
    """The kernel of a canonical IR; partial_tokens: whether the last tile has fewer tokens than others."""
    ins, outs, p, q = ir.in_blocks, ir.out_blocks, in_width(ir), out_width(ir)
    main = schedule.main
    x = Buffer("x", ir.dtype, ("tokens", ir.in_features), (("x_token", 0), ("x_feature", 1)))
    first_names = ("first_in", "first_out", "first_rank", "first_width")
    first = Buffer("first", ir.dtype, (ins, outs, ir.rank, p), tuple((n, d) for d, n in enumerate(first_names)))
    second_names = ("second_out", "second_row", "second_in", "second_rank")
    second = Buffer("second", ir.dtype, (outs, q, ins, ir.rank), tuple((n, d) for d, n in enumerate(second_names)))
    bias = (Buffer("bias", ir.dtype, (ir.out_features,)),) if ir.bias else ()
    kernel = Kernel(
        family="linear",
        name="monarch_linear",
        template="fused.py.jinja",
        reads=(x, first, second, *bias),
        writes=(Buffer("y", ir.dtype, ("tokens", ir.out_features)),),
        updates=(),
        sizes=("tokens",),
        constants=(
            ("IN_BLOCKS", ins),
            ("OUT_BLOCKS", outs),
            ("IN_WIDTH", p),
            ("OUT_WIDTH", q),
            ("RANK", ir.rank),
            ("RANKS", padded(ir.rank)),
            ("TOKENS", main.rows),
            ("STEP", main.step),
            ("COLUMNS", schedule.columns),
        ),
        variables=(
            ("partial_tokens", partial_tokens),
            ("partial_width", p % main.step != 0),
            ("partial_rank", ir.rank != padded(ir.rank)),
            ("partial_columns", q % schedule.columns != 0),
            ("one_step", main.step >= p),
            ("has_bias", ir.bias),
            ("interleaved", ir.output_order == INTERLEAVED),
            ("activation", ir.activation),
        ),
        grid=(Tiles("tokens", main.rows), outs, -(-q // schedule.columns)),
        tiling=main,
        header=f"# monarch_compile {__version__}: {ir}\n# schedule: {schedule}",
    )
    return Program((kernel,), ("y",))


def specialize(ir: BlockLinear, schedule: Schedule, tensors: Mapping[str, Tensor], sizes: Mapping[str, Any]) -> bool:
    """Whether the last tile of tokens may not be whole; nothing is asked of a symbolic number."""
    tokens = sizes["tokens"]
    return not isinstance(tokens, int) or tokens % schedule.main.rows != 0


def expected(ir: BlockLinear, schedule: Schedule) -> bool:
    """That of a launch of an IR, as far as its tokens are known."""
    return not isinstance(ir.tokens, int) or ir.tokens % schedule.main.rows != 0
