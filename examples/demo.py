"""The demo, from a checkout: ``make demo`` or ``python -m examples.demo``.

Whisper base transcribes five clips with its encoder compiled by Inductor and by backend="monarch"; DINOv2 looks at a
photograph, and its features become a picture; then attention alone is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if not __package__:  # started as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.packages import PackagesMissing
from examples.progress import median_seconds, step, table
from examples.setting import EXACT, Setting
from examples.whisper.audio import log_mel, read_clips, read_wav
from examples.whisper.load import Whisper, load_whisper
from examples.whisper.transcribe import transcribe, word_error_rate
from monarch_compile.report.explainer import explain

PARTS = ("whisper", "images", "attention")
PICTURE = Path("build/dinov2_features.png")
REPEATS = 5
NUM_HEADS, HEAD_DIM = 12, 64
ATTENTION_RUNS = {4096: 5, 16384: 1}
"""Sequence length of attention alone -> timed runs."""


MONARCH = Setting(
    "monarch",
    {"policy": "always", "block_size": 50},
    "blocks near sqrt(1500), and an exact window of a block on each side",
)
PAPER = Setting(
    "monarch, no window",
    {"policy": "always", "block_size": 50, "window": None},
    "the paper's form: the least work, lost words",
)
SETTINGS = (EXACT, MONARCH, PAPER)
ATTENTION = Setting("monarch", {"policy": "auto"})


@dataclass(frozen=True)
class Outcome:
    """What one setting gave on the clips. `states`: encoder output (clips, 1500, d_model)."""

    setting: Setting
    encoder: Callable[[Tensor], Tensor]
    states: Tensor
    texts: list[str]
    wer: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0, or 2 where packages of a part are missing: the others run."""
    args = parse_arguments(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} CPU threads\n")
    parts: dict[str, Callable[[], None]] = {
        "whisper": lambda: whisper_part(args.whisper, args.attention, device, args.report),
        "images": lambda: _images(device, args.picture),
        "attention": lambda: attention_part(device),
    }
    missing = False
    with torch.no_grad():
        for name, run in parts.items():
            if args.part not in ("all", name):
                continue
            try:
                run()
            except PackagesMissing as error:
                print(f"{name}: {error}\n")
                missing = True
    return 2 if missing else 0


def _images(device: torch.device, picture: Path) -> None:
    from examples.images.demo import images_part  # transformers' vision models take seconds to import

    images_part(device, picture)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="Monarch attention on Whisper, on DINOv2 and alone."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is one")
    parser.add_argument("--whisper", metavar="CHECKPOINT", help="hub id or folder of another Whisper")
    parser.add_argument(
        "--attention", choices=("sdpa", "eager"), default="sdpa", help="spelling of attention in the model"
    )
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--picture", metavar="FILE.png", type=Path, default=PICTURE, help="default: %(default)s")
    parser.add_argument("--report", metavar="FILE.html", help="also save the report as a page")
    return parser.parse_args(argv)


def whisper_part(source: str | None, attention: str, device: torch.device, report_path: str | None) -> None:
    """Transcribe the clips under every setting; print texts, word error rates, timings and the report."""
    with step(f"loading {source or 'Whisper base'}"):
        whisper = load_whisper(source, attn_implementation=attention)
        whisper.model.to(device=device, dtype=torch.float16 if device.type == "cuda" else torch.float32)
    clips = read_clips()
    features = log_mel(whisper.features, [read_wav(clip.path) for clip in clips]).to(device, whisper.model.dtype)
    references = [clip.words for clip in clips]
    outcomes = [outcome_of(setting, whisper, features, references) for setting in SETTINGS]
    print_texts(references, outcomes)
    with step(f"timing the encoders, {REPEATS} runs each"):
        seconds = median_seconds({o.setting.name: _call(o.encoder, features[:1]) for o in outcomes}, REPEATS)
    print_tradeoff(outcomes, seconds)
    print_report(whisper.model.model.encoder, features[:1], report_path)


def outcome_of(setting: Setting, whisper: Whisper, features: Tensor, references: Sequence[str]) -> Outcome:
    """Compile the encoder as `setting` says and transcribe `features` with it."""
    compiled = setting.compile(whisper.model.model.encoder)

    def encoder(clip: Tensor) -> Tensor:
        states: Tensor = compiled(clip).last_hidden_state
        return states

    with step(f"compiling the encoder: {setting.name}"):
        encoder(features[:1])
    with step("transcribing"):
        states = torch.cat([encoder(clip) for clip in features.split(1)])
        texts = transcribe(whisper, states)
    return Outcome(setting, encoder, states, texts, word_error_rate(references, texts))


def print_texts(references: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Every clip's words, as read and as transcribed under each setting."""
    width = max(len(o.setting.name) for o in outcomes)
    print()
    for index, words in enumerate(references):
        print(f"{'read':{width}}  {words}")
        for outcome in outcomes:
            print(f"{outcome.setting.name:{width}}  {outcome.texts[index]}")
        print()


def print_tradeoff(outcomes: Sequence[Outcome], seconds: Mapping[str, float]) -> None:
    """Words, accuracy and time of each setting; the first outcome is the one to compare with."""
    exact = outcomes[0]
    rows = [["encoder", "options", "word error rate", "change of its output", "ms a clip", "speed-up"]]
    for outcome in outcomes:
        name = outcome.setting.name
        change = ((outcome.states - exact.states).float().norm() / exact.states.float().norm()).item()
        speedup = seconds[exact.setting.name] / seconds[name]
        cells = [f"{outcome.wer:.3f}", f"{change:.3f}", f"{seconds[name] * 1e3:.1f}", f"{speedup:.2f}x"]
        rows.append([name, outcome.setting.spelled, *cells])
    print(f"\n{table(rows)}\n")
    for outcome in outcomes:
        print(f"{outcome.setting.name}: {outcome.setting.why}")
    print(
        "Whisper reads 1500 positions, where attention is a small part of the encoder's work: replacing all of it\n"
        "changes the encoder's time little. The gain is in long sequences, below.\n"
    )


def print_report(encoder: nn.Module, features: Tensor, path: str | None) -> None:
    """What the compiler did at each attention site of the encoder."""
    with step("explaining the compilation"):
        report = explain(encoder, features, options=dict(MONARCH.options or {}))
    print(f"{report}\n")
    if path:
        report.save(path)
        print(f"saved {path}\n")


def attention_part(device: torch.device) -> None:
    """Attention alone on random tensors: compiled by Inductor and by backend="monarch", timed."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    print(f"\nattention alone, batch 1, {NUM_HEADS} heads x {HEAD_DIM}, {dtype}; random tensors: only time is compared")
    rows = [["tokens", "inductor ms", "monarch ms", "speed-up"]]
    for seq_len, repeats in ATTENTION_RUNS.items():
        with step(f"N = {seq_len}, timed runs: {repeats}"):
            exact, monarch = time_attention(seq_len, repeats, device, dtype)
        rows.append([str(seq_len), f"{exact * 1e3:.2f}", f"{monarch * 1e3:.2f}", f"{exact / monarch:.1f}x"])
    print(f"\n{table(rows)}")


def time_attention(seq_len: int, repeats: int, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Median seconds of exact and of Monarch attention at `seq_len`, after a first, compiling call of each."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (3, 1, NUM_HEADS, seq_len, HEAD_DIM)
    q, k, v = torch.randn(shape, generator=generator, device=device, dtype=dtype)
    calls = {}
    for setting in (EXACT, ATTENTION):
        calls[setting.name] = _call(setting.compile(_attention), q, k, v)
        calls[setting.name]()
    seconds = median_seconds(calls, repeats)
    return seconds[EXACT.name], seconds[ATTENTION.name]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _call(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: function(*args)


if __name__ == "__main__":
    raise SystemExit(main())
