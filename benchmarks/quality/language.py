"""A causal language model: does it predict text and find what was said long before, when far blocks are not exact?

Text is the Python reference manual, as the interpreter ships it for help(). Perplexity is taken at every `STRIDE`-th
token. Ten sentences that give codes stand at ten depths of another text, whose end asks for each: numbers are mean
natural log-probabilities of the codes' tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pydoc_data.topics import topics
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.quality.minilm import CALIBRATION_TOPICS, distinct
from benchmarks.quality.task import Call, Model, Task

BLOCK_SIZE = 64
BUDGET = 0.02
STRIDE = 4
STRETCHES = 2
HEAD_ROWS = 512
"""Positions whose logits, one for each token of the vocabulary, are in memory at once."""
THINGS = ("garden", "harbour", "library", "museum", "station", "theatre", "tower", "bridge", "market", "castle")
CODES = ("48213", "90764", "15382", "67209", "34951", "82076", "59437", "21698", "73120", "06845")


class Encoder(Protocol):
    """From text to the ids of tokens, without the one that begins a sequence: `begin`."""

    begin: int

    def encode(self, text: str) -> list[int]: ...


class Scorer(nn.Module):
    """Log-probabilities, in nats, that a causal model gives to tokens of its own input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        """ids (1, N), places (P,) of tokens after the first -> (P,) in float32."""
        states = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        found = []
        for part in places.split(HEAD_ROWS):
            logits = self.model.lm_head(states[part - 1]).float()
            found.append(logits.log_softmax(-1).gather(-1, ids[0, part, None])[:, 0])
        return torch.cat(found)


def load(*, seq_len: int = 4096, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Task:
    """The task of Gemma 3 270M with `seq_len` tokens on `device` in `dtype`.

    Raises:
        TaskUnavailable: a package is missing.
    """
    from benchmarks.quality.gemma import load_gemma

    found = load_gemma()
    sites = sum(kind == "full_attention" for kind in found.model.config.layer_types)
    return task_of(found.model.to(device, dtype), found.tokenizer, seq_len, sites=sites, name=f"language_{seq_len}")


def task_of(model: nn.Module, tokenizer: Encoder, seq_len: int, *, sites: int, name: str) -> Task:
    """The task of a causal model of transformers, of which `sites` attentions see all earlier tokens."""
    device = next(model.parameters()).device
    names = distinct(topics)
    held_out = names[::CALIBRATION_TOPICS]
    text = tokenizer.encode("\n\n".join(topics[n] for n in names if n not in held_out))
    other = tokenizer.encode("\n\n".join(topics[n] for n in held_out))
    judge = Judge(Scorer(model), tokenizer, text, seq_len, device)
    calibration = judge.call(other[: seq_len - 1])
    return Task(
        name=name,
        title=f"Language model, N = {seq_len}",
        sites=sites,
        model=judge.exact,
        calibration_inputs=((calibration, {}),),
        metric=difference,
        metric_unit="mean absolute difference of the tokens' log-probabilities, nats",
        budget=BUDGET,
        evaluate=judge.evaluate,
        primary="perplexity",
        better="lower",
        block_size=BLOCK_SIZE,
        min_runs=1,
    )


def difference(reference: Tensor, output: Tensor) -> float:
    """Mean absolute difference of log-probabilities."""
    return (reference - output).abs().mean().item()


class Judge:
    """Runs stretches of a text, and one with codes, through a replacement of the exact model."""

    def __init__(
        self, exact: Scorer, tokenizer: Encoder, text: Sequence[int], seq_len: int, device: torch.device
    ) -> None:
        self.exact, self.tokenizer, self.text = exact, tokenizer, text
        self.seq_len, self.device = seq_len, device
        self.places = torch.arange(STRIDE, seq_len, STRIDE, device=device)

    def call(self, tokens: Sequence[int]) -> Call:
        """The positional arguments for a stretch of text: its tokens after the one that begins a sequence."""
        ids = torch.tensor([[self.tokenizer.begin, *tokens]], device=self.device)
        return ids, self.places[self.places < ids.shape[1]]

    @functools.cached_property
    def needles(self) -> tuple[Tensor, Tensor]:
        """The text with codes (1, N), and the places of each code's tokens in its answer, (codes, tokens)."""
        encode = self.tokenizer.encode
        said = [encode(f"\nThe code of the {thing} is {code}.\n") for thing, code in zip(THINGS, CODES, strict=True)]
        asked = [encode(f"\nQuestion: what is the code of the {t}? The code of the {t} is ") for t in THINGS]
        answers = [encode(code) for code in CODES]
        rest = self.seq_len - 1 - sum(map(len, (*said, *asked, *answers)))
        piece = rest // len(THINGS)
        ids, places = [self.tokenizer.begin], []
        for place, sentence in enumerate(said):
            ids += [*sentence, *self.text[place * piece : (place + 1) * piece]]
        ids += self.text[len(said) * piece : len(said) * piece + rest % len(THINGS)]
        for question, answer in zip(asked, answers, strict=True):
            ids += question
            places.append(range(len(ids), len(ids) + len(answer)))
            ids += answer
        return torch.tensor([ids], device=self.device), torch.tensor(list(map(list, places)), device=self.device)

    @torch.no_grad()
    def evaluate(self, model: Model) -> dict[str, float]:
        """Perplexity, and log-probabilities of the codes: mean, least, and of each depth from the start."""
        size, losses = self.seq_len - 1, []
        for stretch in range(STRETCHES):
            call = self.call(self.text[stretch * size : (stretch + 1) * size])
            losses.append(-model(*call).float().mean().item())
        ids, places = self.needles
        wanted = torch.cat([places.flatten(), self.places])[: len(self.places)]  # one shape for all calls
        found = model(ids, wanted)[: places.numel()].view(places.shape).float().mean(1).tolist()
        numbers = {"perplexity": math.exp(sum(losses) / len(losses)), "needles": sum(found) / len(found)}
        numbers |= {"least": min(found)}
        return numbers | {f"needle_{place}": value for place, value in enumerate(found)}
