"""A short model is left alone: a BERT-base layer stack at N = 128 under policy "auto" against stock Inductor.

python benchmarks/short_model.py [--layers 4] [--json benchmarks/results/short_model.json]
"""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from transformers import BertConfig, BertModel

from monarch_compile.report.explainer import explain
from monarch_compile.tools.timing import environment, one_thread, time_interleaved

SEQ_LEN = 128
LIMIT = 1.03


def main() -> int:
    """Print both times and their ratio; 1 when the ratio is outside 3%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model: nn.Module = BertModel(BertConfig(num_hidden_layers=args.layers), add_pooling_layer=False).eval()
    tokens = torch.randint(0, 30000, (1, SEQ_LEN))
    with one_thread(), torch.no_grad():
        print(explain(model, tokens))
        compiled = {name: torch.compile(model, backend=name, dynamic=False) for name in ("inductor", "monarch")}
        for name, call in compiled.items():
            print(f"compiling with {name} ...", flush=True)
            call(tokens)
        timings = time_interleaved({n: lambda c=c: c(tokens) for n, c in compiled.items()}, seconds=args.seconds)
        machine = environment()
    ratio = timings["monarch"].p50 / timings["inductor"].p50
    print(*(f"{name}: {timing} ms" for name, timing in timings.items()), f"ratio {ratio:.3f}", sep="\n")
    if args.json:
        rows = {name: asdict(timing) for name, timing in timings.items()}
        text = json.dumps({"machine": machine, "layers": args.layers, "rows": rows, "ratio": ratio}, indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")
    return int(not 1 / LIMIT <= ratio <= LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
