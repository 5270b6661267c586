"""Doors for eager code: Monarch attention call by call, without torch.compile.

`replace_sdpa` serves any library that calls torch.nn.functional.scaled_dot_product_attention (diffusers does, by its
default attention processor: run the pipeline inside the context); `register_transformers` gives transformers an
attn_implementation. Every call is judged with the tensors it is given; one that cannot be lowered stays exact, and its
reason is logged once. Code that torch.compile or torch.export traces stays exact here: there backend="monarch" and
`lower_exported` judge it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.devices import installed
from monarch_compile.errors import ConfigError, LoweringError
from monarch_compile.functional import monarch_attention
from monarch_compile.ir import ExactGroups, MaskKind, MonarchAttention
from monarch_compile.lengths import auto_block_size, exact_wins
from monarch_compile.ops import kernel_refusal
from monarch_compile.passes.legality import DTYPES, MAX_HEAD_DIM
from monarch_compile.plan import ACROSS

logger = logging.getLogger(__name__)

CHOSEN = ("cost_exact_wins", "policy_never", "min_seq_len", "single_query")
"""Codes of calls kept exact by choice; strict accepts them."""


@dataclass(frozen=True)
class Call:
    """The arguments of one scaled_dot_product_attention."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def exact(self) -> Tensor:
        """The call as it was written."""
        return scaled_dot_product_attention(**vars(self))


class Stays(Exception):
    """A call stays exact: a code as in the backend's report, and the reason."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(f"[{code}] {reason}")
        self.code = code


class ReplaceSdpa(TorchFunctionMode):
    """The context of `replace_sdpa`; `lowered` and `exact` count calls, `reasons` says why calls stayed exact."""

    def __init__(self, config: MonarchConfig) -> None:
        super().__init__()
        self._config = config
        self.lowered = 0
        self.exact = 0
        self.reasons: dict[str, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any other function as it is."""
        if func is not scaled_dot_product_attention or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        return self._attend(Call(*args, **(kwargs or {})))

    def _attend(self, call: Call) -> Tensor:
        try:
            key_mask, form = _judge(call, self._config)
        except Stays as refusal:
            self._note(refusal)
            self.exact += 1
            return call.exact()
        self.lowered += 1
        hidden = None if key_mask is None else ~key_mask
        return monarch_attention(call.query, call.key, call.value, scale=call.scale, key_padding_mask=hidden, **form)

    def _note(self, refusal: Stays) -> None:
        chosen = refusal.code in CHOSEN
        if self._config.strict and not chosen:
            raise LoweringError(f"strict=True and a call cannot be lowered: {refusal}") from None
        if refusal.code not in self.reasons:
            self.reasons[refusal.code] = str(refusal)
            logger.log(logging.INFO if chosen else logging.WARNING, "attention stays exact: %s", refusal)


def replace_sdpa(**options: Any) -> ReplaceSdpa:
    """A context in which scaled_dot_product_attention is Monarch attention, in this thread, wherever that is legal.

    It holds however the function was imported, and ends with the context. Shapes (batch, num_heads, seq_len, head_dim);
    lowered are bidirectional calls without active dropout, of equal lengths (with cross_attention=True of others too),
    unmasked or with a mask whose values, read at run time, depend on the key alone. torch.nn's fused encoder layers do
    not call the function and stay exact.

    Args:
        options: as for torch.compile's options, those of `MonarchConfig`, but for `plan` and `mode`.

    Raises:
        ConfigError: an option is unknown, has a value that is not allowed, or means nothing here.
        LoweringError: inside the context, with strict=True: a call would stay exact for lack of support.
    """
    return ReplaceSdpa(_config(options))


def register_transformers(name: str = "monarch", **options: Any) -> None:
    """Give transformers an attn_implementation of this name: its "sdpa", inside `replace_sdpa(**options)`.

    Masks are made as for "sdpa". Registering a name again replaces its options.

    Raises:
        ConfigError: as `replace_sdpa`.
        ImportError: transformers is not installed.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    replaced = replace_sdpa(**options)

    def attention(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return sdpa_attention_forward(*args, **kwargs)
        with replaced:
            return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)


def _config(options: Mapping[str, Any]) -> MonarchConfig:
    config, patches = parse_options(options)
    unused = [*patches, *(name for name in ("plan", "mode") if getattr(config, name) is not None)]
    if unused:
        raise ConfigError(f"without torch.compile there is no use for {', '.join(unused)}")
    return config


# ---- may this call be lowered? ---------------------------------------------------------------------------------------


def _judge(call: Call, config: MonarchConfig) -> tuple[Tensor | None, dict[str, Any]]:
    """(key mask, True where visible; keyword arguments of monarch_attention). Raises Stays."""
    _check(call, config)
    key_mask = _key_mask(call)
    return key_mask, _form(_problem(call, key_mask is not None), call.query.device, config)


def _check(call: Call, config: MonarchConfig) -> None:
    q, k, v = tensors = (call.query, call.key, call.value)
    if any(x.is_nested or x.ndim != 4 for x in tensors) or len({x.shape[0] for x in tensors}) > 1:
        raise Stays("rank", "queries, keys and values must be (batch, num_heads, seq_len, dim) of one batch")
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1] or (q.shape[1] != k.shape[1] and not call.enable_gqa):
        raise Stays("gqa", f"{q.shape[1]} query heads, {k.shape[1]} of keys and {v.shape[1]} of values")
    if q.shape[2] != k.shape[2] and not config.cross_attention:
        raise Stays("cross_attention", f"seq_len_q {q.shape[2]}, seq_len_k {k.shape[2]}; cross_attention is False")
    if call.is_causal:
        raise Stays("mask_causal", "causal attention is not lowered yet")
    if call.dropout_p > 0:
        raise Stays("dropout_active", f"dropout {call.dropout_p} is active")
    if len({(x.dtype, x.device) for x in tensors}) > 1 or q.device.type not in DTYPES:
        raise Stays("device", f"devices must be one of {sorted(DTYPES)}, the same for all, and so the dtype")
    if q.dtype not in DTYPES[q.device.type]:
        raise Stays("dtype", f"kernels exist for {DTYPES[q.device.type]}; found {q.dtype}")
    if 0 in (*q.shape, *v.shape) or (q.device.type == "cuda" and max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM):
        raise Stays("symbolic_dims", f"sizes must be above 0, and head_dim at most {MAX_HEAD_DIM} on CUDA")
    if call.scale is not None and not math.isfinite(call.scale):
        raise Stays("scale", f"the scale is {call.scale}")
    refusal = kernel_refusal(q.device)
    if refusal is not None:
        raise Stays("no_kernels", refusal)


def _key_mask(call: Call) -> Tensor | None:
    """(batch, seq_len) bool, True where a key is visible, where the mask proves to be that for every head and query."""
    mask, k = call.attn_mask, call.key
    if mask is None:
        return None
    if mask.ndim > 4:
        raise Stays("rank", f"a mask of {mask.ndim} dims")
    mask = mask[(None,) * (4 - mask.ndim)]
    first = mask[:, :1, :1]
    for dim in (1, 2):
        by_strides = mask.shape[dim] == 1 or mask.stride(dim) == 0
        if not by_strides and not torch.equal(mask, mask.narrow(dim, 0, 1).expand_as(mask)):
            raise Stays("mask_general", f"the mask depends on the {'head' if dim == 1 else 'query'}")
    if mask.dtype != torch.bool:
        hidden = first <= torch.finfo(mask.dtype).min
        if not bool((hidden | (first == 0)).all()):
            raise Stays("mask_key_bias", "the mask adds other values than 0 and the lowest of its dtype, or -inf")
        first = ~hidden
    return first[:, 0, 0].expand(k.shape[0], k.shape[2])


def _problem(call: Call, masked: bool) -> MonarchAttention:
    """What is computed, in blocks of one key until a form is chosen."""
    q, k, v = call.query, call.key, call.value
    scale = 1 / math.sqrt(q.shape[3]) if call.scale is None else call.scale
    mask = MaskKind.KEY_PADDING if masked else MaskKind.NONE
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return MonarchAttention(*sizes, q.dtype, 1, scale, mask=mask)


@lru_cache(maxsize=1024)
def _form(problem: MonarchAttention, place: torch.device, config: MonarchConfig) -> dict[str, Any]:
    """The options' form, chosen as the backend chooses it. Raises Stays where exact attention is wanted."""
    device, seq_len, queries = installed(place), int(problem.seq_len_k), None
    if problem.is_cross:
        config, queries = replace(config, **ACROSS), problem.seq_len_q
    exact = ExactGroups(config.window, config.prefix)
    if seq_len < config.min_seq_len:
        raise Stays("min_seq_len", f"seq_len {seq_len} is below min_seq_len {config.min_seq_len}")
    if config.policy == "never":
        raise Stays("policy_never", "policy is 'never'")
    if queries == 1:
        raise Stays("single_query", "exact attention of one query reads each key once")
    start: dict[str, Any] = {"num_iters": config.num_iters, "init": config.init}
    size = config.block_size
    block_size = size if isinstance(size, int) else auto_block_size(seq_len, device.kind, config.window)
    ir = replace(problem, block_size=block_size, pad=config.pad, exact=exact, **start)
    if config.policy == "auto":
        reason = exact_wins(ir, device, auto=size == "auto", batch=problem.batch, seq_len=seq_len, queries=queries)
        if reason is not None:
            raise Stays("cost_exact_wins", f"{reason}; found {seq_len}")
    groups = {"window": config.window, "prefix": config.prefix}
    return {"block_size": block_size, "pad": config.pad, **start, **groups}
