"""How eager code calls Monarch attention in place of its own; `monarch_compile.integrations` has the public names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from monarch_compile import autocast
from monarch_compile.attention.eager_calls import (
    Layout,
    decider,
    eager_order,
    in_order,
    key_mask,
    keys_under_triangle,
    not_plain,
)
from monarch_compile.attention.functional import monarch_attention
from monarch_compile.calls import is_trained
from monarch_compile.config import MonarchConfig, parse_options
from monarch_compile.errors import ConfigError, LoweringError
from monarch_compile.refusal import Refusal

logger = logging.getLogger("monarch_compile.integrations")  # as users know it


class ReplaceSdpa(TorchFunctionMode):
    """The context of `replace_sdpa`; `lowered` and `exact` count calls, `reasons` says why calls stayed exact."""

    def __init__(self, config: MonarchConfig) -> None:
        super().__init__()
        self._config = config
        self._strict = config.strict
        self._decide = decider(config)
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
        tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        refusal = not_plain(tensors)
        if refusal is not None:
            return self._stays(refusal)
        seen = attn_mask
        if attn_mask is not None and self._config.causal and not is_causal:
            of_keys = keys_under_triangle(attn_mask, query.shape[2] if query.ndim == 4 else 0)
            seen, is_causal = (attn_mask, False) if of_keys is None else (of_keys, True)
        target = autocast.target_of(query.device.type)
        dtypes = [x.dtype if target is None else autocast.cast(x.dtype, target) for x in tensors]
        decision = self._decide(
            (query.shape, key.shape, value.shape),
            (dtypes[0], dtypes[1], dtypes[2]),
            (query.device, key.device, value.device),
            None if attn_mask is None else attn_mask.ndim,
            (dropout_p, is_causal, scale, enable_gqa, is_trained(tensors), is_causal and seen is not attn_mask),
        )
        looked_at = (
            attn_mask is not None and self._strict
        )  # strict mode raises for a mask that is not legal, also where another refusal is a choice
        if isinstance(decision, Refusal) and not (looked_at and decision.is_choice):
            return self._stays(decision)
        order = eager_order([Layout.of(x, dtype) for x, dtype in zip(tensors, dtypes, strict=True)], scale, enable_gqa)
        if isinstance(order, Refusal):
            return self._stays(order)
        q, k, v = (x.to(dtype) for x, dtype in zip(tensors[:3], dtypes[:3], strict=True))
        mask = {} if seen is None else key_mask(seen.to(dtypes[3]), k.shape)  # its values may be others at each call
        if isinstance(mask, Refusal):
            return self._stays(mask)
        if isinstance(decision, Refusal):
            return self._stays(decision)
        self.lowered += 1
        grid = self._config.grid if decision.tile is not None and isinstance(self._config.grid, tuple) else None
        return in_order(
            monarch_attention(q, k, v, scale=scale, grid=grid, causal=is_causal, **mask, **vars(decision)), order
        )

    def _stays(self, refusal: Refusal) -> Tensor | None:
        """Count a call that stays exact, and log the first of its code.

        Raises:
            LoweringError: strict mode does not accept the refusal.
        """
        if refusal.code not in self.reasons:
            chosen = refusal.is_choice
            if self._strict and not chosen:
                raise LoweringError(f"strict=True and a call cannot be lowered: {refusal}")
            self.reasons[refusal.code] = str(refusal)
            logger.log(logging.INFO if chosen else logging.WARNING, "attention stays exact: %s", refusal)
        self.exact += 1
        return None


def replace_sdpa(**options: Any) -> ReplaceSdpa:
    """A context in which scaled_dot_product_attention is Monarch attention, in this thread, wherever that is legal.

    It holds however the function was imported, and ends with the context. Shapes (batch, num_heads, seq_len, head_dim);
    lowered are bidirectional calls without active dropout, of equal lengths (with cross_attention=True of others too,
    with causal=True also calls with is_causal=True, or with a bool mask that hides later keys), unmasked or with a mask
    whose values, read at run time, depend on the key alone. torch.nn's fused encoder layers do not call the function,
    and stay exact, as do calls that are traced, transformed by torch.func, or given tensors of a subclass. Where
    torch.utils.checkpoint computes attention anew, let the backward pass run inside the context, too.

    A call that stays exact by its sizes takes about 8 microseconds longer than without the context.

    Args:
        options: as for torch.compile's options, those of `MonarchConfig`, except `plan` and `mode`.

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


def register_diffusers(name: str = "monarch", **options: Any) -> ReplaceSdpa:
    """Give diffusers an attention backend of this name: its "native", inside `replace_sdpa(**options)`.

    Choose it as any other, by `pipe.transformer.set_attention_backend(name)` or in `diffusers.attention_backend(name)`.
    Attention processors that do not go through diffusers' backends (Stable Diffusion 3's, for one) stay as they are:
    run those inside `replace_sdpa`. Registering a name again replaces its options. Context parallelism is refused.

    Returns:
        The context that each call runs in: its `lowered` and `exact` count calls, its `reasons` say why calls stayed
        exact.

    Raises:
        ConfigError: as `replace_sdpa`, or the name is one of diffusers' own or not in lower case.
        ImportError: diffusers 0.35 or later is not installed.
    """
    from monarch_compile.attention.diffusers_backend import add_backend

    replaced = replace_sdpa(**options)
    add_backend(name, replaced)
    return replaced


def _config(options: Mapping[str, Any]) -> MonarchConfig:
    config, patches = parse_options(options)
    unused = [*patches, *(name for name in ("plan", "mode") if getattr(config, name) is not None)]
    if unused:
        raise ConfigError(f"without torch.compile there is no use for {', '.join(unused)}")
    return config
