"""Recordings: the five LibriVox clips to evaluate on, and a conversation from another package to calibrate on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.quality.task import SPEECH, package_file
from examples.whisper.audio import SAMPLE_RATE, read_clips, read_wav

NUM_WINDOWS = 8


def clips() -> tuple[list[np.ndarray], list[str]]:
    """The LibriVox clips, samples in [-1, 1) at 16 kHz, and the words said in each."""
    listed = read_clips()
    return [read_wav(clip.path) for clip in listed], [clip.words for clip in listed]


def noisy_windows(sounds: Sequence[np.ndarray], words: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """`NUM_WINDOWS` windows of all sounds in random order, with random gaps and gains and mild noise, and their words.

    Deterministic; 25 to 29 s each for the LibriVox clips.
    """
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


def conversation() -> np.ndarray:
    """30 s of a telephone conversation, two other speakers, 16 kHz: the sample that pyannote.audio ships."""
    return read_wav(package_file(SPEECH, "pyannote/audio/sample/sample.wav"))


def add_noise(sound: np.ndarray, snr_db: float) -> np.ndarray:
    """`sound` in white noise, `snr_db` decibels below the sound's mean power."""
    power = np.square(sound, dtype=np.float64).mean() / 10 ** (snr_db / 10)
    return (sound + np.random.default_rng(len(sound)).normal(0, np.sqrt(power), len(sound))).astype(np.float32)


def clip_peaks(sound: np.ndarray, share: float) -> np.ndarray:
    """`sound` clipped at `share` of its largest magnitude."""
    limit = share * np.abs(sound).max()
    return sound.clip(-limit, limit)


def low_pass(sound: np.ndarray, hertz: float) -> np.ndarray:
    """`sound` without its frequencies above `hertz`."""
    spectrum = np.fft.rfft(sound)
    spectrum[np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE) > hertz] = 0
    return np.fft.irfft(spectrum, len(sound)).astype(np.float32)


Degradation = tuple[Callable[[np.ndarray, float], np.ndarray], float]

DEGRADATIONS: tuple[Degradation, ...] = (
    *((add_noise, snr_db) for snr_db in (30.0, 20.0, 10.0, 0.0)),
    *((clip_peaks, share) for share in (0.5, 0.2, 0.05)),
    *((low_pass, hertz) for hertz in (4000.0, 2000.0, 1000.0)),
)
"""What is done to clean speech, and how much of it."""


def degraded(sound: np.ndarray) -> list[np.ndarray]:
    """`sound` itself, and after each of `DEGRADATIONS`."""
    return [sound, *(change(sound, amount) for change, amount in DEGRADATIONS)]
