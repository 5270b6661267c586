"""What attention over several ranks costs: time, memory and what is sent, of each way to share the work."""

from __future__ import annotations

from dataclasses import dataclass, replace

from monarch_compile.attention.ir import MonarchAttention
from monarch_compile.attention.parallel.by_heads import LEAST_BYTES, LONG_HEAD, MOST_TURNS, heads_divide
from monarch_compile.attention.parallel.by_offsets import refusal_of
from monarch_compile.attention.parallel.spread import Spread
from monarch_compile.attention.work import predict
from monarch_compile.cost.devices import Device
from monarch_compile.cost.links import Fabric
from monarch_compile.errors import InputError

HEADS, OFFSETS = "heads", "offsets"
METHODS = (HEADS, OFFSETS)
FLOAT_BYTES = 4
CALL_S = 4.4e-3
"""What a shared call takes the host, where no CUDA graph replays it: 4.3 to 5.0 ms on two H200 for as little work as
64K tokens (benchmarks/results/scale_h200.json)."""
COPIED_BY_OFFSETS = 24
"""How often, by offsets, what is sent would have to be written for the time that is neither the kernels' nor the
links': of the same runs. It stands for kernels that read summaries of far strides, too."""


@dataclass(frozen=True)
class ParallelCost:
    """Of one rank, forward. compute_s, send_s: seconds. exposed_s: of sending, while nothing is computed. sent: bytes
    in all exchanges. memory: bytes of inputs, output and what is alive beside them at most. call_s: what a plain call
    takes the host.
    """

    compute_s: float
    send_s: float
    exposed_s: float
    sent: int
    memory: int
    call_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Seconds of the device."""
        return max(self.compute_s + self.exposed_s, self.send_s)

    @property
    def called_s(self) -> float:
        """Seconds of a plain call, whose kernels the host launches one by one."""
        return max(self.total_s, self.call_s)


def method_of(ir: MonarchAttention, ranks: int, device: Device, fabric: Fabric, method: str = "auto") -> str:
    """The way to share the work, "heads" or "offsets": the one that is asked for, or the faster by the cost model.

    Raises:
        InputError: it is none of these, or the attention cannot be shared so.
    """
    if method not in ("auto", *METHODS):
        raise InputError(f"method must be one of auto, {', '.join(METHODS)}; found {method!r}")
    heads, kv_heads = int(ir.num_heads), int(ir.num_kv_heads)
    wrong = {
        HEADS: None if heads_divide(heads, kv_heads, ranks) else f"{heads} and {kv_heads} heads over {ranks} ranks",
        OFFSETS: refusal_of(ir.form, causal=ir.is_causal),
    }
    allowed = [name for name in METHODS if wrong[name] is None and method in ("auto", name)]
    if not allowed:
        asked = METHODS if method == "auto" else (method,)
        why = "; ".join(f"by {name}: {wrong[name]}" for name in asked)
        raise InputError(f"attention cannot be shared by the ranks, {why}; found {ir}")
    return min(allowed, key=lambda name: cost_of(ir, ranks, device, fabric, name).total_s)


def cost_of(ir: MonarchAttention, ranks: int, device: Device, fabric: Fabric, method: str) -> ParallelCost:
    """The cost of attention `ir`, whose sizes are numbers, where `ranks` hold its sequence."""
    spread = Spread(int(ir.seq_len_k), ranks, ir.form.block_size, ir.form.prefix, ir.form.prefix_at_end)
    cost = (_by_heads if method == HEADS else _by_offsets)(ir, spread, device, fabric)
    return replace(cost, call_s=CALL_S) if device.kind == "cuda" and ranks > 1 else cost


def _by_heads(ir: MonarchAttention, spread: Spread, device: Device, fabric: Fabric) -> ParallelCost:
    ranks, item, batch = spread.ranks, ir.dtype.itemsize, int(ir.batch)
    own = ir.changed(num_heads=max(1, int(ir.num_heads) // ranks), num_kv_heads=max(1, int(ir.num_kv_heads) // ranks))
    per_token = (ir.head_dim + ir.value_dim) * (int(ir.num_heads) + int(ir.num_kv_heads)) * item * batch
    sent = per_token * spread.places
    copied = 2 * int(ir.num_heads) * ir.value_dim * item * batch * spread.places  # the output, to its heads
    moved_s = 0.0 if ranks == 1 else copied / device.monarch.bytes_per_s
    tensors = [(int(ir.num_heads), ir.head_dim), (int(ir.num_kv_heads), ir.head_dim + ir.value_dim)]
    inputs = sum(heads * dim for heads, dim in tensors) * item * batch * spread.places
    turns = _turns(ir, own, spread, inputs) if ranks > 1 else 1
    each_s = fabric.all_to_all_s(inputs / turns, ranks) + fabric.all_to_all_s((sent - inputs) / turns, ranks)
    exposed_s = each_s + (turns - 1) * 2 * fabric.all_to_all_s(0, ranks)  # queues wait for each other at each turn
    alive = sent if ranks == 1 else 2 * sent + sent - inputs  # the pieces, what was received, and the output, sent
    summaries = int(ir.num_heads) * batch * spread.places * ((ir.head_dim + ir.value_dim) * item + FLOAT_BYTES)
    crossing = sent * (ranks - 1) // ranks
    compute_s = predict(own, device).monarch_s + moved_s
    return ParallelCost(compute_s, turns * each_s, exposed_s, crossing, alive + summaries // turns)


def _turns(ir: MonarchAttention, own: MonarchAttention, spread: Spread, inputs: int) -> int:
    """As of `by_heads`, for heads whose rows are side by side. inputs: bytes of q, k and v on a rank."""
    key_heads = int(own.num_kv_heads)
    of_head = spread.places * min(ir.head_dim, ir.value_dim) * ir.dtype.itemsize
    if of_head >= LONG_HEAD and not spread.has_empty_places and not spread.prefix:
        return key_heads
    turns = next(n for n in range(MOST_TURNS, 0, -1) if key_heads % n == 0)
    return max(1, min(turns, inputs // spread.ranks // LEAST_BYTES))


def _by_offsets(ir: MonarchAttention, spread: Spread, device: Device, fabric: Fabric) -> ParallelCost:
    ranks, item, batch = spread.ranks, ir.dtype.itemsize, int(ir.batch)
    heads, kv_heads, places = int(ir.num_heads), int(ir.num_kv_heads), spread.places
    wide = ir.head_dim + ir.value_dim
    there = heads * batch * places * ((wide + ir.head_dim) * item + FLOAT_BYTES)
    back = heads * batch * places * (ir.value_dim * item + FLOAT_BYTES)
    moved_s = 0.0 if ranks == 1 else COPIED_BY_OFFSETS * (there + back) / device.monarch.bytes_per_s
    launch_s = 2 * device.monarch.launch_s
    compute_s = max(0.0, predict(ir, device).monarch_s - launch_s) / ranks + launch_s + moved_s
    halo = 0
    if ir.form.window:
        halo = int(max(ir.form.window if isinstance(ir.form.window, tuple) else (ir.form.window,)))
        halo *= 2 * ir.form.block_size * kv_heads * wide * item * batch
    lead = ir.form.prefix * (kv_heads * wide + heads * ir.head_dim) * item * batch
    sends = fabric.all_to_all_s(there, ranks) + fabric.all_to_all_s(back, ranks)
    sends += fabric.send_s(halo, ranks) if halo else 0.0
    sends += 3 * fabric.all_to_all_s(lead, ranks) if lead else 0.0
    crossing = (there + back) * (ranks - 1) // ranks + (halo + lead if ranks > 1 else 0)
    pieces = batch * places * wide * (heads + kv_heads) * item
    alive = pieces + there if ranks == 1 else pieces + 3 * there + back
    return ParallelCost(compute_s, sends, sends, crossing, alive)
