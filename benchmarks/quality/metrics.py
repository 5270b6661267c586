"""The numbers by which outputs are compared; pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || other) in nats of each row; both (rows, classes), unnormalised log-probabilities. Shape (rows,).

    A class that the reference excludes (-inf) counts nothing.
    """
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)


def relative_error(reference: Tensor, other: Tensor) -> float:
    """Frobenius norm of the difference over that of `reference`."""
    return float((other.double() - reference.double()).norm() / reference.double().norm())


def cosine_distance(reference: Tensor, other: Tensor) -> float:
    """Mean over rows of 1 - cosine; both (rows, dim). Exactly 0 where they are equal."""
    apart = torch.nn.functional.normalize(reference.double(), dim=-1) - torch.nn.functional.normalize(
        other.double(), dim=-1
    )
    return apart.square().sum(-1).mean().item() / 2


def mean_reciprocal_rank(queries: Tensor, documents: Tensor) -> float:
    """Mean over queries of 1 / rank of their own document, by dot product.

    queries, documents: (n, dim); document i answers query i. A tie counts against the answer.
    """
    scores = queries.double() @ documents.double().T
    own = scores.diagonal()[:, None]
    return (1 / (scores >= own).sum(-1)).mean().item()


def root_mean_square(reference: Tensor, other: Tensor) -> float:
    """Root of the mean squared difference."""
    return (reference.double() - other.double()).square().mean().sqrt().item()


def pearson(reference: Tensor, other: Tensor) -> float:
    """Correlation of two vectors; 0 where one of them is constant."""
    x, y = (values.double().flatten() - values.double().mean() for values in (reference, other))
    norms = (x.norm() * y.norm()).item()
    return (x @ y).item() / norms if norms > 1e-9 * x.numel() else 0.0


def word_errors(reference: Sequence[str], words: Sequence[str]) -> int:
    """The fewest words to insert, delete or replace that turn `words` into `reference` (Levenshtein's distance)."""
    above = list(range(len(words) + 1))
    for row, expected in enumerate(reference, 1):
        current = [row]
        for column, word in enumerate(words, 1):
            current.append(min(above[column] + 1, current[-1] + 1, above[column - 1] + (word != expected)))
        above = current
    return above[-1]


def word_error_rate(references: Sequence[Sequence[str]], texts: Sequence[Sequence[str]]) -> float:
    """Word errors over words of the references, all texts together; each text is a sequence of words."""
    errors = sum(word_errors(reference, text) for reference, text in zip(references, texts, strict=True))
    return errors / sum(map(len, references))
