"""The two stages of Monarch attention by themselves, for attention whose blocks lie on several devices."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.attention.ir import MaskKind, MonarchAttention
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.kernels import program_of_far_field, program_of_summaries
from monarch_compile.codegen.attention.launch import bucketed, site, sizes_of, with_adjacent_features
from monarch_compile.codegen.attention.specialization import pitch
from monarch_compile.codegen.launcher import build_other, capability_of, on_device
from monarch_compile.codegen.source import is_interpreted

SUMMARIES = replace(EMITTER, program=program_of_summaries)
FAR_FIELD = replace(EMITTER, program=program_of_far_field)


def launch_summaries(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, form: Form, scale: float
) -> tuple[Tensor, ...]:
    """Stage 1 of q (E, H, N, D), k (E, H_kv, N, D), v (E, H_kv, N, D_v) and a bool key_mask (E, N), in b blocks.

    form: one iteration from the identity start, of pieces, without a prefix and in its simplest form. Returns, with
    logits in base 2, a (E * H, j, b, at least D), y (E * H, j, b, at least D_v), c (E * H, j, b), inf for a block
    without a visible key, and where there is a window, of its keys: log2 of the sum of weights (E * H, j, b), and mean
    values (E, N, H, D_v). What a and y hold past their features is not defined.

    Raises:
        CodegenError: no kernel exists for this dtype, head size or device.
    """
    ir, key_mask = site(q, k, v, key_mask, form, scale, None)
    launcher = build_other(ir, SUMMARIES, capability_of(q.device), is_interpreted())
    sizes = sizes_of(ir, launcher.schedule.most_blocks, q, k, None)
    q, k, v = with_adjacent_features(q, k, v)
    tensors = {"q": q, "k": k, "v": v}
    if key_mask is not None:
        tensors["key_mask"] = key_mask
    with on_device(q):
        return launcher(tensors, sizes)


def launch_far_field(
    q: Tensor, a: Tensor, y: Tensor, c: Tensor, window: int | None, value_dim: int, *, masked: bool
) -> tuple[Tensor, Tensor]:
    """Stage 2 of q (E, H, b * j, D), block by block, with summaries as `launch_summaries` gives them, contiguous, of
    all blocks. Returns mean values of the far field (E, b * j, H, D_v), 0 where a row has none, and the natural
    logarithm of its weights (E, H, b * j), -inf there.

    masked: whether some c may be inf.

    Raises:
        CodegenError: no kernel exists for this dtype, head size or device.
    """
    batch, heads, length, dim = q.shape
    offsets = a.shape[1]
    assert a.shape[3] == pitch(dim) and y.shape[3] == pitch(value_dim)  # noqa: PT018
    mask = MaskKind.KEY_PADDING if masked else MaskKind.NONE
    ir = bucketed(
        MonarchAttention(
            batch, heads, heads, length, length, dim, value_dim, q.dtype, Form(offsets, window=window), 1.0, mask
        )
    )
    launcher = build_other(ir, FAR_FIELD, capability_of(q.device), is_interpreted())
    sizes = sizes_of(ir, launcher.schedule.most_blocks, q, q, None)
    (q,) = with_adjacent_features(q)
    with on_device(q):
        z, lse = launcher({"q": q, "a": a, "y": y, "c": c}, sizes)
    return z, lse


def natural(log2: Tensor) -> Tensor:
    """A logarithm in base 2 as a natural one."""
    return log2 * math.log(2.0)
