"""How the kernels of a long convolution are tiled: a frozen value, chosen from a small table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from monarch_compile.codegen.tiling import MIN_TILE, Capability, Tiling, padded, shared_limit
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.work import MOST_POINTS, points_of
from monarch_compile.errors import CodegenError
from monarch_compile.ir import DTYPE_NAMES

METHODS = ("toeplitz", "transform")
KEPT = ("nothing", "twiddles", "all")


@dataclass(frozen=True)
class Schedule:
    """The tiling of the kernel that convolves.

    method: "toeplitz", products with the filter's matrix: rows are output positions, step input positions.
        "transform", a Fourier transform in two factors: rows are the first factor, step is the second one times
        `sequences`, and a program meets `Tiling.turns` such tiles one after the other.
    sequences: how many sequences of the batch a tile holds side by side.
    kept: what a program keeps in registers from turn to turn: "nothing", "twiddles", or "all": the spectrum, too.
    """

    family: ClassVar[str] = "convolution"

    method: str
    main: Tiling
    sequences: int
    kept: str = "nothing"

    def tilings(self) -> Iterator[tuple[str, Tiling]]:
        """Each kernel's name and tiling."""
        yield "main", self.main

    def __str__(self) -> str:
        return f"{self.method} main={self.main} sequences={self.sequences} keeps {self.kept}"


TRANSFORMS: dict[int, Schedule] = {
    256: Schedule("transform", Tiling(16, 16, 1, 1, 4), 1),
    512: Schedule("transform", Tiling(32, 16, 1, 1, 4), 1),
    1024: Schedule("transform", Tiling(64, 16, 4, 1, 8), 1, "all"),
    2048: Schedule("transform", Tiling(64, 32, 4, 1, 8), 1, "all"),
    4096: Schedule("transform", Tiling(64, 64, 4, 1, 8), 1, "all"),
    8192: Schedule("transform", Tiling(128, 64, 8, 1, 8), 1, "all"),
    16384: Schedule("transform", Tiling(128, 128, 8, 1, 4), 1),
}
"""By points, for large batches."""
TOEPLITZ = Schedule("toeplitz", Tiling(128, 64, 4, 1), 64)
MOST_TOEPLITZ_POINTS, LEAST_TOEPLITZ_BATCH = 512, 16
"""Products with the filter's matrix are faster up to this length, from this batch on."""


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
    batch = ir.batch if isinstance(ir.batch, int) else LEAST_TOEPLITZ_BATCH
    if points(ir) <= MOST_TOEPLITZ_POINTS and batch >= LEAST_TOEPLITZ_BATCH:
        return replace(TOEPLITZ, sequences=min(TOEPLITZ.sequences, padded(batch)))
    chosen = TRANSFORMS[points(ir)]
    return replace(chosen, main=replace(chosen.main, turns=min(chosen.main.turns, power_of_two(batch))))


def check_schedule(schedule: Schedule, ir: LongConvolution) -> None:
    """Raise CodegenError where `schedule` is outside of what `ir` allows."""
    main, sequences = schedule.main, schedule.sequences
    if schedule.method not in METHODS or schedule.kept not in KEPT:
        raise CodegenError(f"the method must be one of {METHODS}, what is kept one of {KEPT}; found {schedule}")
    if sequences < 1 or sequences & (sequences - 1):
        raise CodegenError(f"sequences of a tile must be a power of two; found {schedule}")
    if schedule.method == "toeplitz":
        if sequences < MIN_TILE or main.turns != 1:
            raise CodegenError(f"a product has at least {MIN_TILE} sequences and one turn; found {schedule}")
        return
    if main.turns < 1 or main.rows * (main.step // sequences) != points(ir) or main.step // sequences < MIN_TILE:
        raise CodegenError(
            f"rows and columns must be factors of {points(ir)} points, of at least {MIN_TILE}: {schedule}"
        )


def is_made_for(schedule: Schedule, ir: LongConvolution) -> bool:
    """Whether a schedule, as a file may hold it, is for `ir`."""
    try:
        check_schedule(schedule, ir)
    except CodegenError:
        return False
    return True


def read_schedule(fields: Mapping[str, Any]) -> Schedule:
    """The inverse of `dataclasses.asdict`."""
    return Schedule(fields["method"], Tiling(**fields["main"]), int(fields["sequences"]), fields["kept"])


def shared_bytes(tiling: Tiling, ir: LongConvolution) -> int:
    """Shared memory of one program, an upper estimate: the matrices of the transform and two tiles."""
    return 4 * (tiling.rows**2 + tiling.step**2 + 2 * tiling.rows * tiling.step)


def fits(schedule: Schedule, ir: LongConvolution, capability: Capability | None) -> bool:
    """Whether a program has enough shared memory."""
    return shared_bytes(schedule.main, ir) <= shared_limit(capability)


def power_of_two(size: int) -> int:
    """The largest power of two of at most `size`."""
    return 1 << (size.bit_length() - 1)


def describe(ir: LongConvolution) -> str:
    """What a tuned schedule depends on."""
    names = "/".join(DTYPE_NAMES[dtype] for dtype in (ir.dtype, ir.filter_dtype, ir.out_dtype))
    terms = " ".join(name for name in ("pre_gate", "skip", "post_gate") if getattr(ir, name))
    wraps = " wraps" if ir.wraps else ""
    return f"convolution {names} {points(ir)} points{wraps} {terms} | batch {ir.batch}".replace("  ", " ")
