"""Gradients of Monarch attention on kernels: the forward pass that keeps what they need, and the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from monarch_compile.attention.form import Form
from monarch_compile.codegen.attention.emitter import EMITTER
from monarch_compile.codegen.attention.gradient_ir import GradientsOf, backward_refusal
from monarch_compile.codegen.attention.kernels import program_with_lse
from monarch_compile.codegen.attention.launch import form_of, outputs, site, sizes_of, with_adjacent_features
from monarch_compile.codegen.attention.prefix_gradients import PrefixGradients
from monarch_compile.codegen.launcher import Launcher, build, build_other, capability_of, on_device
from monarch_compile.codegen.source import is_interpreted
from monarch_compile.errors import CodegenError

WITH_LSE = replace(EMITTER, program=program_with_lse)
"""The forward pass that also gives the logsumexp of each row."""


def launch_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    *,
    scale: float,
    grid: Sequence[Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Monarch attention as `launch.launch` gives it, and the logsumexps of its rows, which `launch_backward` takes.

    q (E, H, N, D), k (E, H_kv, N, D), v (E, H_kv, N, D_v), key_mask (E, N). Returns z (E, H, N, D_v), of q's dtype, and
    lse (E, H, N), float32: the natural logarithm of a row's total weight over all of its groups; -inf where it sees no
    key.

    Raises:
        CodegenError: no kernel exists for this dtype, head size or device, or `backward_refusal` gives a reason.
    """
    form = _supported(q, k, options)
    ir, key_mask = site(q, k, v, key_mask, form, scale, grid)
    launcher = build_other(ir, WITH_LSE, capability_of(q.device), is_interpreted())
    with on_device(q):
        z, lse = outputs(launcher, q, k, v, key_mask, grid)
    if form.prefix:
        PrefixGradients(q, k, v, key_mask, scale, form.prefix, form.prefix_at_end).write_lse(lse)
    return z.transpose(1, 2), lse


def launch_backward(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    z: Tensor,
    lse: Tensor,
    *,
    scale: float,
    grid: Sequence[Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of Monarch attention from those of its output dz (E, H, N, D_v); `z, lse` are from `launch_with_lse`.

    Returns dq, dk, dv, of the shapes and dtypes of q, k, v and laid out (batch, seq, heads, dim), and dbias (E, N),
    float32: that of a floating key_mask, 0 for the keys that it hides; None for no mask and for one of bools.
    Formulas: `backward`. Deterministic: every sum has one order. All tensors but lse are read through their strides,
    but for those that `launch.with_adjacent_features` copies.

    Raises:
        CodegenError: as for `launch_with_lse`.
    """
    form = _supported(q, k, options)
    ir, key_mask = site(q, k, v, key_mask, form, scale, grid)
    launcher = build(GradientsOf(ir), capability_of(q.device), is_interpreted())
    with on_device(q):
        dq, dk, dv, *dbias = run(launcher, dz, q, k, v, key_mask, z, lse, grid)
    return dq, dk, dv, dbias[0] if dbias else None


def run(
    launcher: Launcher,
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    z: Tensor,
    lse: Tensor,
    grid: Sequence[Any] | None = None,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, and dbias where key_mask is a bias, which is centred: `launch_backward` on a launcher.

    Raises:
        CodegenError: the schedule is for fewer blocks.
    """
    ir = launcher.ir.forward
    dz, q, k, v, z = with_adjacent_features(dz, q, k, v, z)
    sizes = sizes_of(ir, launcher.schedule.most_blocks, q, k, grid)
    tensors = {"q": q, "k": k, "v": v, "dz": dz, "z": z, "lse": lse.contiguous()}
    if key_mask is not None:
        tensors["key_mask"] = key_mask
    prefix = PrefixGradients(q, k, v, key_mask, ir.scale, ir.form.prefix, ir.form.prefix_at_end)
    if ir.form.prefix:
        tensors["delta_of_prefix"] = prefix.delta_of_rows(dz, z)
    dq, dk, dv, *rest = launcher(tensors, sizes)
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    is_biased = key_mask is not None and key_mask.is_floating_point()
    dbias = rest.pop(0).sum(1) if is_biased else None
    if ir.form.prefix:
        prefix.add(dz, z, lse, (dq, dk, dv, dbias), *rest)
    return (dq, dk, dv) if dbias is None else (dq, dk, dv, dbias)


def _supported(q: Tensor, k: Tensor, options: dict[str, Any]) -> Form:
    is_causal = bool(options.get("causal", False))
    form = form_of(**options)
    refusal = backward_refusal(form, q.shape[2] != k.shape[2], k.shape[2], is_causal=is_causal)
    if refusal is not None:
        raise CodegenError(refusal)
    return form
