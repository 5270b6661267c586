"""Blocks chosen by their far-field mass, emulated on DINOv2, beside wider windows of as many exact keys.

Nothing here is fast: scores of all pairs are formed, and masked. The error is that of one attention's output, on the
inputs that the exact model gives it: no error is carried from layer to layer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.metrics import relative_error
from benchmarks.quality.photographs import SCENES, Photograph, read_photograph
from benchmarks.quality.task import package_file
from benchmarks.resumable import machine
from examples.images.dinov2 import PATCH, WEIGHTS, Features, normalized, read_dinov2
from monarch_compile.attention.blocking import Tiles
from monarch_compile.attention.groups import cut
from monarch_compile.attention.site_call import AttentionCall
from monarch_compile.calibration.instrument import with_attention

LAYERS = (3, 9)
GRIDS = (37, 64)


@dataclass(frozen=True)
class Chosen:
    """Tiles of tile x tile tokens; exact are the tiles of the window, and `chosen` more for each tile of queries."""

    tile: int
    window: int
    window_shape: str = "box"
    chosen: int = 0

    @property
    def exact_keys(self) -> int:
        """Keys that a query far from the border attends to exactly."""
        side = 2 * self.window + 1
        tiles = side**2 if self.window_shape == "box" else 2 * side - 1
        return (tiles + self.chosen) * self.tile**2


def _forms(tile: int) -> tuple[Chosen, ...]:
    windows = (Chosen(tile, 0), Chosen(tile, 1, "plus"), Chosen(tile, 1), Chosen(tile, 2))
    return (*windows, *(Chosen(tile, 0, chosen=n) for n in (4, 8, 24)), Chosen(tile, 1, "plus", 4))


FORMS = (*_forms(8), *_forms(4))


def attention(
    q: Tensor, k: Tensor, v: Tensor, form: Chosen, *, scale: float, prefix: int, grid: Sequence[int]
) -> Tensor:
    """One iteration from the identity start: (E, H, N, D), .., (E, H, N, D_v) -> (E, H, N, D_v).

    Each tile of queries takes the far tiles that its queries give the most weight in the form without chosen ones.
    """
    heads = [
        _head(*(x[e, h] for x in (q, k, v)), form, scale, prefix, grid)
        for e in range(q.shape[0])
        for h in range(q.shape[1])
    ]
    return torch.stack(heads).unflatten(0, q.shape[:2])


def _head(q: Tensor, k: Tensor, v: Tensor, form: Chosen, scale: float, prefix: int, grid: Sequence[int]) -> Tensor:
    """Letters as in `reference`: l, b blocks of queries and keys; j, i offsets."""
    blocks = Tiles(tuple(grid), (form.tile,) * len(grid), form.window, form.window_shape)
    (q_lead, q), (k_lead, k_rest), (v_lead, v_rest) = (cut(x, 0, prefix, False) for x in (q, k, v))
    rows = (scale * q_lead @ torch.cat([k_lead, k_rest]).T).softmax(-1) @ v
    queries, keys, values = (blocks.split(x[None, None])[0, 0] for x in (q, k_rest, v_rest))  # (b, i, D)
    is_token = blocks.is_token(q.device)
    local = (scale * queries @ keys.mT).masked_fill(~is_token[:, None], float("-inf"))  # (b, j, i)
    a, y = scale * local.softmax(-1) @ keys, local.softmax(-1) @ values
    c = (queries * a).sum(-1) - local.logsumexp(-1)  # (b, j)
    far = torch.einsum("ljd,bjd->ljb", queries, a) - c.T
    exact = (scale * torch.einsum("ljd,bid->ljbi", queries, keys)).masked_fill(~is_token, float("-inf"))
    lead = scale * queries @ k_lead.T  # (l, j, p)
    is_near = ~blocks.is_far(q.device).T  # (l, b)
    if form.chosen:
        weights = _softmax(lead, exact, far, is_near)[2] * is_token[..., None]
        mass = weights.sum(1)  # (l, b); 0 for tiles of the window
        best = mass.topk(min(form.chosen, mass.shape[1]), -1).indices
        is_near = is_near | torch.zeros_like(is_near).scatter(1, best, True)
    of_lead, of_exact, of_far = _softmax(lead, exact, far, is_near)
    z = of_lead @ v_lead + torch.einsum("ljbi,bid->ljd", of_exact, values) + torch.einsum("ljb,bjd->ljd", of_far, y)
    return torch.cat([rows, blocks.joined(z.reshape(1, -1, 1, z.shape[-1]))[0, :, 0]])


def _softmax(lead: Tensor, exact: Tensor, far: Tensor, is_near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of keys of the prefix, of those of near blocks, and of far blocks, that sum to 1 for each row."""
    exact = exact.masked_fill(~is_near[:, None, :, None], float("-inf"))
    far = far.masked_fill(is_near[:, None], float("-inf"))
    total = torch.cat([lead, exact.flatten(2), far], -1).logsumexp(-1)
    return (lead - total[..., None]).exp(), (exact - total[..., None, None]).exp(), (far - total[..., None]).exp()


class Watched:
    """DINOv2, and what each of its attentions was called with in the last run."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        model = Features(read_dinov2(package_file(*WEIGHTS))).eval()
        self._model = with_attention(model, self._noted, {"policy": "always"})

    def _noted(self, call: AttentionCall) -> Tensor:
        self.calls.append(call)
        return call.exact()

    @torch.no_grad()
    def run(self, photograph: Photograph, grid: int) -> None:
        """Run on a photograph of grid x grid patches."""
        self.calls.clear()
        self._model(normalized(read_photograph(photograph, grid * PATCH))[None])


@torch.no_grad()
def errors(watched: Watched, grid: int, photograph: Photograph) -> Iterator[dict[str, Any]]:
    """A row for each of `LAYERS` and of `FORMS`: the relative error of attention's output."""
    watched.run(photograph, grid)
    for layer in LAYERS:
        call, expected = watched.calls[layer], watched.calls[layer].exact()
        place = {"scale": call.options["scale"], "prefix": 1, "grid": (grid, grid)}
        for form in FORMS:
            error = relative_error(expected, attention(call.q, call.k, call.v, form, **place))
            named = {"tokens": grid**2 + 1, "photograph": Path(photograph.path).stem, "layer": layer, **asdict(form)}
            yield {**named, "exact_keys": form.exact_keys, "error": error}


def _one_row_a_line(rows: Sequence[dict[str, Any]]) -> str:
    lines = ",\n".join(map(json.dumps, rows))
    return f'{{"machine": {json.dumps(machine("cpu"))},\n"rows": [\n{lines}\n]}}\n'


def main() -> None:
    """Measures, prints and keeps all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=4)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for grid in GRIDS:
        watched = Watched()
        for photograph in SCENES[: args.photographs]:
            rows += errors(watched, grid, photograph)
            print(grid, photograph.path, flush=True)
            args.json.write_text(_one_row_a_line(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
