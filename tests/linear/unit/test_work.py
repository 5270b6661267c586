"""What block linears cost, counted and predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from monarch_compile.calls import COMPILED, Calls
from monarch_compile.cost.devices import DEVICES
from monarch_compile.errors import InputError
from monarch_compile.linear import forms
from monarch_compile.linear.costs import cost, dense_cost, spelled_cost
from monarch_compile.linear.ir import BLAST, KINDS, MONARCH, PRODUCTS, BlockLinear
from monarch_compile.linear.work import predict, times

HALF = torch.float16


def layer(kind: str, tokens: Any, rank: int = 64, **changes: Any) -> BlockLinear:
    """4096 x 4096 in 16 blocks; Monarch of rank 64 has half of the parameters."""
    sizes: dict[str, Any] = {"in_features": 4096, "out_features": 4096, "in_blocks": 16, "out_blocks": 16}
    return BlockLinear(kind=kind, tokens=tokens, rank=rank, dtype=HALF, **{**sizes, **changes})


def test_a_small_layer_is_counted_by_hand() -> None:
    ir = BlockLinear(MONARCH, 5, 8, 12, 2, 4, 3, torch.float32, bias=True)
    assert ir.parameters == 2 * 4 * 3 * 4 + 4 * 3 * 2 * 3
    assert ir.inner == 2 * 4 * 3
    assert cost(ir).flops == 2 * 5 * ir.parameters
    assert cost(ir).bytes == 4 * (5 * (8 + 12) + ir.parameters + 12)
    assert spelled_cost(ir).bytes == 4 * (5 * (8 + 4 * 24 + 3 * 12) + ir.parameters + 12)
    assert (dense_cost(ir).flops, dense_cost(ir).bytes) == (2 * 5 * 96, 4 * (5 * 20 + 96 + 12))
    blast = BlockLinear(BLAST, 5, 8, 12, 2, 4, 3, torch.float32)
    assert blast.parameters == 3 * (8 + 12 + 8)
    assert spelled_cost(blast).bytes == 4 * (5 * (8 + (1 + 4) * 6 + 2 * 12 + 36) + blast.parameters)


def test_symbolic_tokens_stay_symbols() -> None:
    found = cost(layer(MONARCH, "s0"))
    assert found.flops.subs("s0", 7) == cost(layer(MONARCH, 7)).flops
    with pytest.raises(InputError, match="s0"):
        times(layer(MONARCH, "s0"), DEVICES["h100"])
    assert times(layer(MONARCH, "s0"), DEVICES["h100"], {"s0": 7}) == times(layer(MONARCH, 7), DEVICES["h100"])


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_the_operator_gains_nothing(kind: str) -> None:
    prediction = predict(layer(kind, 256), DEVICES["cpu"])
    assert prediction.speedup == 1.0
    assert prediction.exact_s > 0
    assert times(layer(kind, 256), DEVICES["cpu"]).form == PRODUCTS


@pytest.mark.parametrize("device", ["h100", "h200", "cuda"])
@pytest.mark.parametrize("tokens", [1, 16, 256, 8192])
def test_the_operator_is_never_predicted_to_lose_on_the_device_alone(device: str, tokens: int) -> None:
    for kind, rank in ((MONARCH, 64), (MONARCH, 8), (BLAST, 1024)):
        assert predict(layer(kind, tokens, rank), DEVICES[device]).speedup >= 1.0


def test_where_the_host_launches_kernels_few_tokens_do_not_pay() -> None:
    assert not predict(layer(MONARCH, 16), DEVICES["h100"], calls=Calls(COMPILED)).pays
    assert predict(layer(MONARCH, 8192), DEVICES["h100"], calls=Calls(COMPILED)).pays


def test_training_counts_gradients() -> None:
    for kind, rank in ((MONARCH, 64), (BLAST, 1024)):
        alone, trained = (
            predict(layer(kind, 8192, rank), DEVICES["h100"], calls=calls) for calls in (Calls(), Calls(trains=True))
        )
        assert trained.exact_s == pytest.approx(3 * alone.exact_s)
        assert trained.monarch_s > 2 * alone.monarch_s
    blast, own = layer(BLAST, 8192, 1024), DEVICES["h100"]
    assert forms.gradient_seconds(blast, True, own) == forms.gradient_seconds(blast, False, own)


@pytest.mark.parametrize("device", ["h100", "h200"])
def test_products_lose_against_dense_with_many_tokens_and_blast_by_far(device: str) -> None:
    monarch, blast = (layer(kind, 8192, rank) for kind, rank in ((MONARCH, 64), (BLAST, 1024)))
    dense_s = forms.dense_seconds(monarch, DEVICES[device])
    assert 0.5 < dense_s / forms.seconds(monarch, PRODUCTS, DEVICES[device]) < 1.0
    assert dense_s / forms.seconds(blast, PRODUCTS, DEVICES[device]) < 0.5


def test_few_parameters_win_where_the_weight_is_what_is_read() -> None:
    ir = replace(layer(MONARCH, 1), rank=4)
    assert times(ir, DEVICES["h100"]).speedup > 1.0
    assert times(ir, DEVICES["cpu"]).speedup > 8
