"""Models and data of the distillation benchmark in one file each, for a machine without the packages:

    python -m benchmarks.distill.pack .quality/distill     # writes dinov2.safetensors, whisper.0, whisper.1, ...
    python -m benchmarks.distill --packs .quality/distill  # reads them

No file is larger than 55 MB. Weights and features of speech are in float16, photographs are JPEG files of quality 95.
Of Whisper's tokens, the most frequent ones are there (`benchmarks.quality.pack_whisper` says what that means).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.distill.problems import Limits
from benchmarks.distill.tasks import PROBLEMS


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill.pack", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=PROBLEMS, default=list(PROBLEMS), metavar="TASK")
    parser.add_argument("--calls", type=int, default=16, help="inputs to learn from")
    parser.add_argument("--unseen", type=int, default=6, help="inputs to be judged by")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        for path in PROBLEMS[task].pack(args.folder, Limits(args.calls, args.unseen)):
            print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
