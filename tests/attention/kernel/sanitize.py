"""The families of kernels, small, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --kernel-name kernel_substring=monarch --error-exitcode 9 \\
        python tests/attention/kernel/sanitize.py

and again with `--tool racecheck`. Needs a CUDA device and PYTHONPATH at the root. Prints each case.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from monarch_compile.codegen import launcher as launching
from tests.attention.kernel.gradients import check_backward
from tests.attention.kernel.problems import Case, check

CASES = (
    Case(2048, 64, 64, 64, batch=1),  # whole blocks; stage 2 in one step
    Case(2000, 64, 64, 64, mask="some", batch=1, layout="packed"),
    Case(4096, 32, 64, 64, batch=1),  # 128 blocks: two offsets in turn
    Case(4090, 32, 64, 64, 2, pad="pre", batch=1),  # and one kernel between iterations
    Case(8192, 32, 64, 64, batch=1),  # 256 blocks: all queries of an offset in turn
    Case(1024, 256, 64, 64, batch=1),  # blocks of 256: all queries of a block in turn
    Case(1000, 250, 64, 64, batch=1, mask="some"),
    Case(9000, 16, 64, 64, 2, "mean", batch=1),  # 563 blocks: streams, two kernels between iterations
    Case(2048, 64, 64, 64, batch=1, window=1),  # exact groups in stage 1
    Case(2000, 39, 64, 64, 2, "mean", batch=1, window=1, prefix=4, mask="blocks", num_heads=2, group=2),  # and separate
    Case(4000, 128, 128, 128, batch=1),
    Case(2048, 64, 72, 72, batch=1, num_heads=2, layout="packed", window=1),  # rows 8 elements apart
    Case(2048, 64, 160, 160, batch=1, window=1),
    Case(1500, 25, 25, 80, 2, batch=1, mask="bias"),
    Case(4097, 64, 64, 64, 1, "mean", batch=1, queries=70),
    Case(4097, 40, 64, 64, 2, "mean", batch=1, queries=2500, mask="some"),
)

TRAINED = (  # gradients too
    Case(2048, 64, 64, 64, batch=1, window=1),  # a block, and all blocks, in one program
    Case(2000, 150, 64, 64, batch=1, window=1, prefix=3, mask="bias", pad="pre"),
    Case(9000, 16, 64, 64, batch=1, num_heads=2, group=2, mask="some"),  # 563 blocks
    Case.tiled((37, 37), (4, 8), 128, 128, batch=1, window=1, window_shape="plus", prefix=1),
    Case.tiled((37, 37), (8, 8), 64, 64, batch=1, window=1, prefix=13, prefix_at_end=True),
    Case.tiled((9, 30, 31), (4, 4, 4), 64, 64, batch=1, window=(0, 1, 1)),
)


def main() -> None:
    for case in CASES:
        for dtype in (torch.float16, torch.float32):
            launching.build.cache_clear()
            check(case, dtype, "cuda")
            print(dtype, case, flush=True)
    for case in TRAINED:
        for dtype in (torch.float16, torch.float32):
            check_backward(case, dtype, "cuda")
            print(dtype, case, "gradients", flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device")
    main()
