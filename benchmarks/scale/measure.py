"""Attention and whole models on the ranks of torchrun, beside one GPU alone and exact attention under torch's ring."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.scale.simulate import Attention, best_block_size
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.attention.parallel.costs import METHODS, cost_of
from monarch_compile.backend import monarch as backend  # by name it would have to be installed
from monarch_compile.cost.devices import installed
from monarch_compile.cost.links import fabric_of
from monarch_compile.distributed import sequence_parallel
from monarch_compile.errors import InputError

Call = Callable[[], Tensor]

WARM_UPS, LEAST_ROUNDS, MOST_ROUNDS, ROUNDS_S = 3, 3, 30, 0.5


def measured(attention: Attention, tokens: int, mesh: Any, *, graphs: bool = False) -> dict[str, Any]:
    """Milliseconds and bytes of one attention: one GPU alone, and both ways to share the work; their errors against one
    GPU.

    Times are the slowest rank's medians of plain calls, or of CUDA-graph replays. Memory is the most that a call
    allocates beside its inputs, with them.
    """
    place, rank = mesh.device_type, mesh.get_local_rank()
    block_size = best_block_size(attention, tokens, installed(place))
    options = {"block_size": block_size, "window": 1}
    shape = (1, attention.heads, tokens, attention.head_dim)
    generator = torch.Generator(place).manual_seed(0)
    q, k, v = (torch.randn(shape, dtype=attention.dtype, device=place, generator=generator) for _ in range(3))
    found: dict[str, Any] = {"tokens": tokens, "block_size": block_size, "num_heads": attention.heads}
    found |= {"head_dim": attention.head_dim, "dtype": str(attention.dtype).removeprefix("torch.")}
    with torch.no_grad():
        found["one"], expected = _timed(lambda: monarch_attention(q, k, v, **options), (q, k, v), graphs=graphs)
        piece = slice(rank * tokens // mesh.size(), (rank + 1) * tokens // mesh.size())
        own = [x[:, :, piece].contiguous() for x in (q, k, v)]
        wanted = expected[:, :, piece].contiguous()
        q = k = v = expected = torch.empty(0)  # their memory is free
        for method in METHODS:
            parallel = sequence_parallel(mesh, seq_len=tokens, method=method, **options)

            def shared(parallel: Any = parallel) -> Tensor:
                with parallel:
                    return scaled_dot_product_attention(*own)

            try:
                found[method], output = _timed(shared, own, graphs=graphs)
            except InputError as error:
                found[method] = str(error)
                continue
            found[method]["error"] = _error(output, wanted)
            ir = attention.ir(tokens, block_size)
            cost = cost_of(ir, mesh.size(), installed(place), fabric_of(place), method)
            found[method]["predicted_ms"] = (cost.total_s if graphs else cost.called_s) * 1e3
    return found


def model_measured(
    architecture: Any, tokens: int, mesh: Any, dtype: torch.dtype = torch.bfloat16, *, graphs: bool = False
) -> dict[str, Any]:
    """As `measured`, of a compiled model whose tokens lie on the ranks: "one" GPU, and "shared"."""
    place = mesh.device_type
    options = {"block_size": auto_block_size(tokens, place, 1), "window": 1}
    found: dict[str, Any] = {"model": architecture.name, "tokens": tokens, **options}
    x, *rest = architecture.inputs(1, tokens, place, dtype)
    model = architecture.model(place, dtype)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, options={"policy": "always", **options}, fullgraph=True)
        found["one"], expected = _timed(lambda: compiled(x, *rest), (x,), graphs=graphs)
        torch._dynamo.reset()
        parallel = sequence_parallel(mesh, seq_len=tokens, **options)
        own = parallel.shard(x, 1).contiguous()
        wanted = parallel.shard(expected, 1)
        compiled = torch.compile(model, backend=backend, fullgraph=True)

        def shared() -> Tensor:
            with parallel:
                output: Tensor = compiled(own, *rest)
                return output

        found["shared"], output = _timed(shared, (own,), graphs=graphs)
    found["shared"]["error"] = _error(output, wanted)
    return found


def ring(attention: Attention, tokens: int, mesh: Any) -> Any:
    """Exact attention under torch's context_parallel, by flash attention: milliseconds and bytes, or why there are
    none."""
    from torch.distributed.tensor.experimental import context_parallel

    shape = (1, attention.heads, tokens, attention.head_dim)
    whole = [torch.randn(shape, dtype=attention.dtype, device=mesh.device_type) for _ in range(3)]
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.FLASH_ATTENTION),
            context_parallel(mesh, buffers=whole, buffer_seq_dims=[2] * 3),
        ):
            return _timed(lambda: scaled_dot_product_attention(*whole), whole, graphs=False)[0]
    except Exception as error:  # another part of torch, which may lack what this machine needs
        return f"{type(error).__name__}: {error}"[:300]


def _error(output: Tensor, wanted: Tensor) -> float:
    """Relative, over all ranks."""
    squares = torch.stack([(output - wanted).float().norm() ** 2, wanted.float().norm() ** 2])
    dist.all_reduce(squares)
    return float((squares[0] / squares[1]).sqrt())


def _timed(call: Call, inputs: Any, *, graphs: bool) -> tuple[dict[str, float], Tensor]:
    """Milliseconds and bytes of a call, and what it gives."""
    given = sum(x.numel() * x.element_size() for x in inputs)
    for _ in range(WARM_UPS):
        output = call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - output.numel() * output.element_size()
    del output
    torch.cuda.reset_peak_memory_stats()
    output = call()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before + given
    slowest = torch.tensor([_median(_captured(call) if graphs else call), float(memory)], device=output.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {"ms": float(slowest[0]), "memory": float(slowest[1])}, output


def _captured(call: Call) -> Call:
    """`call` as a CUDA graph, which is replayed. Other threads watch collectives meanwhile: they may call CUDA."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = call()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def _median(call: Call) -> float:
    """Milliseconds of a call."""
    times: list[float] = []
    for _ in range(_rounds(call)):
        dist.barrier()
        times.append(_milliseconds(call))
    return statistics.median(times)


def _milliseconds(call: Call) -> float:
    """Of one call, on this rank's device."""
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _rounds(call: Call) -> int:
    """As many on all ranks."""
    most = torch.tensor([_milliseconds(call)], device="cuda")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(min(MOST_ROUNDS, max(LEAST_ROUNDS, ROUNDS_S * 1e3 / float(most))))
