"""Kernels of single products, by blocks: those of staged forms and of gradients, as data.

All of them are one template. What a tensor's index is made of is written as text, in which g is the block, m and n are
row and column of the result, i is what is summed over; in the place of a result, row and column are m and n as tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from monarch_compile.codegen.linear.schedule import (
    Schedule,
    Specialization,
    coupling_columns,
    in_width,
    out_width,
)
from monarch_compile.codegen.program import Buffer, Kernel, Program, Size, Tiles, header_of
from monarch_compile.codegen.tiling import MIN_TILE, Tiling, padded
from monarch_compile.linear.ir import INTERLEAVED, MONARCH, BlockLinear, FormedLinear, LinearGradients


class Operand(NamedTuple):
    """A factor of a product: rows: of its own result index (m, or n); inner: of i; base: of g."""

    buffer: Buffer
    base: str
    rows: str
    inner: str


@dataclass(frozen=True)
class Result:
    """What a product gives. size: blocks, rows, columns and what is summed over, in numbers or by name."""

    buffer: Buffer
    place: str
    groups: int
    rows: Size
    columns: int
    inner: Size


def x_buffer(ir: BlockLinear) -> Buffer:
    """The input (tokens, in_features)."""
    return Buffer("x", ir.dtype, ("tokens", ir.in_features), (("x_token", 0), ("x_feature", 1)))


def first_buffer(ir: BlockLinear) -> Buffer:
    """The first factor, as `BlockLinear` has it."""
    p = in_width(ir)
    if ir.kind == MONARCH:
        names, dims = ("first_in", "first_out", "first_rank", "first_width"), (ir.in_blocks, ir.out_blocks, ir.rank, p)
        return Buffer("first", ir.dtype, dims, _strides(names))
    return Buffer("first", ir.dtype, (ir.in_blocks, ir.rank, p), _strides(("first_in", "first_rank", "first_width")))


def second_buffer(ir: BlockLinear) -> Buffer:
    """The second factor."""
    q = out_width(ir)
    if ir.kind == MONARCH:
        names = ("second_out", "second_row", "second_in", "second_rank")
        return Buffer("second", ir.dtype, (ir.out_blocks, q, ir.in_blocks, ir.rank), _strides(names))
    return Buffer(
        "second", ir.dtype, (ir.out_blocks, q, ir.rank), _strides(("second_out", "second_row", "second_rank"))
    )


def coupling_buffer(ir: BlockLinear) -> Buffer:
    """BLAST's diagonals."""
    names = ("coupling_out", "coupling_in", "coupling_rank")
    return Buffer("coupling", ir.dtype, (ir.out_blocks, ir.in_blocks, ir.rank), _strides(names))


def _strides(names: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    return tuple((name, dim) for dim, name in enumerate(names))


@dataclass(frozen=True)
class Maker:
    """Makes the kernels of one program."""

    ir: BlockLinear
    of: FormedLinear | LinearGradients
    schedule: Schedule
    specialization: Specialization

    @property
    def between(self) -> Buffer:
        """What the last product reads, (L, tokens, K * rank), or of BLAST (L, tokens, rank)."""
        ir = self.ir
        width = ir.in_blocks * ir.rank if ir.kind == MONARCH else ir.rank
        return Buffer("z", ir.dtype, (ir.out_blocks, "tokens", width))

    def first(self) -> Kernel:
        """The product of the input with the first factor."""
        ir = self.ir
        left = Operand(x_buffer(ir), "g * IN_WIDTH * x_feature", "m * x_token", "i * x_feature")
        if ir.kind == MONARCH:
            rows = "(n // RANK) * first_out + (n % RANK) * first_rank"
            place = "(column // RANK * tokens + row) * (IN_BLOCKS * RANK) + g * RANK + column % RANK"
            columns, into, what = ir.out_blocks * ir.rank, self.between, "z[l, m, b] = x_b first[b, l]^T, g is b."
        else:
            rows, place = "n * first_rank", "(g * tokens + row) * RANK + column"
            into = Buffer("t", ir.dtype, (ir.in_blocks, "tokens", ir.rank))
            columns, what = ir.rank, "t[b] = x_b first[b]^T, g is b."
        right = Operand(first_buffer(ir), "g * first_in", rows, "i * first_width")
        result = Result(into, place, ir.in_blocks, "tokens", columns, in_width(ir))
        return self.product("first", what, left, right, result)

    def couple(self) -> Kernel:
        """BLAST's sums over input blocks."""
        ir = self.ir
        columns = coupling_columns(ir)
        tiling = Tiling(MIN_TILE, columns, 4, 1)
        return self._kernel(
            "couple",
            "couple.py.jinja",
            (Buffer("t", ir.dtype, (ir.in_blocks, "tokens", ir.rank)), coupling_buffer(ir)),
            self.between,
            {"ROWS": MIN_TILE, "COLUMNS": columns, "PADDED_BLOCKS": 1 << (ir.in_blocks - 1).bit_length()},
            {},
            (Tiles("tokens", MIN_TILE), -(-ir.rank // columns)),
            tiling,
        )

    def last(self) -> Kernel:
        """The product with the second factor, with the bias and the activation."""
        ir = self.ir
        width = "(IN_BLOCKS * RANK)" if ir.kind == MONARCH else "RANK"
        left = Operand(self.between, f"g * tokens * {width}", f"m * {width}", "i")
        inner = "(i // RANK) * second_in + (i % RANK) * second_rank" if ir.kind == MONARCH else "i * second_rank"
        right = Operand(second_buffer(ir), "g * second_out", "n * second_row", inner)
        into = Buffer("y", ir.dtype, ("tokens", ir.out_features))
        result = Result(into, "", ir.out_blocks, "tokens", out_width(ir), self.between.dims[-1])
        return self.product("last", "y_l = z[l] second[l]^T, g is l.", left, right, result, is_last=True)

    def of_between(self) -> Kernel:
        """The gradient of what is between the factors, (K, tokens, L * rank)."""
        ir = self.ir
        rows = "(n // RANK) * second_in + (n % RANK) * second_rank"
        right = Operand(second_buffer(ir), "g * second_out", rows, "i * second_row")
        place = "(column // RANK * tokens + row) * (OUT_BLOCKS * RANK) + g * RANK + column % RANK"
        columns = ir.in_blocks * ir.rank
        result = Result(self._dz, place, ir.out_blocks, "tokens", columns, out_width(ir))
        left = Operand(_grad(ir), _grad_base(ir), "m * grad_token", _grad_feature(ir, "i"))
        return self.product("of_between", "dz[b, m, l] = g_l second[l, :, b], g is l.", left, right, result)

    def of_x(self) -> Kernel:
        """The gradient of the input."""
        ir = self.ir
        left = Operand(self._dz, "g * tokens * (OUT_BLOCKS * RANK)", "m * (OUT_BLOCKS * RANK)", "i")
        inner = "(i // RANK) * first_out + (i % RANK) * first_rank"
        right = Operand(first_buffer(ir), "g * first_in", "n * first_width", inner)
        place = "row * (IN_BLOCKS * IN_WIDTH) + g * IN_WIDTH + column"
        into = Buffer("dx", ir.dtype, ("tokens", ir.in_features))
        result = Result(into, place, ir.in_blocks, "tokens", in_width(ir), ir.out_blocks * ir.rank)
        return self.product("of_x", "dx_b = sum over l of dz[b, :, l] first[b, l], g is b.", left, right, result)

    def of_first(self) -> Kernel:
        """The gradient of the first factor."""
        ir = self.ir
        left = Operand(self._dz, "g * tokens * (OUT_BLOCKS * RANK)", "m", "i * (OUT_BLOCKS * RANK)")
        right = Operand(x_buffer(ir), "g * IN_WIDTH * x_feature", "n * x_feature", "i * x_token")
        into = Buffer("dfirst", ir.dtype, (ir.in_blocks, ir.out_blocks, ir.rank, in_width(ir)))
        place = "(g * (OUT_BLOCKS * RANK) + row) * IN_WIDTH + column"
        result = Result(into, place, ir.in_blocks, ir.out_blocks * ir.rank, in_width(ir), "tokens")
        what = "dfirst[b, l] = sum over tokens of dz[b, m, l]^T x_b[m], g is b, i a token."
        return self.product("of_first", what, left, right, result)

    def of_second(self) -> Kernel:
        """The gradient of the second factor."""
        ir = self.ir
        left = Operand(_grad(ir), _grad_base(ir), _grad_feature(ir, "m"), "i * grad_token")
        right = Operand(self.between, "g * tokens * (IN_BLOCKS * RANK)", "n", "i * (IN_BLOCKS * RANK)")
        into = Buffer("dsecond", ir.dtype, (ir.out_blocks, out_width(ir), ir.in_blocks, ir.rank))
        place = "(g * OUT_WIDTH + row) * (IN_BLOCKS * RANK) + column"
        result = Result(into, place, ir.out_blocks, out_width(ir), ir.in_blocks * ir.rank, "tokens")
        what = "dsecond[l] = sum over tokens of g_l[m]^T z[l, m], g is l, i a token."
        return self.product("of_second", what, left, right, result)

    @property
    def _dz(self) -> Buffer:
        return Buffer("dz", self.ir.dtype, (self.ir.in_blocks, "tokens", self.ir.out_blocks * self.ir.rank))

    def product(
        self, part: str, meaning: str, left: Operand, right: Operand, result: Result, is_last: bool = False
    ) -> Kernel:
        """The kernel of one product; tiles of the last stage, and of sums over tokens, are the schedule's second."""
        ir, over_tokens = self.ir, result.inner == "tokens"
        tiling, columns = self.schedule.tiles(is_last or over_tokens)
        columns = min(columns, padded(result.columns))
        rows = tiling.rows if isinstance(result.rows, str) else min(tiling.rows, padded(result.rows))
        step = tiling.step if isinstance(result.inner, str) else min(tiling.step, padded(result.inner))
        biased = (Buffer("bias", ir.dtype, (ir.out_features,)),) if is_last and ir.bias else ()
        variables = {
            "meaning": meaning,
            "left": left.buffer.name,
            "left_base": left.base,
            "left_rows": left.rows,
            "left_inner": left.inner,
            "right": right.buffer.name,
            "right_base": right.base,
            "right_rows": right.rows,
            "right_inner": right.inner,
            "out": result.buffer.name,
            "out_place": result.place,
            "all_rows": result.rows,
            "all_inner": result.inner,
            "over_tokens": over_tokens,
            "reads_between": left.buffer.name in ("z", "dz"),
            "partial_rows": self._is_partial(result.rows, rows),
            "partial_columns": result.columns % columns != 0,
            "partial_inner": self._is_partial(result.inner, step),
            "is_last": is_last,
            "stored_to": "",
            "has_bias": is_last and ir.bias,
            "interleaved": ir.output_order == INTERLEAVED,
            "activation": ir.activation,
        }
        constants = {"ROWS": rows, "COLUMNS": columns, "STEP": step, "ALL_COLUMNS": result.columns}
        constants["GROUPS"] = result.groups
        grid = (Tiles(result.rows, rows), -(-result.columns // columns), result.groups)
        reads = (left.buffer, right.buffer, *biased)
        return self._kernel(part, "product.py.jinja", reads, result.buffer, constants, variables, grid, tiling)

    def _is_partial(self, size: Size, by: int) -> bool:
        return self.specialization if isinstance(size, str) else size % by != 0

    def _kernel(
        self,
        part: str,
        template: str,
        reads: tuple[Buffer, ...],
        writes: Buffer,
        constants: dict[str, int],
        variables: Mapping[str, Any],
        grid: tuple[Size | Tiles, ...],
        tiling: Tiling,
    ) -> Kernel:
        name = f"{self.ir.kind}_linear_{part}"
        header = header_of(name, self.of, self.schedule, self.specialization)
        return kernel_of(self.ir, name, template, reads, writes, constants, variables, grid, tiling, header)


def kernel_of(
    ir: BlockLinear,
    name: str,
    template: str,
    reads: tuple[Buffer, ...],
    writes: Buffer,
    constants: Mapping[str, int],
    variables: Mapping[str, Any],
    grid: tuple[Size | Tiles, ...],
    tiling: Tiling,
    header: str,
) -> Kernel:
    """A kernel of a block linear; constants: those beside the sizes of `ir`."""
    sizes = {
        "IN_BLOCKS": ir.in_blocks,
        "OUT_BLOCKS": ir.out_blocks,
        "IN_WIDTH": in_width(ir),
        "OUT_WIDTH": out_width(ir),
        "RANK": ir.rank,
    }
    return Kernel(
        family="linear",
        name=name,
        template=template,
        reads=reads,
        writes=(writes,),
        updates=(),
        sizes=("tokens",),
        constants=tuple({**sizes, **constants}.items()),
        variables=tuple(variables.items()),
        grid=grid,
        tiling=tiling,
        header=header,
    )


def staged(of: FormedLinear, schedule: Schedule, specialization: Specialization) -> Program:
    """A kernel for each product; BLAST has one for its coupling between them."""
    make = Maker(of.of, of, schedule, specialization)
    between = () if of.of.kind == MONARCH else (make.couple(),)
    return Program((make.first(), *between, make.last()), ("y",))


def gradients(of: LinearGradients, schedule: Schedule, specialization: Specialization) -> Program:
    """The kernels of those gradients that are wanted."""
    make = Maker(of.of, of, schedule, specialization)
    made: list[Kernel] = []
    if of.of_second:
        made += [make.first(), make.of_second()]
    if of.of_x or of.of_first:
        made.append(make.of_between())
    if of.of_x:
        made.append(make.of_x())
    if of.of_first:
        made.append(make.of_first())
    names = ("dx", "dfirst", "dsecond")
    wanted = (of.of_x, of.of_first, of.of_second)
    return Program(tuple(made), tuple(name for name, is_wanted in zip(names, wanted, strict=True) if is_wanted))


def _grad(ir: BlockLinear) -> Buffer:
    """The gradient of the result (tokens, out_features)."""
    return Buffer("grad", ir.dtype, ("tokens", ir.out_features), (("grad_token", 0), ("grad_feature", 1)))


def _grad_base(ir: BlockLinear) -> str:
    return "g * grad_feature" if ir.output_order == INTERLEAVED else "g * OUT_WIDTH * grad_feature"


def _grad_feature(ir: BlockLinear, index: str) -> str:
    return f"{index} * OUT_BLOCKS * grad_feature" if ir.output_order == INTERLEAVED else f"{index} * grad_feature"
