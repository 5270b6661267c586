"""Pretrained models, inputs to fit their compressed copies to, and other inputs to judge these by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.photographs import SCENES, Photograph, backgrounds, read_photograph
from benchmarks.quality.task import package_file
from monarch_compile.calibration.inputs import Call

IMAGE_SIDE = 224
"""At which DINOv2 is mostly used: 16 x 16 patches."""
OF_A_CALL = 8


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A model in eval mode, whose output is one tensor, (inputs, ...).

    fit: calls to fit to; judged: calls of other inputs. num_fit, num_judged: how many inputs these hold. inputs: what
    they are, in words.
    """

    model: nn.Module = field(repr=False)
    fit: Sequence[Call] = field(repr=False)
    judged: Sequence[Call] = field(repr=False)
    num_fit: int
    num_judged: int
    inputs: str


def dinov2() -> Pretrained:
    """DINOv2 ViT-S/14: the middle and the quarters of photographs; wallpapers to fit to, scenes to judge by."""
    from examples.images.dinov2 import WEIGHTS, Features, read_dinov2

    model = Features(read_dinov2(package_file(*WEIGHTS))).eval()
    fit = torch.cat([crops(photograph)[:2] for photograph in backgrounds()])
    judged = torch.cat([crops(photograph) for photograph in SCENES])
    words = "crops of photographs, 224 x 224 pixels"
    return Pretrained(model, _calls(fit), _calls(judged), len(fit), len(judged), words)


def crops(photograph: Photograph) -> Tensor:
    """The middle square of a photograph, and that square's four quarters: (5, 3, side, side), normalised."""
    from examples.images.dinov2 import normalized

    whole = read_photograph(photograph, 2 * IMAGE_SIDE)
    halves = [whole[:, i : i + IMAGE_SIDE, j : j + IMAGE_SIDE] for i in (0, IMAGE_SIDE) for j in (0, IMAGE_SIDE)]
    small = nn.functional.interpolate(whole[None], size=IMAGE_SIDE, mode="area")[0]
    return torch.stack([normalized(image) for image in (small, *halves)])


def minilm() -> Pretrained:
    """MiniLM's states of tokens in documents; topics to fit to and topics to judge by are disjoint."""
    from transformers import PreTrainedTokenizerFast

    from benchmarks.quality.minilm import FOLDER, PACKAGE, Judge, read_bert, splits

    folder = package_file(PACKAGE, FOLDER)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    judge = Judge(_embedder(read_bert(folder)), tokenizer, ())
    evaluation, calibration = splits(topics)
    fit, judged = [*calibration, *evaluation[:120:5]], evaluation[-40:]  # documents are in the order of their topics
    fit_calls, judged_calls = ([(call, {}) for call in judge.calls(texts, 256)] for texts in (fit, judged))
    words = "documents of at most 256 tokens; error of their embeddings"
    return Pretrained(judge.exact, fit_calls, judged_calls, len(fit), len(judged), words)


def _embedder(bert: nn.Module) -> Any:
    from benchmarks.quality.minilm import Embedder

    return Embedder(bert)


class States(nn.Module):
    """An encoder of Whisper as a function of features alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, features: Tensor) -> Tensor:
        """features (1, mel bins, 3000) -> states (1, 1500, d_model)."""
        states: Tensor = self.encoder(features).last_hidden_state
        return states


def whisper() -> Pretrained:
    """The encoder of Whisper base: a telephone conversation to fit to, other speakers to judge by."""
    from benchmarks.quality import speech
    from benchmarks.quality.recordings import CALIBRATION_SECONDS
    from examples.whisper.audio import SAMPLE_RATE, log_mel
    from examples.whisper.load import load_whisper

    found = load_whisper()
    found.model.requires_grad_(False).eval()
    talk = speech.conversation()
    pieces = [talk[start * SAMPLE_RATE : end * SAMPLE_RATE] for start, end in CALIBRATION_SECONDS]
    windows, _ = speech.noisy_windows(*speech.clips())
    fit, judged = (log_mel(found.features, group) for group in (pieces, windows[:4]))
    model = States(found.model.model.encoder).eval()
    return Pretrained(model, _calls(fit, 1), _calls(judged, 1), len(fit), len(judged), "recordings of 30 s")


def _calls(inputs: Tensor, size: int = OF_A_CALL) -> list[Call]:
    return [((part,), {}) for part in inputs.split(size)]


MODELS: Mapping[str, Callable[[], Pretrained]] = {"dinov2": dinov2, "minilm": minilm, "whisper": whisper}
