"""For each site: lower it, or keep it exact, and say why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from monarch_compile.config import MonarchConfig
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.work import SIZES, predict, runs_kernels
from monarch_compile.cost.devices import installed
from monarch_compile.decision import LOWERED, Decision
from monarch_compile.passes.checks import first_refusal
from monarch_compile.passes.convolution.checks import CHECKS
from monarch_compile.passes.convolution.inputs import HALVES
from monarch_compile.passes.convolution.lower import to_ir
from monarch_compile.passes.convolution.region import ConvolutionRegion, Site
from monarch_compile.passes.elements.layouts import Layouts
from monarch_compile.passes.graph import dtype_of, value_of
from monarch_compile.passes.state import Choice, RefusedSite, kept_exact, undecided
from monarch_compile.passes.surroundings import Surroundings
from monarch_compile.refusal import Refusal, kernel_refusal

FAMILY = "convolution"


def choose(site: Site, name: str, config: MonarchConfig, around: Surroundings, layouts: Layouts) -> Choice:
    """Decide about one site: matched? legal? worth it? `name` is the site's, distinct in its graph.

    A plan says nothing of it: the lowered form is as exact as what it stands for.
    """
    if isinstance(site, RefusedSite):
        return _exact(undecided(FAMILY, name, site.anchor), "match", site.refusal)
    base = undecided(FAMILY, name, site.output)
    refusal = first_refusal(site, CHECKS)
    if refusal is not None:
        return _exact(base, "legality", refusal)
    device = value_of(site.output).device
    missing = kernel_refusal(device)
    if missing is not None:
        return _exact(base, "legality", Refusal("no_kernels", missing))
    calls = around.calls(site.output, site.frame.batch_size, site.seq_len)
    base = replace(base, calls=calls, ir=to_ir(site), dtype=dtype_of(site.u.node))
    return _weigh(site, base, config, device)


def _weigh(site: ConvolutionRegion, base: Decision, config: MonarchConfig, device: torch.device) -> Choice:
    """Whether a legal site pays. Either form is exact, so that symbolic sizes are taken as they were, unguarded."""
    ir: LongConvolution = base.ir
    if config.policy == "never":
        return _exact(base, "cost", Refusal("policy_never", "policy is 'never'"))
    captured = _as_captured(ir, site)
    prediction = predict(captured, installed(device), None, base.calls)
    gain = f"{prediction.speedup:.2f}x"
    if config.policy == "auto":
        refusal = _stays(captured, device)
        if refusal is None and not prediction.pays:
            refusal = Refusal("cost_exact_wins", f"the FFT wins; predicted gain {gain} here")
        if refusal is not None:
            return _exact(base, "cost", refusal)
    reason = f"predicted {gain} against the FFT"
    decision = replace(base, status=LOWERED, stage="lowered", code="lowered", reason=reason)
    return Choice(decision, site, ir, frozenset(site.inside), prediction.speedup)


def _stays(ir: LongConvolution, device: torch.device) -> Refusal | None:
    """Why a site of known lengths stays as it is whatever is predicted: no kernel would run, or its result be rounded
    too early."""
    if device.type == "cpu":
        return Refusal("cpu_fft_wins", "on a CPU the FFT wins")
    if ir.out_dtype not in HALVES or ir.dtype not in HALVES:
        return Refusal("float32_result", f"it is of {ir.dtype} and gives {ir.out_dtype}: float32 leaves it to the FFT")
    if not runs_kernels(device, ir.dtype, ir.filter_dtype, ir.out_dtype, ir.seq_len, ir.out_len):
        why = f"no kernel gives {ir.out_dtype} of sequences this long on this device; the FFT runs anyhow"
        return Refusal("cost_exact_wins", why)
    return None


def _exact(base: Decision, stage: str, refusal: Refusal) -> Choice:
    return Choice(kept_exact(base, stage, refusal))


def _as_captured(ir: LongConvolution, site: ConvolutionRegion) -> LongConvolution:
    """The IR with the numbers that its symbolic sizes were in the call that was captured."""
    frame = site.frame
    operands = [operand.size(frame.axis) for operand in (site.u, *site.filters)]
    sizes: Iterable[Any] = (frame.batch_size, frame.num_channels, site.points, site.ending.length, *operands)
    numbers = {str(n): int(n.node.hint) for n in sizes if isinstance(n, torch.SymInt)}
    return replace(ir, **{name: numbers.get(str(size := getattr(ir, name)), size) for name in SIZES})
