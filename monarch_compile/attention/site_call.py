"""A run of a lowered attention, outside of the kernels: how forms are compared in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from monarch_compile.attention.form import as_arguments
from monarch_compile.attention.gradients import OPTIONS
from monarch_compile.attention.groups import split_mask
from monarch_compile.attention.op import ATTENTION_OP
from monarch_compile.attention.reference import reference


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One run of one site: q (E, H, N_q, D), k (E, H_kv, N_k, D), v (E, H_kv, N_k, D_v), key_mask (E, N_k).

    key_mask is True where a key is visible, or floating and added to the scores.
    options: those of the operator, by name (`op.OPTIONS`).
    """

    site: str
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    options: Mapping[str, Any]

    @staticmethod
    def of(site: str, arguments: Sequence[Any]) -> AttentionCall:
        """That of the operator's arguments."""
        q, k, v, key_mask, *options = arguments
        return AttentionCall(site, q, k, v, key_mask, dict(zip(OPTIONS, options, strict=True)))

    def monarch(self, **changes: Any) -> Tensor:
        """Monarch attention with the site's options, or others; the grid is the site's, where blocks are tiles."""
        options = {**self.options, **changes}
        if options["tile"] is None:
            options["grid"] = None
        arguments = as_arguments({name: options[name] for name in OPTIONS})
        output: Tensor = ATTENTION_OP(self.q, self.k, self.v, self.key_mask, *arguments)
        return output

    def reference(self) -> Tensor:
        """What `monarch` gives without changes, by plain operators."""
        return reference(self.q, self.k, self.v, self.key_mask, **self.options)

    def exact(self) -> Tensor:
        """Softmax attention in bounded memory; a row that sees no key gives 0."""
        causal, mask, visible = self.options["causal"], None, None
        rows, keys = self.q.shape[2], self.k.shape[2]
        if self.key_mask is not None:
            visible, bias = split_mask(self.key_mask[:, None, None, :], self.q.dtype)
            if causal:
                visible = visible & torch.ones(rows, keys, device=self.q.device).tril(keys - rows).bool()
            mask = visible if bias is None else bias.masked_fill(~visible, float("-inf"))
        elif causal and rows != keys:
            mask = torch.ones(rows, keys, device=self.q.device).tril(keys - rows).bool()
        output = F.scaled_dot_product_attention(
            self.q,
            self.k,
            self.v,
            attn_mask=mask,
            is_causal=causal and mask is None,
            scale=self.options["scale"],
            enable_gqa=self.q.shape[1] != self.k.shape[1],
        )
        if visible is None:
            return output
        return torch.where(visible.any(-1, keepdim=True), output, output.new_zeros(()))
