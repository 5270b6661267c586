"""Sound in: 16 kHz mono WAV clips with their transcripts, and the log-mel features that Whisper reads."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

SAMPLE_RATE = 16_000
LIBRIVOX = Path(__file__).parents[1] / "data" / "librivox"


class AudioError(ValueError):
    """A sound file or a list of transcripts is not in the expected form."""


@dataclass(frozen=True)
class Clip:
    """A sound file and the words that are said in it."""

    path: Path
    words: str


def read_wav(path: Path) -> np.ndarray:
    """Samples of a 16-bit mono 16 kHz WAV file as float32 in [-1, 1), shape (samples,).

    Raises:
        AudioError: the file is no WAV file, or has another rate, width or number of channels.
    """
    try:
        with wave.open(str(path), "rb") as sound:
            found = (sound.getframerate(), sound.getnchannels(), sound.getsampwidth())
            data = sound.readframes(sound.getnframes())
    except (wave.Error, EOFError) as error:
        raise AudioError(f"{path} is not a PCM WAV file: {error}") from error
    if found != (SAMPLE_RATE, 1, 2):
        raise AudioError(
            f"{path} must be {SAMPLE_RATE} Hz, 1 channel, 2 bytes a sample; "
            f"found {found[0]} Hz, {found[1]} channels, {found[2]} bytes"
        )
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768


def read_clips(folder: Path = LIBRIVOX) -> tuple[Clip, ...]:
    """The clips that `folder`'s transcripts.tsv lists, one a line: file name, tab, words.

    Raises:
        AudioError: a line has another form, or names a file that is not there.
    """
    clips = []
    for number, line in enumerate((folder / "transcripts.tsv").read_text().splitlines(), 1):
        name, tab, words = line.partition("\t")
        if not (tab and words.strip() and (folder / name).is_file()):
            raise AudioError(
                f"line {number} of transcripts.tsv must be an existing file, a tab and words; found {line!r}"
            )
        clips.append(Clip(folder / name, words.strip()))
    return tuple(clips)


def log_mel(extractor: WhisperFeatureExtractor, sounds: Sequence[np.ndarray]) -> Tensor:
    """Log-mel features of `sounds`, each padded or cut to 30 s: (len(sounds), mel bins, 3000), float32."""
    features = extractor(list(sounds), sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"]
    return torch.from_numpy(np.asarray(features, dtype=np.float32))
