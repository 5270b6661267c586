"""Long convolutions compiled by backend="monarch": an encoder as of Monarch Mixer BERT, and a causal Hyena.

    python -m examples.monarch_mixer [--size 80m] [--lengths 1024 4096] [--json mixer.json]

Small models run compiled by Inductor and by monarch: the report of what was rewritten, and the largest difference. On
CUDA, throughput follows: that of an encoder of `--size` under both, and of a BERT of equal width and depth.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

if not __package__:  # started as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import mixer
from examples.mixer.models import SIZES, HyenaLM, MonarchMixerEncoder
from examples.progress import step
from monarch_compile.backend import monarch
from monarch_compile.report.explainer import explain
from monarch_compile.report.report import Report

SMALL_MODELS = (MonarchMixerEncoder, HyenaLM)
BATCH, LENGTH = 2, 512
OPTIONS: dict[str, Any] = {"policy": "always"}
"""Small models gain little from being lowered; the report is to show what is understood, not what pays."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example."""
    args = parse_arguments(argv)
    print(f"torch {torch.__version__} on {args.device}")
    with torch.no_grad():
        for architecture in SMALL_MODELS:
            torch.manual_seed(0)
            print(f"\n{architecture.__name__}, {BATCH} x {LENGTH} tokens, float32")
            compare(architecture(SIZES["tiny"]).eval().to(args.device), args.device)
    if args.measured:
        mixer.measure(args)
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `measured`: whether throughput is asked for."""
    parser = argparse.ArgumentParser(prog="python -m examples.monarch_mixer", description=__doc__.splitlines()[0])
    mixer.add_arguments(parser)
    parser.set_defaults(lengths=None)
    args = parser.parse_args(argv)
    args.measured = args.device == "cuda" or args.lengths is not None
    args.lengths = args.lengths or mixer.LENGTHS
    return args


def compare(model: nn.Module, device: str) -> None:
    """Print what the monarch backend rewrites in `model`, and how far its output is from that of plain Inductor."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SIZES["tiny"].vocab_size, (BATCH, LENGTH), generator=generator).to(device)
    report = explain(model, tokens, options=OPTIONS)
    print(f"{report}\n{verdict(report)}")
    outputs = []
    for name, backend, options in (("inductor", "inductor", None), ("monarch", monarch, OPTIONS)):
        torch._dynamo.reset()
        # Where the package is installed, backend="monarch" does as well.
        compiled = torch.compile(model, backend=backend, options=options, dynamic=False)
        with step(f"compiling: {name}"):
            outputs.append(compiled(tokens))
    exact, ours = outputs
    difference = (ours - exact).abs().max().item()
    print(f"largest difference: {difference:.2e}, where the largest output is {exact.abs().max().item():.2e}")


def verdict(report: Report) -> str:
    """How many long convolutions were rewritten, in a sentence."""
    sites = [site for site in report.sites if site.family == "convolution"]
    lowered = sum(site.lowered for site in sites)
    if not lowered:
        return "No long convolution was rewritten: both backends run the same FFTs."
    return f"{lowered} of {len(sites)} long convolutions were rewritten; they are exact up to rounding."


if __name__ == "__main__":
    raise SystemExit(main())
