"""The gradients of a form of attention, as what kernels are emitted, tuned and launched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import SHARED_PREFIX, MonarchAttention, is_exact


@dataclass(frozen=True)
class GradientsOf:
    """The gradients of a form with respect to q, k, v and to a bias of keys. forward: the form."""

    family: ClassVar[str] = "attention/gradients"

    forward: MonarchAttention

    def __str__(self) -> str:
        return f"gradients of {self.forward}"


def gradients_of(ir: MonarchAttention) -> GradientsOf | None:
    """The gradients of `ir`; None where they have no kernels, whatever the dtype and the head size."""
    seq_len = ir.seq_len_k if isinstance(ir.seq_len_k, int) else None
    refused = backward_refusal(ir.form, ir.is_cross, seq_len, is_causal=ir.is_causal)
    return GradientsOf(ir) if refused is None else None


def backward_refusal(form: Form, is_cross: bool, seq_len: Any = None, *, is_causal: bool = False) -> str | None:
    """Why there are no kernels for the gradients of a form; None where there are.

    is_cross: whether queries and keys are sequences of different lengths. seq_len: that of the keys, where it is known.
    """
    if is_causal:
        return "there are no backward kernels for causal attention"
    form = form.simplest()
    if form.chosen:
        return f"there are no backward kernels for chosen blocks; found chosen={form.chosen}"
    if is_cross:
        return "there are no backward kernels for queries and keys of different lengths"
    if form.num_iters != 1:
        return f"there are backward kernels for one iteration; found num_iters={form.num_iters}"
    if form.init != "identity":
        return f"there are backward kernels for the identity start; found init={form.init!r}"
    if form.prefix > SHARED_PREFIX:
        return f"there are backward kernels for a prefix of at most {SHARED_PREFIX}; found {form.prefix}"
    if seq_len is not None and is_exact(seq_len, seq_len, form.block_size, form.prefix):
        return "the form is exact attention: all keys are in one block"
    return None
