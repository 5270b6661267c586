"""Attention and whole models over several GPUs.

    python -m benchmarks.scale --simulate [result.json] [--fabric nvlink]
    torchrun --nproc-per-node 2 -m benchmarks.scale result.json [--tokens 65536 262144 1048576] [--graphs]
        [--models] [--train]

The first prints what the cost model says of 1 to 1,024 GPUs; the second measures on those of torchrun, and notes
whether TORCH_NCCL_HIGH_PRIORITY was set.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.problems import DIT, VIT
from benchmarks.resumable import machine
from benchmarks.scale.simulate import Attention, limits, rows, table
from benchmarks.tables import markdown_table
from monarch_compile.cost.devices import DEVICES
from monarch_compile.cost.links import FABRICS

RING_MOST = 2**18
"""Exact attention of more tokens takes seconds a call."""


TRAINED_TOKENS = 4096
MODEL_TOKENS = 16384
PRIORITY = "TORCH_NCCL_HIGH_PRIORITY"


def main(arguments: list[str] | None = None) -> None:
    """Simulate or measure; a table is printed, and JSON is written where a path is given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("result", nargs="?", type=Path)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--device", default="h100", choices=[name for name in DEVICES if name != "cpu"])
    parser.add_argument("--fabric", default="nvlink", choices=list(FABRICS))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**16, 2**18, 2**20])
    parser.add_argument("--graphs", action="store_true", help="times of CUDA-graph replays instead of plain calls")
    parser.add_argument("--models", action="store_true", help=f"encoders of {MODEL_TOKENS} tokens, too")
    parser.add_argument("--train", action="store_true", help="steps of ViT-L under FSDP2 beside one GPU, too")
    given = parser.parse_args(arguments)
    attention = Attention(given.heads, given.head_dim)
    if given.simulate:
        found = rows(attention, DEVICES[given.device], FABRICS[given.fabric])
        print(table(found))
        print("\n".join(limits(found)))
        _write(given.result, {"device": given.device, "fabric": given.fabric, "rows": found})
        return
    _measure(attention, given)


def _measure(attention: Attention, given: argparse.Namespace) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from benchmarks.scale.measure import measured, model_measured, ring
    from benchmarks.scale.train import losses_of_both

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh("cuda", (int(os.environ["WORLD_SIZE"]),))
    content: dict[str, Any] = {"environment": machine("cuda"), "gpus": mesh.size(), PRIORITY: os.environ.get(PRIORITY)}
    content |= {"clock": "graph" if given.graphs else "plain", "rows": [], "models": []}

    def save(found: dict[str, Any]) -> None:
        """Print what was found last, and write all."""
        if mesh.get_rank() == 0:
            print(json.dumps(found), flush=True)
            _write(given.result, content)

    try:
        for tokens in given.tokens:
            content["rows"].append(measured(attention, tokens, mesh, graphs=given.graphs))
            save(content["rows"][-1])
        for architecture in (VIT, DIT) if given.models else ():
            content["models"].append(model_measured(architecture, MODEL_TOKENS, mesh, graphs=given.graphs))
            save(content["models"][-1])
        for row in content["rows"]:
            is_short = row["tokens"] <= RING_MOST
            row["ring"] = ring(attention, row["tokens"], mesh) if is_short and not given.graphs else None
            save(row)
        if given.train:
            content["training"] = losses_of_both(mesh, TRAINED_TOKENS)
            save(content["training"])
    finally:
        torch.distributed.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print("\n".join(markdown_table(HEAD, [cells for row in content["rows"] for cells in _cells(row)])))


HEAD = ("tokens", "what", "ms", "speedup", "MiB a GPU", "error", "predicted ms")


def _cells(row: dict[str, Any]) -> list[list[str]]:
    """Of each way, the cells of the table."""
    found = []
    for name in ("one", "heads", "offsets", "ring"):
        way = row.get(name)
        if isinstance(way, str):
            found.append([str(row["tokens"]), name, way, "", "", "", ""])
        elif way is not None:
            cells = [f"{way['ms']:.3f}", f"{row['one']['ms'] / way['ms']:.2f}", f"{way['memory'] / 2**20:.0f}"]
            rest = [f"{way['error']:.1e}", f"{way['predicted_ms']:.3f}"] if "error" in way else ["", ""]
            found.append([str(row["tokens"]), name, *cells, *rest])
    return found


def _write(path: Path | None, content: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
