"""The forms that `calibrate` considers for a site, and what the cost model says of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from monarch_compile.attention.form import ACROSS, FORM_OPTIONS, Form
from monarch_compile.attention.lengths import auto_block_size
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import MARGIN
from monarch_compile.family import Occurrence, total_seconds

SEARCH: dict[str, tuple[Any, ...]] = {
    "block_size": (0.5, 1, 2, 4),  # times what "auto" is
    "num_iters": (1, 2),
    "init": ("identity", "mean"),
    "pad": ("post",),
    "window": (None, 1, 2, 4, 8),
    "prefix": (0, 4),
}
"""What is tried for each option that the caller has not fixed."""


def forms_that_pay(occurrences: Sequence[Occurrence], device: Device, fixed: Mapping[str, Any]) -> list[Form]:
    """Every form of `SEARCH`, with the options in `fixed` kept, that is predicted to be faster than exact attention."""
    if any(occurrence.ir.is_cross for occurrence in occurrences):
        fixed = {**fixed, **ACROSS}
    timed = ((form, total_seconds(occurrences, device, form)) for form in _grid(occurrences[0], device, fixed))
    return [form for form, (exact_s, monarch_s) in timed if monarch_s * MARGIN <= exact_s]


def _grid(occurrence: Occurrence, device: Device, fixed: Mapping[str, Any]) -> list[Form]:
    names = [name for name in FORM_OPTIONS if name != "block_size"]
    values = [(fixed[name],) if name in fixed else SEARCH[name] for name in names]
    forms = []
    for choice in itertools.product(*values):
        form = Form(block_size=1, **dict(zip(names, choice, strict=True)))
        forms += [replace(form, block_size=size) for size in _block_sizes(occurrence, device, form, fixed)]
    return list(dict.fromkeys(forms))


def _block_sizes(occurrence: Occurrence, device: Device, form: Form, fixed: Mapping[str, Any]) -> list[int]:
    if "block_size" in fixed:
        return [int(fixed["block_size"])]
    ir = occurrence.ir
    seq_len = ir.seq_len_k if isinstance(ir.seq_len_k, int) else dict(occurrence.hints)[ir.seq_len_k]
    best = auto_block_size(seq_len, device.kind, form.window, form.prefix)
    return [max(1, min(seq_len, int(best * factor))) for factor in SEARCH["block_size"]]
