"""DistributedDataParallel and FSDP2 around compiled models, and options that ranks must share, over gloo."""

from __future__ import annotations

import copy
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from monarch_compile import agreement
from monarch_compile.backend import monarch
from monarch_compile.codegen.tuning.store import Tuned, write
from monarch_compile.errors import ConfigError
from monarch_compile.tools import autotune
from tests.support.block import Block
from tests.support.ranks import RANKS, Pool, pool_of_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

FORM = {"block_size": 8, "window": 1}
OPTIONS = {"policy": "always", **FORM}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with pool_of_ranks(str(tmp_path_factory.mktemp("ranks"))) as found:
        yield found


class Model(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x

    def by_reference(self, x: Tensor) -> Tensor:
        """The same with Monarch attention by hand."""
        for block in self.blocks:
            x = x + block.by_reference(x, **FORM)
        return x


def _without_inductor() -> None:
    torch._dynamo.reset()
    counters.clear()
    compile_fx.compile_fx = lambda gm, inputs, config_patches=None: aot_eager(gm, inputs)


def _batch() -> Tensor:
    return torch.randn(2 * RANKS, 41, 24, generator=torch.Generator().manual_seed(0))


def _steps(model: Any, run: Any, x: Tensor, steps: int = 3) -> list[float]:
    """Losses of a few steps of SGD."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        loss = run(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def train_sharded(mesh: Any, kind: str) -> tuple[list[float], dict[str, int], int, int]:
    """Losses, what was lowered, graphs and graph breaks of a training run, and of one inference before it."""
    from torch.distributed.fsdp import fully_shard

    _without_inductor()
    model: Any = Model()
    plain = copy.deepcopy(model)
    flat = mesh._flatten("all")
    own = _batch().chunk(RANKS)[flat.get_local_rank()]
    if kind == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=flat)
        fully_shard(model, mesh=flat)
        for block in model.blocks:
            block.compile(backend=monarch, options=OPTIONS, fullgraph=True)
    elif kind == "ddp":
        model.compile(backend=monarch, options=OPTIONS, fullgraph=True)
        model = nn.parallel.DistributedDataParallel(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
        model.compile(backend=monarch, options=OPTIONS)
    with torch.no_grad():
        torch.testing.assert_close(model(own), plain.by_reference(own), rtol=1e-5, atol=1e-5)
    graphs_of_inference = counters["stats"]["unique_graphs"]
    losses = _steps(model, model, own)
    found = torch.tensor(losses)
    torch.distributed.all_reduce(found)
    lowered = {name: n for name, n in counters["monarch"].items() if n}
    graphs = counters["stats"]["unique_graphs"] - graphs_of_inference
    return (found / RANKS).tolist(), lowered, graphs, sum(counters["graph_break"].values())


@pytest.mark.parametrize("kind", ["ddp", "ddp compiled", "fsdp"])
def test_sharded_training_equals_one_process(pool: Pool, kind: str) -> None:
    found = pool.run(train_sharded, kind)
    plain = Model()
    expected = _steps(plain, plain.by_reference, _batch())
    for losses, lowered, graphs, breaks in found:
        assert losses == pytest.approx(expected, rel=1e-5)
        assert set(lowered) == {"lowered"}
        assert lowered == found[0][1]
        assert graphs == found[0][2]
        assert breaks == 0 or kind == "ddp compiled"  # there torch breaks the graph around the module's own code
    assert max(graphs for _, _, graphs, _ in found) <= 2  # blocks that are equal may share one; no step compiles anew


def compile_differently(mesh: Any, rank_with_others: int, option: str, value: Any) -> str:
    """The error of a compilation on a rank, if there is one; ranks compile one after the other."""
    _without_inductor()
    agreement._COMPILED.clear()
    rank, options = torch.distributed.get_rank(), dict(OPTIONS)
    if rank == rank_with_others:
        options[option] = value
    text = ""
    for turn in range(RANKS):
        torch.distributed.barrier()
        if turn == rank:
            try:
                torch.compile(Block(dim=8 * (rank_with_others + 1), num_heads=1), backend=monarch, options=options)(
                    torch.randn(1, 16, 8 * (rank_with_others + 1))
                )
            except Exception as error:
                text = str(error)
    return text


@pytest.mark.parametrize(("rank", "option", "value"), [(1, "block_size", 4), (3, "window", None)])
def test_other_options_on_a_rank_are_named_when_it_compiles(pool: Pool, rank: int, option: str, value: Any) -> None:
    found = pool.run(compile_differently, rank, option, value)
    assert f"'{option}' is {OPTIONS[option]!r} on rank 0, {value!r} on rank {rank}" in found[rank]
    assert [text for place, text in enumerate(found) if place != rank] == [""] * (RANKS - 1)


def require_equal(mesh: Any, by_rank: list[Any]) -> str:
    """What is raised where ranks give these values."""
    try:
        agreement.require_equal("the test", {"same": 1, "value": by_rank[torch.distributed.get_rank()]}, None)
    except ConfigError as error:
        return str(error)
    return ""


def test_all_ranks_learn_which_value_differs(pool: Pool) -> None:
    assert pool.run(require_equal, [5] * RANKS) == [""] * RANKS
    expected = "the test must be the same on all ranks; 'value' is 5 on rank 0, 7 on rank 2"
    assert pool.run(require_equal, [5, 5, 7, 5]) == [expected] * RANKS


def test_one_process_compares_nothing() -> None:
    before = agreement._COMPILED.copy()
    agreement.require_equal_compilation("graph", {"option": 1})
    assert before == agreement._COMPILED


def test_long_values_are_told_apart_by_their_hash() -> None:
    one, other = "x" * 200 + "a", "x" * 200 + "b"
    assert agreement.shown(one) != agreement.shown(other)
    assert len(agreement.shown(one)) < 150


def _die(rank: int, folder: str) -> None:
    """One rank ends without a word before an exchange; the other says what it raises, and when."""
    from datetime import timedelta

    from torch.distributed.device_mesh import init_device_mesh

    from monarch_compile.distributed import sequence_parallel

    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=5)
    )
    parallel = sequence_parallel(init_device_mesh("cpu", (2,)), block_size=4)
    if rank == 1:
        return
    x, started = torch.randn(1, 2, 16, 4), time.monotonic()
    try:
        with parallel:
            nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        Path(f"{folder}/error").write_text(f"{time.monotonic() - started} {error}", encoding="utf-8")


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    workers = [context.Process(target=_die, args=(rank, str(tmp_path))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    seconds, _, text = (tmp_path / "error").read_text(encoding="utf-8").partition(" ")
    assert float(seconds) < 20
    assert "gloo" in text.lower() or "connection" in text.lower()


def _tune_once(folder: str, started: Any) -> None:
    """Look up a schedule that must be tuned first; each tuning leaves a file."""
    import os

    from monarch_compile.attention.form import Form
    from monarch_compile.attention.ir import MonarchAttention
    from monarch_compile.codegen.tuning import store

    store.tuned_path = lambda: Path(folder) / "tuned.json"  # type: ignore[assignment]
    machine = autotune.Machine(torch.device("cpu"), "test", (9, 0), "3.6")
    ir = MonarchAttention(1, 2, 2, 1024, 1024, 64, 64, torch.float16, Form(64, window=1), 0.125)

    def tuned_now(ir: Any, machine: Any, tune: Any) -> tuple[Tuned, dict[str, str]]:
        from monarch_compile.codegen.attention.schedule import choose_schedule

        (Path(folder) / f"tuned-by-{os.getpid()}").touch()
        time.sleep(0.3)
        result = Tuned(choose_schedule(ir, (9, 0)), 1.0, 1.0, 0.0, 1)
        write({autotune.key(ir, machine): result}, store.tuned_path())
        return result, {}

    autotune.tuned_now = tuned_now
    started.wait(60)
    assert autotune._schedule(ir, machine, lambda: None) is not None


def test_one_process_tunes_and_the_others_wait_and_read(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    started = context.Barrier(3)
    workers = [context.Process(target=_tune_once, args=(str(tmp_path), started)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(list(tmp_path.glob("tuned-by-*"))) == 1
