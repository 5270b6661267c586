"""Data-parallel training by two processes: the same gradients as one process takes of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from monarch_compile.backend import monarch
from tests.support.block import Block

FORM = {"block_size": 8, "window": 1}
RANKS = 2
STEPS = 2


def batch() -> Tensor:
    return torch.randn(2 * RANKS, 41, 24, generator=torch.Generator().manual_seed(0))


def train(rank: int, folder: str) -> None:
    """A rank's part of a few steps without changes of weights; its gradients, and what was lowered, go to a file."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    compile_fx.compile_fx = lambda gm, inputs, config_patches=None: aot_eager(gm, inputs)
    model = DistributedDataParallel(Block())
    run: Any = torch.compile(model, backend=monarch, options={"policy": "always", **FORM})
    own = batch().chunk(RANKS)[rank]
    for _ in range(STEPS):
        run(own).square().mean().backward()
    found = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save((found, counters["monarch"]["lowered"]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.slow
def test_two_processes_take_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    spawn(train, args=(str(tmp_path),), nprocs=RANKS)
    model = Block()
    for _ in range(STEPS):
        model.by_reference(batch(), **FORM).square().mean().backward()
    for rank in range(RANKS):
        found, lowered = torch.load(tmp_path / f"{rank}.pt")
        assert lowered == 1
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
