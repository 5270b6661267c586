"""The problems of the benchmark, by name."""

from __future__ import annotations

from benchmarks.distill.problems import Problem, load_dinov2, pack_dinov2
from benchmarks.distill.whisper import load_whisper, pack_whisper

PROBLEMS: dict[str, Problem] = {
    "dinov2": Problem(
        "DINOv2 ViT-S/14, photographs",
        load_dinov2,
        pack_dinov2,
        {
            "tiles": {"tile": (8, 8), "window": 1, "window_shape": "plus"},
            "rows": {"grid": None, "prefix": 1, "window": 1},
        },
        primary="patch_error",
    ),
    "whisper": Problem(
        "Whisper base, encoder",
        load_whisper,
        pack_whisper,
        {"paper": {"block_size": 50, "window": None}},
        primary="kl",
    ),
}
