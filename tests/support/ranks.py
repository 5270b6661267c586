"""A pool of processes that are the ranks of one gloo group, for many cases."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RANKS = 4
TIMEOUT_S = 60.0
NO_ANSWER = "no answer"

Case = Callable[..., Any]
"""A function of a module: called on each rank with the mesh (2, 2) of all ranks, and with what was given."""


def _stacks(folder: str, rank: int) -> Path:
    """Where a rank writes the stacks of its threads when it is sent SIGUSR1."""
    return Path(folder) / f"stacks-{rank}"


def _serve(rank: int, folder: str, pipe: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from tests.support.interpreter import prefer_interpreter

    faulthandler.register(signal.SIGUSR1, _stacks(folder, rank).open("w"), all_threads=True)
    prefer_interpreter()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "own"))
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        case, arguments = work
        try:
            pipe.send((True, case(mesh, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Pool:
    """The processes; `run` calls a case on each and returns their results by rank."""

    def __init__(self, folder: str, processes: list[Any], pipes: list[Any]) -> None:
        self._folder, self._processes, self._pipes = folder, processes, pipes
        self._answers = True

    def _silent(self, rank: int) -> str:
        """What a rank that gave no answer is doing."""
        try:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        except ProcessLookupError:
            return f"{NO_ANSWER}: its process has ended"
        time.sleep(1)
        return f"{NO_ANSWER} in {TIMEOUT_S:.0f} seconds, it is here:\n{_stacks(self._folder, rank).read_text()}"

    def run(self, case: Case, *arguments: Any) -> list[Any]:
        assert self._answers, "a rank gave no answer to an earlier case"
        for pipe in self._pipes:
            pipe.send((case, arguments))
        last = time.monotonic() + TIMEOUT_S
        found = []
        for rank, pipe in enumerate(self._pipes):
            answered = pipe.poll(max(0.0, last - time.monotonic()))
            self._answers &= answered
            found.append(pipe.recv() if answered else (False, self._silent(rank)))
        wrong = [f"rank {rank}:\n{what}" for rank, (done, what) in enumerate(found) if not done]
        if wrong:
            raise AssertionError("\n".join(wrong))
        return [what for _, what in found]


@contextmanager
def pool_of_ranks(folder: str) -> Iterator[Pool]:
    """The pool; its processes end with the context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.support.ranks"])
    ends = [context.Pipe() for _ in range(RANKS)]
    processes = [context.Process(target=_serve, args=(rank, folder, ends[rank][1])) for rank in range(RANKS)]
    for process in processes:
        process.start()
    try:
        pipes = [own for own, _ in ends]
        assert all(pipe.poll(TIMEOUT_S) and pipe.recv() == "ready" for pipe in pipes)
        yield Pool(folder, processes, pipes)
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
            process.join()
