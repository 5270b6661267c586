"""Quality of a causal language model against how many keys its rows see exactly: a table and a picture.

One run of Gemma 3 270M over one text for each form: codes at ten depths, asked for at its end (`language.Judge`), and
the perplexity of every `seq_len // TOKENS`-th token of what stands before the questions. What comes before the first
attention that sees all tokens is computed once; local attentions are computed in their windows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.quality.controls import listed_blocks
from benchmarks.quality.language import BLOCK_SIZE, Judge, Scorer
from benchmarks.quality.minilm import CALIBRATION_TOPICS, distinct
from benchmarks.quality.row_choice import PIECE, attend, share_of_exact_keys
from benchmarks.resumable import machine
from monarch_compile.attention.functional import monarch_attention

TOKENS = 1024
"""Of whose mean log-probability the perplexity is made."""
WITHIN, NEEDLES_WITHIN = 0.02, 0.05
"""How far from exact a form may be: perplexity, as a share of it; each code's log-probability, in nats."""

Attention = Callable[..., Tensor]
"""From q (1, H, N, D), k and v (1, H_kv, N, D) and `scale` to (1, H, N, D)."""


def exact(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Causal attention."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)


def local(q: Tensor, k: Tensor, v: Tensor, *, scale: float, size: int) -> Tensor:
    """Causal attention to the last `size` keys alone, the row's own among them."""
    parts = []
    for start in range(0, q.shape[2], size):
        first, end = max(start - size, 0), start + size
        row, key = torch.arange(q.shape[2])[start:end, None], torch.arange(q.shape[2])[first:end]
        mask = (key <= row) & (key > row - size)
        keys, values = k[:, :, first:end], v[:, :, first:end]
        part = scaled_dot_product_attention(
            q[:, :, start:end], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
        )
        parts.append(part)
    return torch.cat(parts, 2)


@dataclass(frozen=True)
class Form:
    """How the attentions that see all tokens are computed: those of `layers`, by their place among them; () for all.

    lists: blocks in a row's window, at the start, and chosen ones, beside its own; None: it is exact.
    """

    name: str
    attention: Attention = field(repr=False)
    lists: Mapping[str, int] | None = None
    layers: tuple[int, ...] = ()
    is_control: bool = False

    def share(self, seq_len: int) -> float:
        """Of the keys that exact attention sees, those that this form's rows see exactly, in `layers`."""
        return 1.0 if self.lists is None else share_of_exact_keys(seq_len, block_size=BLOCK_SIZE, **self.lists)


def by_blocks(chosen: int) -> Form:
    """The built form: one choice for a block of queries."""
    options = {"block_size": BLOCK_SIZE, "window": 1, "prefix": BLOCK_SIZE, "chosen": chosen, "causal": True}
    return Form(f"blocks_{chosen}", partial(monarch_attention, **options), {"window": 1, "sinks": 1, "chosen": chosen})


def by_rows(chosen: int, layers: tuple[int, ...] = (), piece: int = PIECE) -> Form:
    """Each row's own choice of as many keys, in pieces of `piece`, emulated."""
    lists = {"window": 1, "sinks": 1, "chosen": chosen}
    attention = partial(attend, block_size=BLOCK_SIZE, piece=piece, **lists)
    name = f"rows_{chosen}" + "".join(f"_layer{layer}" for layer in layers)
    return Form(name + f"_piece{piece}" * (piece != PIECE), attention, lists, layers)


def control(name: str, window: int, sinks: int, random: int = 0) -> Form:
    """Exact attention to listed blocks alone."""
    attention = partial(listed_blocks, block_size=BLOCK_SIZE, window=window, sinks=sinks, random=random)
    return Form(name, attention, {"window": window, "sinks": sinks, "chosen": random}, is_control=True)


def forms(counts: Sequence[int]) -> tuple[Form, ...]:
    """Exact attention, both ways to choose with each of `counts`, and the controls, with the most random blocks."""
    chosen = (form for count in counts for form in (by_rows(count), by_blocks(count)))
    controls = (control("window_sinks", 1, 1), control("own_block", 0, 0), control("random", 1, 1, max(counts)))
    return (Form("exact", exact), *chosen, *controls)


class Bench:
    """The model over one text of `seq_len` tokens, with the attentions of `forms`."""

    def __init__(self, model: nn.Module, tokenizer: Any, seq_len: int) -> None:
        names = distinct(topics)
        held_out = names[::CALIBRATION_TOPICS]
        text = tokenizer.encode("\n\n".join(topics[n] for n in names if n not in held_out))
        self.scorer = Scorer(model)
        judge = Judge(self.scorer, tokenizer, text, seq_len, torch.device("cpu"))
        self.ids, self.needles = judge.needles
        step = seq_len // TOKENS
        self.text = torch.arange(step, int(self.needles.min()) - 4 * BLOCK_SIZE, step)
        self.kinds = model.config.layer_types
        self.full = [place for place, kind in enumerate(self.kinds) if kind == "full_attention"]
        self.size = model.config.sliding_window
        self.form = Form("exact", exact)
        self.before: Tensor | None = None

    @contextmanager
    def attending(self) -> Iterator[None]:
        """The model's attentions as `self.form` says, through transformers' table of them."""
        from transformers import AttentionInterface, AttentionMaskInterface

        model = self.scorer.model
        kept = model.config._attn_implementation
        AttentionInterface.register("exact_keys", self._attention)
        AttentionMaskInterface.register("exact_keys", lambda *args, **kwargs: None)
        model.config._attn_implementation = "exact_keys"
        try:
            yield
        finally:
            model.config._attn_implementation = kept

    def _attention(self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
        place, scale = module.layer_idx, given["scaling"]
        if place not in self.full:
            found = local(q, k, v, scale=scale, size=self.size)
        else:
            layers = self.form.layers or range(len(self.full))
            chosen = self.form.attention if self.full.index(place) in layers else exact
            found = chosen(q, k, v, scale=scale)
        return found.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def run(self, form: Form) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the text's tokens, (P,), and of each code, (10,), the mean of its tokens'."""
        self.form = form
        layers, first = self.scorer.model.model.layers, self.full[0]
        kept = list(layers)
        if self.before is None:
            hook = kept[first].register_forward_pre_hook(self._keep, with_kwargs=True)
        else:
            for place in range(first):
                layers[place] = _Given(self.before)
        try:
            found = self.scorer(self.ids, torch.cat([self.text, self.needles.flatten()]))
        finally:
            if layers[0] is kept[0]:
                hook.remove()
            for place in range(first):
                layers[place] = kept[place]
        count = len(self.text)
        return found[:count], found[count:].view(self.needles.shape).mean(1)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.before = args[0] if args else kwargs["hidden_states"]


class _Given(nn.Module):
    """A layer whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.output


def row_of(form: Form, seq_len: int, found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Numbers of a form beside those of exact attention. "error": the standard error of "over", of the same tokens."""
    (text, codes), (text0, codes0) = found, reference
    lost = text0 - text
    over = math.exp(lost.mean().item()) - 1
    behind = codes0 - codes
    row = {"seq_len": seq_len, "form": form.name, "control": form.is_control, "share": form.share(seq_len)}
    row |= {"perplexity": math.exp(-text.mean().item()), "over": over}
    row |= {"error": (1 + over) * (lost.std() / len(lost) ** 0.5).item()}
    row |= {"needles": codes.tolist(), "behind": behind.max().item()}
    return row | {"meets": bool(over <= WITHIN and behind.max() <= NEEDLES_WITHIN)}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of all rows, by length and share of exact keys."""
    lines = ["| tokens | form | exact keys, share of those seen | perplexity | over exact, % | furthest code, nats |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: (row["seq_len"], row["control"], row["share"], row["form"])):
        over = f"{100 * row['over']:.2f} +- {100 * row['error']:.2f}"
        cells = (row["seq_len"], row["form"], f"{row['share']:.3f}", f"{row['perplexity']:.3f}", over)
        lines.append(f"| {' | '.join(map(str, cells))} | {row['behind']:.3f} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Above, perplexity over exact; below, the furthest code; against the share of exact keys.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "monarch-compile"
    import matplotlib.pyplot as plt

    lengths = sorted({row["seq_len"] for row in rows})
    figure, all_axes = plt.subplots(2, len(lengths), figsize=(4.6 * len(lengths), 6), squeeze=False)
    for seq_len, column in zip(lengths, all_axes.T, strict=True):
        for axes, (value, line, least) in zip(
            column, (("over", WITHIN, 1e-3), ("behind", NEEDLES_WITHIN, 1e-2)), strict=True
        ):
            for kind, style in (("rows", "C0o-"), ("blocks", "C1s-"), ("control", "C2x")):
                chosen = [row for row in rows if row["seq_len"] == seq_len and _kind(row) == kind]
                points = sorted((row["share"], max(row[value], least)) for row in chosen)
                axes.plot([share for share, _ in points], [number for _, number in points], style, label=kind)
            axes.axhline(line, color="grey", linestyle="--", linewidth=1)
            axes.axvline(0.25, color="grey", linestyle=":", linewidth=1)
            axes.set(yscale="log", xlabel="exact keys, share of those that exact attention sees")
            axes.set_ylabel("perplexity over exact" if value == "over" else "furthest code, nats")
        column[0].set_title(f"{seq_len} tokens", fontsize=10)
    all_axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _kind(row: Mapping[str, Any]) -> str:
    """Which line of the picture a row is on; "" for none."""
    if row["control"]:
        return "control"
    return "" if "layer" in row["form"] or "piece" in row["form"] else row["form"].split("_")[0]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the file lacks, prints the table, and writes it and the picture beside the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.exact_keys", description=__doc__)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 13, 16], help="numbers of chosen blocks")
    parser.add_argument("--layers-of", type=int, help="also rows_LAYERS_OF in one full layer, the others exact")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="results file (JSON)")
    parser.add_argument("--pieces", type=int, nargs="*", default=[], help="also rows that choose pieces of other sizes")
    args = parser.parse_args(argv)
    wanted = list(forms(args.counts))
    if args.layers_of:
        wanted += [by_rows(args.layers_of, (layer,)) for layer in range(3)]
    wanted += [by_rows(count, piece=piece) for piece in args.pieces for count in args.counts]
    rows = json.loads(args.output.read_text(encoding="utf-8"))["rows"] if args.output.is_file() else []
    from benchmarks.quality.gemma import load_gemma

    found = load_gemma()
    bench = Bench(found.model, found.tokenizer, args.seq_len)
    with bench.attending():
        reference = bench.run(wanted[0])
        for form in wanted:
            if any((row["seq_len"], row["form"]) == (args.seq_len, form.name) for row in rows):
                continue
            rows.append(row_of(form, args.seq_len, reference if form is wanted[0] else bench.run(form), reference))
            print(json.dumps(rows[-1]), flush=True)
            content = {"environment": machine("cpu"), "rows": rows}
            args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    table = markdown(rows)
    print(table)
    args.output.with_suffix(".md").write_text(table, encoding="utf-8")
    try:
        draw(rows, args.output.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
