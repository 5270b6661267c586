"""DistillMOS: does the predicted quality of speech (mean opinion score, 1 to 5) stay what the exact model says?

Evaluated on the LibriVox clips, clean and degraded by noise, clipping and low-pass filters; to be calibrated on a
telephone conversation. An odd one: head_dim is 25.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality import speech
from benchmarks.quality.metrics import pearson, root_mean_square
from benchmarks.quality.stubs import stubbed
from benchmarks.quality.task import Model, Task, package_file
from examples.whisper.audio import SAMPLE_RATE

SAMPLES = 122_880
BATCH = 11
CALIBRATION_SECONDS = (0, 16)
BLOCK_SIZE = 24
BUDGET = 0.1


def load() -> Task:
    """The task, in float32 on the CPU."""
    for name, path in (("distillmos", "distillmos/sqa.py"), ("xls-r-sqa", "xls_r_sqa/sqa_model.py")):
        package_file(name, path)
    with stubbed(["torchaudio"]), contextlib.redirect_stdout(io.StringIO()):  # it announces its weights
        package: Any = importlib.import_module("distillmos")
        model: Any = package.ConvTransformerSQAModel(segmenting_in_forward=False).eval().requires_grad_(False)
    sounds, _ = speech.clips()
    talk = speech.conversation()
    pieces = [talk[start * SAMPLE_RATE :][:SAMPLES] for start in CALIBRATION_SECONDS]
    judge = Judge(model, [one for sound in sounds for one in speech.degraded(sound)])
    return Task(
        name="distillmos",
        title="DistillMOS, speech quality, N = 384",
        sites=len(model.transformer_pool_attn.transformer.transformer_encoder.layers),
        model=model,
        calibration_inputs=tuple(((batch,), {}) for batch in batches([y for x in pieces for y in speech.degraded(x)])),
        metric=root_mean_square,
        metric_unit="RMS change of the score, MOS",
        budget=BUDGET,
        evaluate=judge.evaluate,
        primary="rmse",
        better="lower",
        block_size=BLOCK_SIZE,
    )


def batches(sounds: Sequence[np.ndarray]) -> list[Tensor]:
    """`sounds` padded with silence to `SAMPLES` samples, (BATCH, SAMPLES) each; silence fills the last batch."""
    rows = torch.zeros(-(-len(sounds) // BATCH) * BATCH, SAMPLES)
    for row, sound in zip(rows, sounds, strict=False):
        row[: len(sound)] = torch.from_numpy(sound)
    return list(rows.split(BATCH))


class Judge:
    """Judges scores by the exact model's."""

    def __init__(self, exact: nn.Module, sounds: Sequence[np.ndarray]) -> None:
        self.exact, self.count, self.batches = exact, len(sounds), batches(sounds)

    @functools.cached_property
    def reference(self) -> Tensor:
        """The exact model's scores, (sounds,)."""
        return self._scores(self.exact)

    def evaluate(self, model: Model) -> dict[str, float]:
        """RMSE in MOS against the exact scores, and their correlation."""
        found = self._scores(model)
        return {"rmse": root_mean_square(self.reference, found), "pearson": pearson(self.reference, found)}

    @torch.no_grad()
    def _scores(self, model: Model) -> Tensor:
        return torch.cat([model(batch) for batch in self.batches]).flatten()[: self.count]
