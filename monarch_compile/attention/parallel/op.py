"""The operator that carries attention over several ranks through torch.compile, and its backward pass.

It is opaque: ranks hold pieces of different lengths, so that their graphs differ, and a compiler that saw the exchanges
might order them differently on different ranks, which would then wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from monarch_compile.attention.form import FORM_OPTIONS, Form
from monarch_compile.attention.parallel.attend import Shared, attend
from monarch_compile.attention.parallel.exchange import Ranks
from monarch_compile.attention.parallel.spread import Spread


def encoded(spread: Sequence[Any], form: Sequence[Any], *others: Any) -> str:
    """A `Shared` as text, of the values of its fields; Dynamo takes it as a constant."""
    return json.dumps([spread, form, *others])


vars(encoded)["_dynamo_marked_constant"] = True  # as in `calls`


@lru_cache(maxsize=1024)
def decoded(text: str) -> Shared:
    """The inverse of `encoded`."""
    spread, form, scale, grid, causal, method = json.loads(text)
    values: Any = (tuple(value) if isinstance(value, list) else value for value in form)
    return Shared(Spread(*spread), Form(*values), scale, None if grid is None else tuple(grid), causal, method)


def _ranks(group_name: str) -> Ranks:
    places: Any = torch.distributed.distributed_c10d
    return Ranks.of(places._resolve_process_group(group_name))


@torch.library.custom_op("monarch_compile::attention_of_piece", mutates_args=())
def attention_of_piece(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, shared: str, group_name: str
) -> Tensor:
    """`attend.attend` of the ranks of a process group; shared: as `encoded` gives it."""
    return attend(q, k, v, key_mask, decoded(shared), _ranks(group_name))


@attention_of_piece.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, shared: str, group_name: str) -> Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)


@torch.library.custom_op("monarch_compile::attention_of_piece_backward", mutates_args=())
def attention_of_piece_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, shared: str, group_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of a floating key_mask; that of any other mask is empty. The forward pass is run again,
    with its exchanges."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    is_biased = key_mask is not None and key_mask.is_floating_point()
    below = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.inference_mode(False), torch.enable_grad(), below:  # an operator's body runs below autograd
        mask = key_mask.detach().requires_grad_() if key_mask is not None and is_biased else key_mask
        output = attend(leaves[0], leaves[1], leaves[2], mask, decoded(shared), _ranks(group_name))
        found = torch.autograd.grad(output, [*leaves, mask] if is_biased else leaves, grad)  # type: ignore[arg-type]
    dense = [x.contiguous() for x in found]
    return dense[0], dense[1], dense[2], dense[3] if is_biased else q.new_empty(0)


@attention_of_piece_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, shared: str, group_name: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    is_biased = key_mask is not None and key_mask.is_floating_point()
    of_mask = key_mask.new_empty(key_mask.shape) if key_mask is not None and is_biased else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), of_mask


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = attention_of_piece_backward(grad, *ctx.saved_tensors, *ctx.options)
    wanted = ctx.needs_input_grad[:4]
    return (*(x if needed else None for x, needed in zip(found, wanted, strict=True)), None, None)


attention_of_piece.register_autograd(_backward, setup_context=_save)


def attend_in_graphs(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, shared: Shared, ranks: Ranks) -> Tensor:
    """`attend.attend`; where Dynamo traces, by the operator."""
    if not torch.compiler.is_compiling():
        return attend(q, k, v, key_mask, shared, ranks)
    spread = shared.spread
    fields = (spread.seq_len, spread.ranks, spread.block_size, spread.prefix, spread.prefix_at_end)
    form = tuple(getattr(shared.form, name) for name in FORM_OPTIONS)  # Dynamo of torch 2.11: no vars(form)
    text = encoded(fields, form, shared.scale, shared.grid, shared.causal, shared.method)
    output: Tensor = attention_of_piece(q, k, v, key_mask, text, ranks.name)
    return output
