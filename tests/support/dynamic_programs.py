"""Random models whose lengths and batches change from call to call: compiled by Inductor, inference and training."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.attention.functional import monarch_attention
from tests.support.poison import between_margins

NUM_HEADS, HEAD_DIM = 4, 16
CALLS = 3
"""How often each size is computed: a read past a buffer may give the right number now and then."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _mask(visible: Tensor | None) -> Tensor | None:
    return None if visible is None else visible[:, None, None, :]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(visible), enable_gqa=q.shape[1] != k.shape[1])


def _by_hand(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ v


def _einsum(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    if visible is not None:
        scores = scores + (1 - visible[:, None, None, :].to(q.dtype)) * -1e9
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)


SPELLINGS: dict[str, Attend] = {"sdpa": _sdpa, "by_hand": _by_hand, "einsum": _einsum}


@dataclass(frozen=True)
class DynamicProgram:
    """A model of `num_layers` attentions, the form it is compiled with, and (batch, queries, keys) of its calls."""

    spelling: str
    num_layers: int
    num_kv_heads: int
    masked: bool
    trains: bool
    sizes: tuple[tuple[int, int, int], ...]
    form: tuple[tuple[str, Any], ...]

    @staticmethod
    def draw(seed: int) -> DynamicProgram:
        """The program of a seed."""
        rng = random.Random(seed)
        block = rng.choice([4, 8, 16, 64])
        lengths = [rng.randint(2, 4 * block) for _ in range(2)] + [rng.randint(2, block), block, block + 1, 3 * block]
        lengths = [n for n in lengths if n > 1]
        rng.shuffle(lengths)
        crossed = rng.random() < 0.2
        pairs = [(n, rng.choice(lengths) if crossed else n) for n in lengths[:5]]
        sizes = tuple((rng.choice([1, 2, 3, 8]), *pair) for pair in (*pairs, pairs[0]))
        form: dict[str, Any] = {"block_size": block, "num_iters": rng.choice([1, 1, 2])}
        if not crossed:
            form |= {"init": rng.choice(["identity", "identity", "mean"]), "pad": rng.choice(["post", "pre"])}
            form |= {"window": rng.choice([None, 0, 1, 2]), "prefix": rng.choice([0, 0, 1, 3])}
        return DynamicProgram(
            spelling=rng.choice(list(SPELLINGS)),
            num_layers=rng.choice([1, 2]),
            num_kv_heads=rng.choice([NUM_HEADS, NUM_HEADS, 2, 1]),
            masked=rng.random() < 0.4,
            trains=rng.random() < 0.4,
            sizes=sizes,
            form=tuple(form.items()),
        )

    def options(self) -> dict[str, Any]:
        """Of torch.compile."""
        return {"policy": "always", "strict": True, "cross_attention": True, **dict(self.form)}

    def model(self, attend: Attend) -> Callable[..., Tensor]:
        """The model with an attention, of x (batch, queries, dim), y (batch, keys, dim; None: x) and visible keys."""

        def layer(x: Tensor, y: Tensor, visible: Tensor | None) -> Tensor:
            q = x.unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2)
            kv = y.unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2)
            k, v = kv[:, : self.num_kv_heads] * 1.5, kv[:, -self.num_kv_heads :]
            return attend(q, k, v, visible).transpose(1, 2).flatten(-2)

        def run(x: Tensor, y: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
            for _ in range(self.num_layers):
                x = x + layer(x, x if y is None else y, visible)
            return x

        return run

    def calls(self, device: str) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Inputs, fresh random ones for each call."""
        crossed = any(queries != keys for _, queries, keys in self.sizes)
        for batch, queries, keys in self.sizes:
            for _ in range(CALLS):
                x, y = (
                    between_margins(torch.randn(batch, n, NUM_HEADS * HEAD_DIM, device=device)) for n in (queries, keys)
                )
                visible = torch.rand(batch, keys, device=device) > 0.3
                visible[:, 0] = True
                visible = between_margins(visible)
                for tensor, dim in itertools.product((x, y, visible), (0, 1)):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
                yield x, y if crossed else None, visible if self.masked else None

    def by_reference(self) -> Callable[..., Tensor]:
        """The model by the eager reference."""
        across = {"init": "mean", "window": None, "prefix": 0}

        def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
            form = dict(self.form) | (across if q.shape[2] != k.shape[2] else {})
            padding = None if visible is None else ~visible
            return monarch_attention(q, k, v, key_padding_mask=padding, **form)

        return self.model(attend)


def worst_error(program: DynamicProgram, device: str, compile_model: Callable[..., Any]) -> float:
    """Largest relative error of any output or gradient in any call; inf where one is not finite."""
    compiled = compile_model(program.model(SPELLINGS[program.spelling]), program.options())
    expected = program.by_reference()
    worst = 0.0
    with torch.set_grad_enabled(program.trains):
        for x, y, visible in program.calls(device):
            pairs = [_results(run, x, y, visible, trains=program.trains) for run in (compiled, expected)]
            for found, wanted in zip(*pairs, strict=True):
                error = float(((found - wanted).abs().max() / wanted.abs().max()).detach())
                worst = max(worst, error if error == error else float("inf"))
    return worst


def _results(
    run: Callable[..., Tensor], x: Tensor, y: Tensor | None, visible: Tensor | None, *, trains: bool
) -> list[Tensor]:
    if not trains:
        return [run(x, y, visible)]
    given = [t.requires_grad_() for t in (x, y) if t is not None]
    output = run(given[0], given[1] if y is not None else None, visible)
    grads = torch.autograd.grad(output, given, torch.ones_like(output).cumsum(1))
    return [output, *grads]
