"""What a long convolution is said to cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sympy
import torch

from monarch_compile.calls import COMPILED, EAGER, REPLAYED, Calls
from monarch_compile.convolution.ir import LongConvolution
from monarch_compile.convolution.work import cost, fft_cost, predict
from monarch_compile.cost.devices import DEVICES
from monarch_compile.errors import InputError

IR = LongConvolution(16, 768, 4096, 4096, 8192, 4096, 0, torch.bfloat16, torch.float32, torch.bfloat16)
SYMBOLIC = replace(IR, batch="b", seq_len="n", filter_len="n", transform_len="2*n", out_len="n", pre_gate=True)
HINTS = {"b": 16, "n": 4096}


def test_known_sizes() -> None:
    assert cost(IR).flops == 16 * 768 * 4096 * 8 * (64 + 2 * 64)
    assert cost(replace(IR, pre_gate=True)).bytes - cost(IR).bytes == 16 * 768 * 4096 * 2
    assert fft_cost(IR).flops == 5 * 16 * 768 * 8192 * 13


def test_a_third_factor_goes_through_memory() -> None:
    longer = replace(IR, batch=4, seq_len=30000, filter_len=30000, transform_len=60000, out_len=30000)
    assert cost(longer).flops == 4 * 768 * 32768 * 8 * (32 + 4 * 32)
    assert cost(longer).bytes == 4 * 768 * (30000 * 4 + 32768 * 16) + 768 * 24 * 32768


def test_symbolic_sizes() -> None:
    found = cost(SYMBOLIC)
    assert isinstance(found.flops, sympy.Expr)
    assert found.flops.subs(HINTS) == cost(IR).flops
    assert float(fft_cost(SYMBOLIC).flops.subs(HINTS)) == pytest.approx(fft_cost(IR).flops)
    h100 = DEVICES["h100"]
    assert predict(SYMBOLIC, h100, HINTS) == predict(replace(IR, pre_gate=True), h100)
    with pytest.raises(InputError, match="no value"):
        predict(SYMBOLIC, h100, {"b": 16})


MEASURED = {(64, 768, 256): 10.5, (64, 768, 1024): 9.7, (16, 768, 4096): 7.3}
LONG_MEASURED = {(8, 768, 1 << 14): 3.9, (4, 768, 1 << 15): 4.1, (1, 768, 1 << 17): 4.7, (1, 256, 1 << 20): 3.0}


@pytest.mark.parametrize(("shape", "measured"), [*MEASURED.items(), *LONG_MEASURED.items()])
def test_predictions_are_near_what_was_measured(shape: tuple[int, int, int], measured: float) -> None:
    batch, channels, length = shape
    sizes = {"batch": batch, "channels": channels, "seq_len": length, "filter_len": length, "out_len": length}
    found = predict(replace(IR, **sizes, transform_len=2 * length), DEVICES["h100"]).speedup
    assert 0.7 < found / measured < 1.3


def test_small_problems_stay_where_launches_decide() -> None:
    small = replace(IR, batch=1, channels=64, seq_len=256, filter_len=256, transform_len=512, out_len=256)
    for launcher in (REPLAYED, COMPILED, EAGER):
        assert not predict(small, DEVICES["h100"], calls=Calls(launcher)).pays
        assert predict(IR, DEVICES["h100"], calls=Calls(launcher)).pays


def test_training_gains_less_and_a_cpu_nothing() -> None:
    h100 = DEVICES["h100"]
    assert 1 < predict(IR, h100, calls=Calls(trains=True)).speedup < predict(IR, h100).speedup
    assert predict(IR, DEVICES["cpu"]).speedup == 1
