"""How the kernels of a long convolution are tiled: a frozen value, chosen from a small table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from monarch_compile.codegen.tiling import MIN_TILE, Capability, Tiling
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.work import MOST_POINTS, ON_CHIP, factors, points_of
from monarch_compile.errors import CodegenError
from monarch_compile.ir import DTYPE_NAMES

KEPT = ("nothing", "twiddles", "all")
PRECISIONS = ("half", "single")


@dataclass(frozen=True)
class Schedule:
    """The tiling of the kernels that convolve: a Fourier transform in two factors, or, with an outer one, in three.

    main: rows are the first factor, step is the second one times `sequences`; a program meets `Tiling.turns` such
        tiles one after the other.
    sequences: how many sequences of the batch a tile holds side by side.
    kept: what a program keeps in registers from turn to turn: "nothing", "twiddles", or "all": the spectrum, too.
    precision: of what is multiplied. "half": float16 numbers, where the errors cannot be seen in a result of
        bfloat16, which is checked for each sequence, and as "single" elsewhere. "single": float32 numbers, as sums of
        two of float16; with an outer factor, as three of TF32.
    ahead: whether a sequence is read while the one before it is transformed.
    outer: of the outer factor: rows are the factor, step is how many numbers of each row a tile has; None where there
        are two factors, all on chip. With it, tiles are of one sequence, and nothing is kept.
    """

    family: ClassVar[str] = "convolution"

    main: Tiling
    sequences: int = 1
    kept: str = "nothing"
    precision: str = "half"
    ahead: bool = False
    outer: Tiling | None = None

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "main", self.main
        if self.outer is not None:
            yield "outer", self.outer

    def __str__(self) -> str:
        outer = "" if self.outer is None else f"outer={self.outer} "
        ahead = " ahead" * self.ahead
        return f"{outer}main={self.main} sequences={self.sequences} keeps {self.kept} {self.precision}{ahead}"


TRANSFORMS: dict[int, Schedule] = {
    256: Schedule(Tiling(16, 16, 1, 1, 8), kept="all", ahead=True),
    512: Schedule(Tiling(32, 16, 1, 1, 8), kept="all", ahead=True),
    1024: Schedule(Tiling(32, 32, 1, 1, 16), kept="all", ahead=True),
    2048: Schedule(Tiling(64, 32, 4, 1, 16), kept="twiddles", ahead=True),
    4096: Schedule(Tiling(64, 64, 4, 1, 16), kept="twiddles", ahead=True),
    8192: Schedule(Tiling(128, 64, 8, 1, 16), kept="twiddles"),
    1 << 14: Schedule(Tiling(32, 32, 1, 2, 8), outer=Tiling(16, 128, 2, 1, 4)),
    1 << 15: Schedule(Tiling(32, 32, 1, 2, 16), outer=Tiling(32, 64, 2, 1, 4)),
    1 << 16: Schedule(Tiling(32, 32, 1, 2, 8), outer=Tiling(64, 64, 4, 2, 4)),
    1 << 17: Schedule(Tiling(64, 64, 4, 2, 8), outer=Tiling(32, 64, 2, 1, 4)),
    1 << 18: Schedule(Tiling(64, 64, 4, 2, 8), outer=Tiling(64, 64, 4, 2, 4)),
    1 << 19: Schedule(Tiling(64, 64, 4, 2, 8), outer=Tiling(128, 64, 8, 2, 4)),
    1 << 20: Schedule(Tiling(128, 64, 8, 2, 4), outer=Tiling(128, 64, 8, 2, 4)),
}
"""By points, for large batches. A single warp, where the tile leaves it registers enough, waits for no other."""

PRECISE: dict[int, Schedule] = {
    256: Schedule(Tiling(16, 16, 1, 1, 4), kept="all", precision="single", ahead=True),
    512: Schedule(Tiling(32, 16, 1, 1, 8), kept="nothing", precision="single", ahead=True),
    1024: Schedule(Tiling(32, 32, 2, 1, 8), kept="nothing", precision="single", ahead=True),
    2048: Schedule(Tiling(64, 32, 4, 1, 16), kept="nothing", precision="single", ahead=True),
    4096: Schedule(Tiling(64, 64, 4, 1, 16), kept="nothing", precision="single"),
    8192: Schedule(Tiling(128, 64, 8, 1, 16), kept="nothing", precision="single"),
}
"""The same for products of float32 numbers."""

INNER_PRECISE, COLUMNS_PRECISE, TURNS_PRECISE = 1024, 32, 16
"""Points on chip, columns of an outer tile and turns where products of three factors are of float32 numbers."""
USUAL_BATCH = 16
"""What an unknown number of sequences is taken for."""


def points(ir: LongConvolution) -> int:
    """Points of the transform; of a bucketed IR, whose lengths are known."""
    return points_of(ir.seq_len, ir.out_len)


def check_supported(ir: LongConvolution) -> None:
    """Raise CodegenError where no kernel exists for `ir`."""
    if not isinstance(ir.seq_len, int) or not isinstance(ir.out_len, int):
        raise CodegenError(f"kernels need lengths that are known up to a power of two; found {ir}")
    if points(ir) > MOST_POINTS:
        raise CodegenError(f"kernels are for sequences of at most {MOST_POINTS} points; found {ir}")
    if any(dtype.itemsize > 4 for dtype in (ir.dtype, ir.filter_dtype, ir.out_dtype)):
        raise CodegenError(f"kernels are for 16 and 32 bits; found {ir}")


def choose_schedule(ir: LongConvolution, capability: Capability | None = None) -> Schedule:
    """The shipped schedule.

    Raises:
        CodegenError: no kernel exists.
    """
    check_supported(ir)
    batch = ir.batch if isinstance(ir.batch, int) else USUAL_BATCH
    if points(ir) > ON_CHIP:
        return TRANSFORMS[points(ir)] if ir.out_dtype is torch.bfloat16 else precise(points(ir))
    chosen = (TRANSFORMS if ir.out_dtype is torch.bfloat16 else PRECISE)[points(ir)]
    return replace(chosen, main=replace(chosen.main, turns=min(chosen.main.turns, power_of_two(batch))))


def precise(count: int) -> Schedule:
    """That of transforms of `count` points in three factors with products of float32 numbers: for results of more than
    16 bits, and for the second pass over sequences that are marked."""
    inner = min(INNER_PRECISE, count // MIN_TILE)
    outer = Tiling(count // inner, COLUMNS_PRECISE, 4, 1, TURNS_PRECISE)
    return Schedule(Tiling(*factors(inner), 4, 1, TURNS_PRECISE), precision="single", outer=outer)


def check_schedule(schedule: Schedule, ir: LongConvolution) -> None:
    """Raise CodegenError where `schedule` is outside of what `ir` allows."""
    main, sequences = schedule.main, schedule.sequences
    if schedule.kept not in KEPT or schedule.precision not in PRECISIONS:
        raise CodegenError(f"what is kept must be one of {KEPT}, the precision of {PRECISIONS}; found {schedule}")
    if sequences < 1 or sequences & (sequences - 1):
        raise CodegenError(f"sequences of a tile must be a power of two; found {schedule}")
    columns, outer = main.step // sequences, schedule.outer
    count = points(ir) // (1 if outer is None else outer.rows)
    if main.turns < 1 or main.rows * columns != count or columns < MIN_TILE:
        raise CodegenError(
            f"rows and columns must be factors of {points(ir)}, of at least {MIN_TILE}; found {schedule}"
        )
    if outer is None:
        if count > ON_CHIP:
            raise CodegenError(f"more than {ON_CHIP} points need an outer factor; found {schedule}")
        return
    if sequences > 1 or schedule.kept != "nothing":
        raise CodegenError(f"with an outer factor, tiles are of one sequence, and nothing is kept; found {schedule}")
    if any(tiling.turns != power_of_two(max(1, tiling.turns)) for tiling in (main, outer)):
        raise CodegenError(f"with an outer factor, turns must be powers of two; found {schedule}")
    if outer.step % columns or outer.step > count:
        raise CodegenError(f"an outer tile must have whole rows of the inner matrix, at most all; found {schedule}")


def is_made_for(schedule: Schedule, ir: LongConvolution) -> bool:
    """Whether a schedule, as a file may hold it, is for `ir`."""
    try:
        check_schedule(schedule, ir)
    except CodegenError:
        return False
    return True


def read_schedule(fields: Mapping[str, Any]) -> Schedule:
    """The inverse of `dataclasses.asdict`."""
    main, outer = Tiling(**fields["main"]), fields.get("outer")
    sequences, kept, precision = int(fields["sequences"]), fields["kept"], fields["precision"]
    ahead, through_memory = bool(fields["ahead"]), None if outer is None else Tiling(**outer)
    return Schedule(main, sequences, kept, precision, ahead, through_memory)


def shared_bytes(tiling: Tiling, ir: LongConvolution) -> int:
    """Shared memory of one program, an upper estimate: the matrices of the transform and two tiles."""
    return 4 * (tiling.rows**2 + tiling.step**2 + 2 * tiling.rows * tiling.step)


def power_of_two(size: int) -> int:
    """The largest power of two of at most `size`."""
    return 1 << (size.bit_length() - 1)


def describe(ir: LongConvolution) -> str:
    """What a tuned schedule depends on."""
    names = "/".join(DTYPE_NAMES[dtype] for dtype in (ir.dtype, ir.filter_dtype, ir.out_dtype))
    terms = " ".join(name for name in ("pre_gate", "skip", "post_gate") if getattr(ir, name))
    wraps = " wraps" if ir.wraps else ""
    return f"convolution {names} {points(ir)} points{wraps} {terms} | batch {ir.batch}".replace("  ", " ")
