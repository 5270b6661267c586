"""What a block size, a number of iterations and a start cost and lose: ``python -m examples.tradeoff``.

All encoder layers of Whisper base get Monarch attention, uncompiled. It transcribes the five clips and four noisy
windows of 27 s made of them; one layer's attention is compiled and timed alone. So the demo's options were chosen.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from examples.progress import median_seconds, step, table
from examples.whisper.audio import SAMPLE_RATE, log_mel, read_clips, read_wav
from examples.whisper.load import Whisper, load_whisper
from examples.whisper.transcribe import transcribe, word_error_rate
from monarch_compile.benchmark import environment
from monarch_compile.functional import monarch_attention

NUM_WINDOWS = 4
RUNS = 9
BLOCK_SIZES = (50, 125, 250, 375, 500, 750)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination of the command line; print a table."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    with step("loading Whisper base"):
        whisper = load_whisper()
    clips = read_clips()
    sounds = [read_wav(clip.path) for clip in clips]
    windows, window_words = noisy_windows(sounds, [clip.words for clip in clips])
    features = log_mel(whisper.features, [*sounds, *windows])
    with torch.no_grad():
        with step("exact"):
            exact = encode(whisper, features, None)
        rows = [["block_size", "num_iters", "init", "WER clips", "WER windows", "change of output", "ms a layer"]]
        for options in (None, *_combinations(args)):
            with step(str(options or "exact")):
                states = exact if options is None else encode(whisper, features, options)
                seconds = attention_seconds(options)
                texts = transcribe(whisper, states)
            change = ((states - exact).norm() / exact.norm()).item()
            names = [str((options or {}).get(key, "-")) for key in rows[0][:3]]
            wer = word_error_rate([clip.words for clip in clips], texts[: len(clips)])
            wer_windows = word_error_rate(window_words, texts[len(clips) :])
            rows.append([*names, f"{wer:.3f}", f"{wer_windows:.3f}", f"{change:.3f}", f"{seconds * 1e3:.1f}"])
    print(f"\n{table(rows)}")
    if args.json:
        named = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
        args.json.write_text(json.dumps({"machine": environment(), "rows": named}, indent=2) + "\n", encoding="utf-8")
    return 0


def noisy_windows(sounds: Sequence[np.ndarray], words: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """All clips in random order, with random gaps and gains and mild noise, `NUM_WINDOWS` times; and their words."""
    random = np.random.default_rng(0)
    windows, texts = [], []
    for _ in range(NUM_WINDOWS):
        order = random.permutation(len(sounds))
        pieces = []
        for index in order:
            pieces += [np.zeros(int(random.uniform(0.1, 0.8) * SAMPLE_RATE)), sounds[index] * random.uniform(0.7, 1.2)]
        sound = np.concatenate(pieces)
        windows.append((sound + random.normal(0, 0.003, len(sound))).astype(np.float32))
        texts.append(" ".join(words[index] for index in order))
    return windows, texts


def encode(whisper: Whisper, features: Tensor, options: Mapping[str, Any] | None) -> Tensor:
    """Encoder output (clips, 1500, d_model), exact or with every attention in the Monarch form of `options`."""
    encoder = whisper.model.model.encoder
    if options is None:
        return torch.cat([encoder(clip).last_hidden_state for clip in features.split(1)])

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float, **_: Any) -> Any:
        return monarch_attention(q, k, v, scale=scaling, **options).transpose(1, 2), None

    AttentionInterface.register("monarch_tradeoff", attention)
    before = encoder.config._attn_implementation
    encoder.config._attn_implementation = "monarch_tradeoff"
    try:
        return encode(whisper, features, None)
    finally:
        encoder.config._attn_implementation = before


def attention_seconds(options: Mapping[str, Any] | None) -> float:
    """Median seconds of one layer's attention, (1, 8, 1500, 64) float32, compiled by Inductor."""
    q, k, v = torch.randn((3, 1, 8, 1500, 64), generator=torch.Generator().manual_seed(0))
    function: Callable[..., Tensor] = F.scaled_dot_product_attention
    if options is not None:
        function = functools.partial(monarch_attention, **options)
    compiled = torch.compile(lambda q, k, v: function(q, k, v), dynamic=False)
    compiled(q, k, v)
    return median_seconds({"attention": lambda: compiled(q, k, v)}, RUNS)["attention"]


def _combinations(args: argparse.Namespace) -> list[dict[str, Any]]:
    product = itertools.product(args.init, args.num_iters, args.block_size)
    return [{"block_size": size, "num_iters": iters, "init": init} for init, iters, size in product]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.tradeoff", description=__doc__)
    parser.add_argument("--block-size", type=int, nargs="+", default=BLOCK_SIZES)
    parser.add_argument("--num-iters", type=int, nargs="+", default=(1,))
    parser.add_argument("--init", nargs="+", default=("identity",))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table and the machine as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
