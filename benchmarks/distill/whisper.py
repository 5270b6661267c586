"""Whisper base: its encoder learns from a telephone conversation, and is judged by LibriVox and its own decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.distill.problems import Data, Limits, Metrics, Output
from benchmarks.quality.metrics import relative_error

PACK = "whisper"
"""Of the files whisper.0, whisper.1, ... of a pack."""


def load_whisper(pack: Path | None, limits: Limits) -> Data:
    """The encoder; a pack holds the decoder with the most frequent tokens alone (`benchmarks.quality.pack_whisper`)."""
    if pack is None:
        heard = recorded(limits)
    else:
        from benchmarks.quality.pack_whisper import unpack

        heard = unpack(pack / PACK)
    unseen = _mixed(heard.long.features, heard.short.features)[: limits.unseen]
    tokens = _mixed(heard.long.tokens, heard.short.tokens)[: limits.unseen]
    learned = list(heard.calibration.features[: limits.number].split(1))
    return Data(Output(heard.whisper.model.model.encoder).eval(), learned, unseen, judge_of(heard, tokens))


def pack_whisper(folder: Path, limits: Limits) -> list[Path]:
    """Write what `load_whisper` needs, weights and features in float16, made of the installed packages."""
    from benchmarks.quality.pack_whisper import pack, write_parts

    return write_parts(folder / PACK, pack(recorded(limits)))


def judge_of(heard: Any, tokens: Sequence[Tensor]) -> Metrics:
    """Relative error of the states, and KL of the decoder's distributions over the exact model's transcript, in nats
    per token; the decoder is a copy that learns nothing, on the CPU."""
    from benchmarks.quality.whisper import Encoder, Judge

    judge = Judge(heard, Encoder(heard.whisper.model.model.encoder), "cpu", torch.float32)

    def metrics(place: int, reference: Tensor, output: Tensor) -> dict[str, float]:
        kl = judge.metric((reference, tokens[place]), (output, tokens[place]))
        return {"state_error": relative_error(reference, output), "kl": kl}

    return metrics


def recorded(limits: Limits) -> Any:
    """Whisper base with recordings to learn from, as its calibration, and others with the exact model's transcripts.

    To learn from: parts of one conversation, from 12 to 30 s, each begun anywhere in it and of another loudness.
    """
    from benchmarks.quality import speech
    from benchmarks.quality.recordings import PADDING, Recordings, Speech, transcripts
    from examples.whisper.audio import SAMPLE_RATE, log_mel
    from examples.whisper.load import load_whisper as load

    whisper, talk, random = load(None), speech.conversation(), np.random.default_rng(1)
    parts = []
    for _ in range(limits.number):
        start, length, gain = random.integers(len(talk)), random.uniform(12, 30), random.uniform(0.5, 1.2)
        parts.append(np.roll(talk, start)[: int(length * SAMPLE_RATE)] * gain)
    clips, words = speech.clips()
    windows, said = speech.noisy_windows(clips, words)
    half = -(-limits.unseen // 2)
    groups = [log_mel(whisper.features, sounds) for sounds in (windows[:half], clips[:half])]
    long, short = (
        Recordings(features, ids, tuple(texts[:half]))
        for features, ids, texts in zip(groups, transcripts(whisper, groups), (said, words), strict=True)
    )
    nothing_said = torch.full((limits.number, 1), PADDING)
    return Speech(whisper, None, long, short, Recordings(log_mel(whisper.features, parts), nothing_said, ()))


def _mixed(first: Tensor, second: Tensor) -> list[Tensor]:
    """Rows of both in turns, each with a leading dim of 1."""
    return [x for pair in zip(first.split(1), second.split(1), strict=False) for x in pair]
