"""How the kernels of a block linear are tiled: a frozen value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from monarch_compile.codegen.linear.defaults import chosen
from monarch_compile.codegen.tiling import DTYPE_BYTES, MIN_TILE, Capability, Tiling, padded
from monarch_compile.errors import CodegenError
from monarch_compile.ir import DTYPE_NAMES
from monarch_compile.linear.forms import why_not
from monarch_compile.linear.ir import FUSED, MONARCH, SPLIT, STAGED, BlockLinear, FormedLinear, LinearGradients

Specialization = bool
"""Whether the last tile of tokens may not be whole."""
IR = BlockLinear | FormedLinear | LinearGradients
COUPLED = 1 << 13
"""Numbers that a program of BLAST's coupling keeps in registers."""


@dataclass(frozen=True)
class Schedule:
    """Tilings of the kernels of one form.

    fused: main: rows are tokens, step is how many features of an input block are multiplied at a time; columns:
    features of an output block that a program gives.
    split: likewise; `main.turns` is how many input blocks a program adds up.
    staged: main and columns: of the first product; last and last_columns: of the last one.
    gradients: main and columns: of products over features; last and last_columns: of those that are sums over tokens.
    """

    family: ClassVar[str] = "linear"

    main: Tiling
    columns: int
    last: Tiling | None = None
    last_columns: int = 0

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "main", self.main
        if self.last is not None:
            yield "last", self.last

    def tiles(self, is_last: bool) -> tuple[Tiling, int]:
        """Tiling and columns of a product."""
        if is_last and self.last is not None:
            return self.last, self.last_columns
        return self.main, self.columns

    @property
    def whole(self) -> int:
        """Tokens fill all tiles where they are a multiple of this."""
        most = max(self.main.rows, self.main.step)
        return most if self.last is None else max(most, self.last.rows, self.last.step)

    def __str__(self) -> str:
        last = "" if self.last is None else f" last={self.last} columns={self.last_columns}"
        return f"main={self.main} columns={self.columns}{last}"


def in_width(ir: BlockLinear) -> int:
    """Features of an input block."""
    return ir.in_features // ir.in_blocks


def out_width(ir: BlockLinear) -> int:
    """Features of an output block."""
    return ir.out_features // ir.out_blocks


def coupling_columns(ir: BlockLinear) -> int:
    """Columns of a program of BLAST's coupling, of `MIN_TILE` tokens."""
    most = COUPLED // (MIN_TILE * (1 << (ir.in_blocks - 1).bit_length()))
    return max(MIN_TILE, min(64, most, padded(ir.rank)))


def linear_of(ir: IR) -> BlockLinear:
    """The block linear that an IR is about."""
    return ir if isinstance(ir, BlockLinear) else ir.of


def check_supported(ir: FormedLinear | LinearGradients) -> None:
    """Raise CodegenError where no kernel exists for `ir`."""
    of = ir.of
    form = ir.form if isinstance(ir, FormedLinear) else STAGED
    why = why_not(of, form)
    if isinstance(ir, LinearGradients) and of.kind != MONARCH:
        why = "gradients of Monarch linears alone have kernels"
    if why:
        raise CodegenError(f"{why}; found {ir}")


def choose_schedule(ir: FormedLinear | LinearGradients, capability: Capability | None = None) -> Schedule:
    """The shipped schedule.

    Raises:
        CodegenError: no kernel exists.
    """
    check_supported(ir)
    is_gradient = isinstance(ir, LinearGradients)
    return Schedule(*chosen(ir.of, "gradients" if is_gradient else ir.form))  # type: ignore[union-attr]


def check_schedule(schedule: Schedule, ir: FormedLinear | LinearGradients) -> None:
    """Raise CodegenError where `schedule` is outside of what `ir` allows."""
    of, form = ir.of, ir.form if isinstance(ir, FormedLinear) else STAGED
    for columns in (schedule.columns, *((schedule.last_columns,) if schedule.last else ())):
        if columns < MIN_TILE or columns & (columns - 1):
            raise CodegenError(f"columns must be a power of two of at least {MIN_TILE}; found {schedule}")
    if (form == STAGED) != (schedule.last is not None):
        raise CodegenError(f"form {form} has {'two tilings' if form == STAGED else 'one tiling'}; found {schedule}")
    if form == STAGED:
        return
    if schedule.columns > padded(out_width(of)):
        raise CodegenError(f"columns must be at most {padded(out_width(of))}; found {schedule}")
    if schedule.main.step > padded(in_width(of)):
        raise CodegenError(f"a step must be at most {padded(in_width(of))}; found {schedule}")
    turns = schedule.main.turns
    if form == FUSED and turns != 1:
        raise CodegenError(f"a program has one tile; found {schedule}")
    if form == SPLIT and not 1 <= turns <= of.in_blocks:
        raise CodegenError(f"turns must be 1 to {of.in_blocks}, the number of input blocks; found {schedule}")


def is_made_for(schedule: Schedule, ir: FormedLinear | LinearGradients) -> bool:
    """Whether a schedule, as a file may hold it, is for `ir`."""
    try:
        check_schedule(schedule, ir)
    except CodegenError:
        return False
    return True


def read_schedule(fields: Mapping[str, Any]) -> Schedule:
    """The inverse of `dataclasses.asdict`."""
    last = None if fields["last"] is None else Tiling(**fields["last"])
    return Schedule(Tiling(**fields["main"]), int(fields["columns"]), last, int(fields["last_columns"]))


def shared_bytes(name: str, tiling: Tiling, ir: IR) -> int:
    """Shared memory of one program, at least: the tiles of the left operand and of the least columns of the right one,
    for each stage."""
    of = linear_of(ir)
    size = DTYPE_BYTES.get(of.dtype, torch.float32.itemsize)
    columns = padded(of.rank) if getattr(ir, "form", STAGED) in (FUSED, SPLIT) else MIN_TILE
    return size * tiling.num_stages * tiling.step * (tiling.rows + columns)


def describe(ir: IR) -> str:
    """What a tuned schedule depends on."""
    of = linear_of(ir)
    form = {FormedLinear: getattr(ir, "form", ""), LinearGradients: "gradients"}.get(type(ir), "")
    shape = f"{of.in_features}->{of.out_features} blocks {of.in_blocks}x{of.out_blocks} rank {of.rank}"
    return f"linear {of.kind} {form} {DTYPE_NAMES[of.dtype]} {shape} | tokens {of.tokens}"
