"""How long a block linear takes: as the operator, as its products are spelled by hand, and as a dense layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from monarch_compile.calls import DEVICE_ALONE, Calls
from monarch_compile.cost.devices import Device
from monarch_compile.cost.prediction import Prediction
from monarch_compile.cost.sizes import known
from monarch_compile.linear import forms
from monarch_compile.linear.ir import KERNEL_FORMS, MONARCH, PRODUCTS, BlockLinear

HOST_LAUNCHES = 2
"""How many times as long the host takes for the launch of an emitted kernel as for another one."""


@dataclass(frozen=True)
class Times:
    """Predicted seconds of one forward pass: dense layer, and the operator in its fastest form, called `form`."""

    dense_s: float
    factors_s: float
    form: str

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense product the factors are predicted to be."""
        return self.dense_s / self.factors_s


def times(ir: BlockLinear, device: Device, hints: Mapping[str, int] | None = None) -> Times:
    """Seconds as a dense layer and as the operator, with the values of symbols in `hints`.

    On CUDA the model of dense and batched products is fitted to CUDA-graph replays on an H100 of 80 GB HBM3, in
    float16, of layers of 4096 x 4096 and 768 x 3072 with 1 to 8192 tokens; that of kernels is a guess (`forms.GPU`).
    Other devices are scaled.

    Raises:
        InputError: the number of tokens has no value.
    """
    sized = replace(ir, tokens=known(ir.tokens, hints))
    form = forms.form_of(forms.ranges(replace(ir, tokens="M"), device, device.kind == "cuda"), sized.tokens)
    return Times(forms.dense_seconds(sized, device), forms.seconds(sized, form, device), form)


def predict(
    ir: BlockLinear,
    device: Device,
    hints: Mapping[str, int] | None = None,
    calls: Calls = DEVICE_ALONE,
    request: str = forms.AUTO,
) -> Prediction:
    """Seconds as spelled by hand and as the operator, which runs a form as it is asked to (`forms.ranges`).

    Raises:
        InputError: the number of tokens has no value.
    """
    sized = replace(ir, tokens=known(ir.tokens, hints))
    form = forms.form_of(forms.ranges(replace(ir, tokens="M"), device, device.kind == "cuda", request), sized.tokens)
    exact_s, monarch_s = forms.seconds(sized, PRODUCTS, device), forms.seconds(sized, form, device)
    if form == PRODUCTS:
        monarch_s = exact_s
    if calls.trains:
        exact_s += forms.gradient_seconds(sized, False, device)
        monarch_s += forms.gradient_seconds(sized, form in KERNEL_FORMS, device)
    host = device.host(calls.launcher)
    if host is not None and host.kernel_s:
        exact_s = max(exact_s, _launches(sized, PRODUCTS) * host.kernel_s)
        slower = HOST_LAUNCHES if form in KERNEL_FORMS else 1
        monarch_s = max(monarch_s, _launches(sized, form) * slower * host.kernel_s)
    return Prediction(exact_s, monarch_s)


def _launches(ir: BlockLinear, form: str) -> int:
    rates = forms.GPU[form]
    return rates.launches if ir.kind == MONARCH else rates.blast
