"""What is timed on a problem: exact attention by several hands, Monarch attention, and peers that a user names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.speed.problems import Inputs
from monarch_compile.attention.benchmark import compiled_attention
from monarch_compile.attention.ir import MonarchAttention

FLEX_BLOCK = 128

Call = Callable[[], Tensor]
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


class Unsupported(Exception):
    """A subject does not do what a problem asks for."""


@dataclass(frozen=True)
class Subject:
    """A form of attention by name; `prepare` turns inputs into the call to time, or raises.

    exact: whether it computes softmax attention, so that Monarch attention has to be faster than it.
    around: the context that all of its calls run in, which is entered once: its own time is no part of theirs.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    exact: bool = True
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def _sdpa(x: Inputs) -> Call:
    mask = None if x.mask is None else x.mask[:, None, None, :]
    options = {"attn_mask": mask, "is_causal": x.causal, "enable_gqa": x.q.shape[1] != x.k.shape[1]}
    return functools.partial(scaled_dot_product_attention, x.q, x.k, x.v, **options)


def _backend(name: str, backend: SDPBackend) -> Subject:
    return Subject(name, _sdpa, around=functools.partial(sdpa_kernel, backend))


def _flex(x: Inputs) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # a limit of recompilations would send the later problems to the eager form
    compiled = torch.compile(flex_attention, dynamic=False)
    if x.causal and x.mask is not None:
        raise Unsupported("takes a mask or a triangle, not both")
    block_mask = None if x.mask is None else key_padding_blocks(x.mask.sum(1), x.q.shape[2])
    if x.causal:
        block_mask = causal_blocks(x.q)
    grouped = x.q.shape[1] != x.k.shape[1]
    return functools.partial(compiled, x.q, x.k, x.v, block_mask=block_mask, enable_gqa=grouped)


def causal_blocks(q: Tensor) -> object:
    """FlexAttention's mask of later keys for queries (batch, heads, seq_len, dim)."""
    from torch.nn.attention.flex_attention import create_block_mask

    seq_len = q.shape[2]
    return create_block_mask(lambda b, h, i, j: j <= i, None, None, seq_len, seq_len, device=str(q.device))


def key_padding_blocks(lengths: Tensor, seq_len: int) -> object:
    """FlexAttention's mask for keys visible up to `lengths` (batch,), made without a (seq_len, seq_len) tensor."""
    from torch.nn.attention.flex_attention import BlockMask

    blocks = -(-seq_len // FLEX_BLOCK)
    whole = lengths // FLEX_BLOCK
    partial = (lengths % FLEX_BLOCK > 0).int()
    table = (len(lengths), 1, blocks)
    every = torch.arange(blocks, device=lengths.device, dtype=torch.int32)
    first_is_partial = torch.where(every == 0, whole[:, None].clamp(max=blocks - 1), every).int()

    def rows(counts: Tensor) -> Tensor:
        return counts.int()[:, None, None].expand(table).contiguous()

    def lists(places: Tensor) -> Tensor:
        return places[:, None, None].expand(*table, blocks).contiguous()

    return BlockMask.from_kv_blocks(
        rows(partial),
        lists(first_is_partial),
        rows(whole),
        lists(every.expand(len(lengths), -1)),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=lambda b, h, q, k: k < lengths[b],
        seq_lengths=(seq_len, seq_len),
    )


def _compiled_exact(x: Inputs) -> Call:
    return functools.partial(compiled_attention({}, causal=x.causal), *_unmasked(x))


def _unmasked(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    if x.mask is not None:
        raise Unsupported("takes no mask")
    return x.q, x.k, x.v


EXACT: dict[str, tuple[Subject, ...]] = {
    "cuda": (
        _backend("cudnn", SDPBackend.CUDNN_ATTENTION),
        _backend("flash", SDPBackend.FLASH_ATTENTION),
        _backend("efficient", SDPBackend.EFFICIENT_ATTENTION),
        Subject("flex", _flex),
    ),
    "cpu": (Subject("sdpa", _compiled_exact),),
}
"""By device; those of the CPU go through Inductor, as does the Monarch form there."""


def peers(functions: Sequence[tuple[str, Peer]]) -> tuple[Subject, ...]:
    """Users' functions f(q, k, v), by name; none is told of a mask, and none counts as exact."""
    return tuple(
        Subject(name, lambda x, f=function: functools.partial(f, *_unordered(x)), exact=False)  # type: ignore[misc]
        for name, function in functions
    )


def _unordered(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    if x.causal:
        raise Unsupported("is told of no causal order")
    return _unmasked(x)


def step_of(call: Call, x: Inputs) -> Call:
    """A call and its backward pass: gradients of q, k and v, which want them, for one of the output that lies as heads
    merge. Gives the output."""
    batch, heads, seq_len, dim = x.v.shape
    grad = torch.randn(batch, seq_len, heads, dim, dtype=x.v.dtype, device=x.v.device).transpose(1, 2)

    def step() -> Tensor:
        output = call()
        torch.autograd.grad(output, (x.q, x.k, x.v), grad)
        return output.detach()

    return step


def monarch(ir: MonarchAttention, x: Inputs) -> Call:
    """The Monarch form of `ir`, compiled by the backend."""
    torch._dynamo.reset()  # as for flex
    options = {"policy": "always", "strict": True, "grid": ir.grid or "auto", "causal": ir.is_causal, **asdict(ir.form)}
    compiled = compiled_attention(options, causal=ir.is_causal)
    return functools.partial(compiled, x.q, x.k, x.v, x.mask)
