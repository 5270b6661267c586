"""Steps of training of an encoder as large as ViT-L under FSDP2, beside one GPU on the whole batch."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.models.problems import TINY_VIT, VIT
from monarch_compile.backend import monarch as backend  # by name it would have to be installed

STEPS = 3
RATE = 1e-3


def losses_of_both(mesh: Any, tokens: int, *, tiny: bool = False) -> dict[str, Any]:
    """Losses of a few steps of SGD, a batch entry a rank: "one" GPU on the whole batch, and "sharded"; seconds of the
    last step and bytes allocated at most of each."""
    from torch.distributed.fsdp import fully_shard

    place = mesh.device_type
    architecture, dtype = (TINY_VIT, torch.float32) if tiny else (VIT, torch.bfloat16)
    (x,) = architecture.inputs(mesh.size(), tokens, place, dtype)
    found: dict[str, Any] = {"model": architecture.name, "tokens": tokens}
    for name in ("one", "sharded"):
        torch._dynamo.reset()
        gc.collect()
        model: Any = architecture.model(place, dtype)
        given = x
        if name == "sharded":
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            given = x.chunk(mesh.size())[mesh.get_local_rank()]
        for block in model.blocks:
            block.compile(backend=backend, options={"policy": "always"}, fullgraph=True)
        found[name] = _steps(model, given, place)
        del model
    pairs = zip(found["one"]["losses"], found["sharded"]["losses"], strict=True)
    found["difference"] = max(abs(a - b) / abs(a) for a, b in pairs)
    return found


def _steps(model: nn.Module, x: Tensor, place: str) -> dict[str, Any]:
    optimizer, losses, seconds = torch.optim.SGD(model.parameters(), lr=RATE), [], 0.0
    if place == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        dist.barrier()
        started = time.perf_counter()
        loss = (model(x).float() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / dist.get_world_size())
        seconds = time.perf_counter() - started
    memory = torch.cuda.max_memory_allocated() if place == "cuda" else 0
    return {"losses": losses, "seconds": seconds, "memory": memory}
