"""What the Whisper task listens to, ready for the model: features, the exact model's transcripts, the words said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import speech
from examples.whisper.audio import SAMPLE_RATE, log_mel
from examples.whisper.load import MULTILINGUAL_VOCAB_SIZE, Whisper, load_whisper
from examples.whisper.transcribe import transcribe

PROMPT = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
END = "<|endoftext|>"
PADDING = -1
CALIBRATION_SECONDS = ((0, 30), (0, 10), (18, 30))


@dataclass(frozen=True, eq=False)
class Recordings:
    """features: (n, mel bins, 3000), float32. words: what is said, empty where it is not known.

    tokens: (n, L) int64, PROMPT, the exact model's transcript, END, then PADDING.
    """

    features: Tensor
    tokens: Tensor
    words: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Speech:
    """A Whisper and what it listens to.

    kept: the token ids that the weights know, None for all.
    long, short: recordings to evaluate on. calibration: others, of other speakers.
    """

    whisper: Whisper
    kept: Tensor | None
    long: Recordings
    short: Recordings
    calibration: Recordings


def prompt_ids(whisper: Whisper) -> list[int]:
    """Ids of the tokens that ask for an English transcript without times."""
    english_only = whisper.model.config.vocab_size < MULTILINGUAL_VOCAB_SIZE
    names = (PROMPT[0], PROMPT[-1]) if english_only else PROMPT
    return [_id(whisper, name) for name in names]


def end_id(whisper: Whisper) -> int:
    """Id of the token that ends a transcript."""
    return _id(whisper, END)


def _id(whisper: Whisper, name: str) -> int:
    token = whisper.tokenizer.convert_tokens_to_ids(name)
    if not isinstance(token, int):
        raise ValueError(f"the tokenizer has no token {name}")
    return token


def record(source: str | None = None) -> Speech:
    """Whisper base from its packages, or the checkpoint `source`, and all recordings with its own transcripts."""
    whisper = load_whisper(source)
    sounds, words = speech.clips()
    windows, window_words = speech.noisy_windows(sounds, words)
    talk = speech.conversation()
    pieces = [talk[start * SAMPLE_RATE : end * SAMPLE_RATE] for start, end in CALIBRATION_SECONDS]
    groups = (windows, sounds, pieces)
    tokens = transcripts(whisper, [log_mel(whisper.features, group) for group in groups])
    made = [
        Recordings(log_mel(whisper.features, group), ids, tuple(said))
        for group, ids, said in zip(groups, tokens, (window_words, words, ()), strict=True)
    ]
    return Speech(whisper, None, *made)


@torch.no_grad()
def transcripts(whisper: Whisper, groups: Sequence[Tensor]) -> list[Tensor]:
    """For each group of features, prompt and the exact model's transcript of its recordings, padded to one length."""
    prompt, end = prompt_ids(whisper), end_id(whisper)
    lists = []
    for features in groups:
        states = torch.cat([whisper.model.model.encoder(one).last_hidden_state for one in features.split(1)])
        texts = transcribe(whisper, states)
        ids = whisper.tokenizer([f" {text}" for text in texts], add_special_tokens=False).input_ids
        lists.append([torch.tensor([*prompt, *line, end]) for line in ids])
    length = max(len(line) for lines in lists for line in lines)
    return [torch.stack([_padded(line, length) for line in lines]) for lines in lists]


def _padded(line: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(line, (0, length - len(line)), value=PADDING)


def is_packed(source: str | None) -> bool:
    """Whether `source` names what `python -m benchmarks.quality.pack_whisper` wrote, and not a checkpoint."""
    return source is not None and bool(parts_of(Path(source)))


def parts_of(path: Path) -> list[Path]:
    """The files `path`.0, `path`.1, ... in order."""
    parts = sorted(path.parent.glob(f"{path.name}.[0-9]"))
    return parts if np.array_equal([int(part.suffix[1:]) for part in parts], np.arange(len(parts))) else []
