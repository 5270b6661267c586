"""Doors for eager code: Monarch attention call by call, without torch.compile.

`replace_sdpa` serves any library that calls torch.nn.functional.scaled_dot_product_attention (diffusers does, by its
default attention processor: run the pipeline inside the context); `register_transformers` gives transformers an
attn_implementation. Every call is judged with the tensors it is given: by their sizes and kinds, once for all calls
that agree in these, and by the mask's values, at every call. One that cannot be lowered stays exact, and its reason is
logged once. Code that torch.compile or torch.export traces stays exact here: there backend="monarch" and
`lower_exported` judge it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from monarch_compile.calls import EAGER, Calls
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.devices import installed
from monarch_compile.errors import ConfigError, LoweringError
from monarch_compile.functional import monarch_attention
from monarch_compile.ir import MaskKind, MonarchAttention
from monarch_compile.lengths import WHY, auto_block_size, exact_wins, what_decides
from monarch_compile.ops import kernel_refusal
from monarch_compile.passes.legality import DTYPES, MAX_HEAD_DIM
from monarch_compile.plan import ACROSS

logger = logging.getLogger(__name__)

CHOSEN = (*WHY, "policy_never", "min_seq_len", "single_query")
"""Codes of calls kept exact by choice; strict accepts them."""


T = TypeVar("T")
Triple = tuple[T, T, T]


@dataclass(frozen=True)
class Facts:
    """What decides on a scaled_dot_product_attention, but for its mask's values; of query, key and value in turn."""

    shapes: Triple[torch.Size]
    dtypes: Triple[torch.dtype]
    devices: Triple[torch.device]
    mask_rank: int | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    trains: bool = False


@dataclass(frozen=True)
class Stays:
    """A call stays exact: a code as in the backend's report, and the reason."""

    code: str
    reason: str

    def __str__(self) -> str:
        return f"[{self.code}] {self.reason}"


Form = dict[str, Any]
"""A call is lowered: keyword arguments of monarch_attention."""

Masks = dict[str, Any]
"""Those for its mask, tensors, if it has one."""

NAMES = {1: "head", 2: "query"}
"""Dimensions of a mask that must not matter."""


class ReplaceSdpa(TorchFunctionMode):
    """The context of `replace_sdpa`; `lowered` and `exact` count calls, `reasons` says why calls stayed exact."""

    def __init__(self, config: MonarchConfig) -> None:
        super().__init__()
        self._strict = config.strict
        self._decide = _decider(config)
        self.lowered = 0
        self.exact = 0
        self.reasons: dict[str, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run any other function as it is."""
        if func is scaled_dot_product_attention and not torch.compiler.is_compiling():
            output = self._attend(*args, **(kwargs or {}))
            if output is not None:
                return output
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """The call's Monarch attention; None where it stays exact."""
        if query.is_nested or key.is_nested or value.is_nested:
            return self._stays(NOT_FOUR_DIMS)
        decision = self._decide(
            (query.shape, key.shape, value.shape),
            (query.dtype, key.dtype, value.dtype),
            (query.device, key.device, value.device),
            None if attn_mask is None else attn_mask.ndim,
            (dropout_p, is_causal, scale, enable_gqa, _trains(query, key, value, attn_mask)),
        )
        masks: Masks = {}
        if attn_mask is not None and (isinstance(decision, dict) or (self._strict and decision.code in CHOSEN)):
            read = _key_masks(attn_mask, key.shape)  # its values may be others at each call
            if isinstance(read, Stays):
                return self._stays(read)
            masks = read
        if isinstance(decision, Stays):
            return self._stays(decision)
        self.lowered += 1
        return monarch_attention(query, key, value, scale=scale, **masks, **decision)

    def _stays(self, refusal: Stays) -> Tensor | None:
        """Count and, the first time, log it. Raises LoweringError where strict mode does not accept it."""
        if refusal.code not in self.reasons:
            chosen = refusal.code in CHOSEN
            if self._strict and not chosen:
                raise LoweringError(f"strict=True and a call cannot be lowered: {refusal}")
            self.reasons[refusal.code] = str(refusal)
            logger.log(logging.INFO if chosen else logging.WARNING, "attention stays exact: %s", refusal)
        self.exact += 1
        return None


def replace_sdpa(**options: Any) -> ReplaceSdpa:
    """A context in which scaled_dot_product_attention is Monarch attention, in this thread, wherever that is legal.

    It holds however the function was imported, and ends with the context. Shapes (batch, num_heads, seq_len, head_dim);
    lowered are bidirectional calls without active dropout, of equal lengths (with cross_attention=True of others too),
    unmasked or with a mask whose values, read at run time, depend on the key alone. torch.nn's fused encoder layers do
    not call the function and stay exact.

    A call that stays exact by its sizes takes about 4 microseconds longer than without the context.

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


@lru_cache(maxsize=16)
def _decider(config: MonarchConfig) -> Callable[..., Form | Stays]:
    """Decides on calls, under `config`: a decision is made once for all calls with the same facts."""

    @lru_cache(maxsize=4096)
    def decide(
        shapes: Triple[torch.Size],
        dtypes: Triple[torch.dtype],
        devices: Triple[torch.device],
        mask_rank: int | None,
        options: tuple[float, bool, float | None, bool, bool],
    ) -> Form | Stays:
        facts = Facts(shapes, dtypes, devices, mask_rank, *options)
        return _refusal(facts, config) or _form(facts, config)

    return decide


NOT_FOUR_DIMS = Stays("rank", "queries, keys and values must be (batch, num_heads, seq_len, dim) of one batch")


def _refusal(facts: Facts, config: MonarchConfig) -> Stays | None:
    """Why such calls cannot be lowered, if so; a mask is taken to hide keys alone."""
    q, k, v = facts.shapes
    if any(len(shape) != 4 for shape in facts.shapes) or len({q[0], k[0], v[0]}) > 1:
        return NOT_FOUR_DIMS
    if k[1] != v[1] or 0 in (q[1], k[1]) or q[1] % k[1] or (q[1] != k[1] and not facts.enable_gqa):
        return Stays("gqa", f"{q[1]} query heads, {k[1]} of keys and {v[1]} of values")
    if q[2] not in (1, k[2]) and not config.cross_attention:
        return Stays("cross_attention", f"seq_len_q {q[2]}, seq_len_k {k[2]}; cross_attention is False")
    if facts.is_causal:
        return Stays("mask_causal", "causal attention is not lowered yet")
    if facts.dropout_p > 0:
        return Stays("dropout_active", f"dropout {facts.dropout_p} is active")
    device, dtype = facts.devices[0], facts.dtypes[0]
    if len({*facts.dtypes}) > 1 or len({*facts.devices}) > 1 or device.type not in DTYPES:
        return Stays("device", f"devices must be one of {sorted(DTYPES)}, the same for all, and so the dtype")
    if dtype not in DTYPES[device.type]:
        return Stays("dtype", f"kernels exist for {DTYPES[device.type]}; found {dtype}")
    if 0 in (*q, *v):
        return Stays("empty", f"a size is 0: q {list(q)}, v {list(v)}")
    if device.type == "cuda" and max(q[3], v[3]) > MAX_HEAD_DIM:
        return Stays("wide_heads", f"head_dim {q[3]}, value_dim {v[3]}; at most {MAX_HEAD_DIM} on CUDA")
    if facts.scale is not None and not math.isfinite(facts.scale):
        return Stays("scale", f"the scale is {facts.scale}")
    if facts.mask_rank is not None and facts.mask_rank > 4:
        return Stays("rank", f"a mask of {facts.mask_rank} dims")
    reason = kernel_refusal(device)
    return None if reason is None else Stays("no_kernels", reason)


def _key_masks(mask: Tensor, key: torch.Size) -> Masks | Stays:
    """The mask, (batch, seq_len), by the name it has for monarch_attention: it must be one for every head and query.

    One that is to get a gradient must be so by its strides: equal values may be parameters of their own.
    """
    learned = mask.requires_grad and torch.is_grad_enabled()
    mask = mask[(None,) * (4 - mask.ndim)]
    for dim in (1, 2):
        by_strides = mask.shape[dim] == 1 or mask.stride(dim) == 0
        if not by_strides and (learned or not torch.equal(mask, mask.narrow(dim, 0, 1).expand_as(mask))):
            return Stays("mask_general", f"the mask {'may differ' if learned else 'differs'} by {NAMES[dim]}")
    row = mask[:, 0, 0].expand(key[0], key[2])
    if mask.dtype == torch.bool:
        return {"key_padding_mask": ~row}
    hidden = row <= torch.finfo(mask.dtype).min
    hides_only = not learned and bool((hidden | (row == 0)).all())
    return {"key_padding_mask": hidden} if hides_only else {"key_bias": row}


def _problem(facts: Facts) -> MonarchAttention:
    """What is computed, in blocks of one key until a form is chosen."""
    q, k, v = facts.shapes
    scale = 1 / math.sqrt(q[3]) if facts.scale is None else facts.scale
    mask = MaskKind.NONE if facts.mask_rank is None else MaskKind.KEY_PADDING  # no form hangs on which mask it is
    return MonarchAttention(q[0], q[1], k[1], q[2], k[2], q[3], v[3], facts.dtypes[0], 1, scale, mask=mask)


def _trains(*tensors: Tensor | None) -> bool:
    """Whether a backward pass will go through attention of these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _form(facts: Facts, config: MonarchConfig) -> Form | Stays:
    """The options' form, chosen as the backend chooses it, or why exact attention is wanted."""
    problem = _problem(facts)
    device, seq_len, queries = installed(facts.devices[0]), int(problem.seq_len_k), None
    if problem.is_cross:
        config, queries = replace(config, **ACROSS), problem.seq_len_q
    if seq_len < config.min_seq_len:
        return Stays("min_seq_len", f"seq_len {seq_len} is below min_seq_len {config.min_seq_len}")
    if config.policy == "never":
        return Stays("policy_never", "policy is 'never'")
    if queries == 1:
        return Stays("single_query", "exact attention of one query reads each key once")
    start: dict[str, Any] = {"num_iters": config.num_iters, "init": config.init}
    size = config.block_size
    block_size = size if isinstance(size, int) else auto_block_size(seq_len, device.kind, config.exact)
    ir = replace(problem, block_size=block_size, pad=config.pad, exact=config.exact, **start)
    if config.policy == "auto":
        calls = Calls(EAGER, facts.trains)
        ask: dict[str, Any] = {"batch": problem.batch, "seq_len": seq_len, "queries": queries, "calls": calls}
        reason = exact_wins(ir, device, auto=size == "auto", **ask)
        if reason is not None:
            code = what_decides(ir, device, {}, calls)
            return Stays(code, "; ".join(part for part in (reason, WHY[code], f"found {seq_len}") if part))
    groups = {"window": config.window, "prefix": config.prefix}
    return {"block_size": block_size, "pad": config.pad, **start, **groups}
