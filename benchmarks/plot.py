"""The README's picture: attention time against sequence length, from committed results.

python benchmarks/plot.py   # reads benchmarks/results/h200_attention.json, writes benchmarks/results/h200_attention.svg
"""

import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
FORMS = {"monarch": "Monarch (this project)", "cudnn": "exact, cuDNN", "flash": "exact, FlashAttention-2"}


def main() -> None:
    """Draw the batch-1 rows."""
    data = json.loads((RESULTS / "h200_attention.json").read_text())
    rows = [row for row in data["rows"] if row["batch"] == 1]
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for form, label in FORMS.items():
        times = [row[form][1] for row in rows]
        axes.plot([row["seq_len"] for row in rows], times, marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="ms")
    axes.set_xscale("log", base=2)
    environment = data["environment"]
    axes.set_title(f"{environment['gpu']}, float16, 12 heads of 64, T = 1, torch {environment['torch']}", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "h200_attention.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
