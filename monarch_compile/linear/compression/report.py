"""What `compress_` did: a value to print or save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from monarch_compile.cost.devices import installed
from monarch_compile.errors import InputError
from monarch_compile.ir import DTYPE_NAMES
from monarch_compile.linear.compression.layers import Kept
from monarch_compile.linear.ir import MONARCH, BlockLinear
from monarch_compile.linear.work import Times, times

TOKENS = (1, 256, 8192)
"""Token counts that the printed table predicts times for."""


@dataclass(frozen=True)
class CompressedLayer:
    """One layer.

    weight_error: relative Frobenius error of the weight, as it is stored. output_error: relative error of the output,
    root mean square over all tokens of the calls; None where no call reached the layer.
    parameters, dense_parameters: numbers in the factors and in the weight they replace, without the bias; bytes,
    dense_bytes: what they take.
    """

    name: str
    kind: str
    in_features: int
    out_features: int
    num_blocks: int
    rank: int
    dtype: torch.dtype
    device: str
    weight_error: float
    output_error: float | None
    parameters: int

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features

    @property
    def bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def dense_bytes(self) -> int:
        return self.dense_parameters * self.dtype.itemsize

    def ir(self, tokens: int) -> BlockLinear:
        """What the layer computes of so many tokens."""
        own = self.rank // self.num_blocks if self.kind == MONARCH else self.rank
        sizes = (self.in_features, self.out_features, self.num_blocks, self.num_blocks)
        return BlockLinear(self.kind, tokens, *sizes, own, self.dtype)

    def times(self, tokens: int, device: str | None = None) -> Times | None:
        """Predicted times of so many tokens, on the layer's device or another; None where that is not described."""
        try:
            return times(self.ir(tokens), installed(device or self.device))
        except InputError:
            return None


@dataclass(frozen=True)
class CompressionReport:
    """layers: those that were compressed, in the model's order. kept: linear layers that stay, with the reasons."""

    layers: tuple[CompressedLayer, ...]
    kept: tuple[Kept, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in all factors."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Numbers in the weights that they replace."""
        return sum(layer.dense_parameters for layer in self.layers)

    def speedup(self, tokens: int, device: str | None = None) -> float | None:
        """Predicted time of all dense layers over that of the factors; None where the device is not described."""
        found = [layer.times(tokens, device) for layer in self.layers]
        known = [one for one in found if one is not None]
        if not known or len(known) < len(found):
            return None
        return sum(one.dense_s for one in known) / sum(one.factors_s for one in known)

    def as_dict(self, tokens: Sequence[int] = TOKENS, device: str | None = None) -> dict[str, Any]:
        """Plain numbers and strings, with predicted seconds for each number of tokens."""
        return {
            "parameters": self.parameters,
            "dense_parameters": self.dense_parameters,
            "layers": [_as_dict(layer, tokens, device) for layer in self.layers],
            "kept": [asdict(kept) for kept in self.kept],
        }

    def to_json(self, tokens: Sequence[int] = TOKENS, device: str | None = None) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(tokens, device), indent=1) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write JSON to `path` and return the path."""
        return _saved(path, self.to_json())

    def table(self, tokens: Sequence[int] = TOKENS, device: str | None = None) -> str:
        """A row for each layer; predicted speed-ups against the dense product, for each number of tokens."""
        head = ("layer", "size", "kind", "blocks", "rank", "parameters", "weight error", "output error")
        rows = [(*head, *(f"{count} tokens" for count in tokens))]
        rows += [_cells(layer, tokens, device) for layer in self.layers]
        lines = _aligned(rows) if self.layers else []
        lines += [_stays(kept) for kept in self.kept]
        return "\n".join([*lines, self._summary(tokens, device)])

    def _summary(self, tokens: Sequence[int], device: str | None) -> str:
        if not self.layers:
            return "no layer compressed"
        count, share = len(self.layers), self.parameters / self.dense_parameters
        layers = "1 layer" if count == 1 else f"{count} layers"
        sizes = f"{self.dense_parameters} -> {self.parameters} parameters ({share:.1%})"
        found = [(number, self.speedup(number, device)) for number in tokens]
        gains = ", ".join(f"{gain:.2f}x at {number} tokens" for number, gain in found if gain is not None)
        return f"{layers} compressed, {sizes}" + (f"; predicted {gains}" if gains else "")

    def __str__(self) -> str:
        return self.table()


def _saved(path: str | Path, text: str) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


def _as_dict(layer: CompressedLayer, tokens: Sequence[int], device: str | None) -> dict[str, Any]:
    predicted = {str(count): layer.times(count, device) for count in tokens}
    return {
        **asdict(layer),
        "dtype": DTYPE_NAMES[layer.dtype],
        "dense_parameters": layer.dense_parameters,
        "bytes": layer.bytes,
        "dense_bytes": layer.dense_bytes,
        "predicted": {count: None if found is None else asdict(found) for count, found in predicted.items()},
    }


def _cells(layer: CompressedLayer, tokens: Sequence[int], device: str | None) -> tuple[str, ...]:
    gains = [layer.times(count, device) for count in tokens]
    return (
        layer.name,
        f"{layer.in_features}->{layer.out_features}",
        layer.kind,
        str(layer.num_blocks),
        str(layer.rank),
        f"{layer.parameters} ({layer.parameters / layer.dense_parameters:.0%})",
        f"{layer.weight_error:.4f}",
        "-" if layer.output_error is None else f"{layer.output_error:.4f}",
        *("-" if gain is None else f"{gain.speedup:.2f}x" for gain in gains),
    )


def _stays(kept: Kept) -> str:
    return f"{kept.name} stays: {kept.reason} [{kept.code}]"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


@dataclass(frozen=True)
class RefinedPart:
    """A part of a model that `refine_` has refined.

    layers: how many block linears it has. before, fitted, after: relative errors of its output on what the compressed
    model gave it in the calls, against that of the dense model: at first, after the closed forms, and at last.
    """

    name: str
    layers: int
    before: float
    fitted: float
    after: float
    seconds: float


@dataclass(frozen=True)
class ModelErrors:
    """Relative errors of the model's output, of all floating tensors in it, against the dense model's."""

    before: float
    after: float


@dataclass(frozen=True)
class RefineReport:
    """What `refine_` returns; `print` it, or `save` it.

    parts: in the order in which they run. calls, held_out: errors of the whole model; None where there are no such
    calls. steps: of Adam, for each part. seconds: all that it took. kept: block linears that stay, with the reasons.
    """

    parts: tuple[RefinedPart, ...]
    calls: ModelErrors
    held_out: ModelErrors | None
    num_calls: int
    num_held_out: int
    steps: int
    seconds: float
    kept: tuple[Kept, ...] = ()

    def save(self, path: str | Path) -> Path:
        """Write JSON to `path` and return the path."""
        return _saved(path, json.dumps(asdict(self), indent=1) + "\n")

    def __str__(self) -> str:
        head = ("part", "layers", "before", "closed form", f"{self.steps} steps", "seconds")
        rows = [(p.name, str(p.layers), *(f"{e:.4f}" for e in (p.before, p.fitted, p.after)), f"{p.seconds:.1f}")
                for p in self.parts]  # fmt: skip
        found = [(self.calls, f"{self.num_calls} calls"), (self.held_out, f"{self.num_held_out} held-out calls")]
        said = [f"{x.before:.4f} -> {x.after:.4f} on {where}" for x, where in found if x is not None]
        stays = [_stays(kept) for kept in self.kept]
        return "\n".join([*_aligned([head, *rows]), *stays, f"error of the model's output {', '.join(said)}"])
